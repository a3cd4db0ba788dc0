// Low-rank updates of many adapters on the rows of one batch, in one pass.
//
// Rows that take the same adapter stand behind each other: a segment. Of each segment's rows x the
// product x Aᵀ with the adapter's A is formed, and its product with B is added to the outputs of the
// layers that read x. The factors are read once per block of rows, as float16; sums are float32.
//
// Few rows wait for the factors to come from memory, not for arithmetic. So each factor lies in the
// order in which it is read, which `segments.py` lays out: A as [R / 4][I / 8][4][8], B as
// [O / 32][r][32], 64 bytes of either in a turn of the loop, zeros where a tile is not full.
//
// However many rows a block has, and on any processor with AVX2, each is added up in the same order:
// no answer depends on others.
//
// Dimensions: I input features, R ranks of all layers that read x side by side, r ranks and O
// output features of one of them.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "numbers.h"
#include "threads.h"

// What an adapter adds to one of the layers that read x.
struct Layer {
    const f16* B;          // [O / 32][r][32]
    int64_t first, ranks;  // which of the R ranks are its own
    int64_t column, outs;  // which columns of y its outputs are
    float scale;
};

struct Adapter {
    const f16* A;  // [R / 4][I / 8][4][8]
    int64_t ranks;
    const Layer* layers;
    int64_t layer_count;
};

struct Segments {
    const Adapter* const* adapters;  // of each
    const int64_t *starts, *stops;   // its first row, and one past its last
    int64_t count, inputs;
};

constexpr int RANKS = 4, OUTS = 32;  // of a tile of A and of B
// Rows of a block: each number of A and B read serves so many. Sums of sixteen under way at once:
// AVX-512 has 32 registers for them, others have 16 of half the width.
#ifdef __AVX512DQ__
constexpr int ROWS = 8, SUMS = 16;
#else
constexpr int ROWS = 4, SUMS = 4;
#endif
constexpr int FEW_ROWS = 4;  // of a block, where there are few for each thread

inline int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

// low[m, 0:2K] = x[m, I] A[0:2K]ᵀ, of K pairs of ranks of a tile; I a multiple of 8
template <int M, int K>
void ranks_of(const float* x, const f16* A, int64_t inputs, float* low, int64_t ranks) {
    Sixteen sums[K][M];
    for (auto& pair : sums)
        for (Sixteen& one : pair) one = zero16();
    for (int64_t i = 0; i < inputs; i += 8, A += RANKS * 8) {
        Sixteen factors[K];
        for (int k = 0; k < K; ++k) factors[k] = sixteen(A + k * 16);
        for (int m = 0; m < M; ++m) {
            const Sixteen numbers = twice(x + m * inputs + i);
            for (int k = 0; k < K; ++k) sums[k][m] = fused(factors[k], numbers, sums[k][m]);
        }
    }
    for (int k = 0; k < K; ++k)
        for (int m = 0; m < M; ++m) {
            low[m * ranks + 2 * k] = sum(low_half(sums[k][m]));
            low[m * ranks + 2 * k + 1] = sum(high_half(sums[k][m]));
        }
}

// low[m, R] = x[m, I] Aᵀ, R a multiple of RANKS, I of 8
template <int M>
void inner(const float* x, const f16* A, int64_t inputs, float* low, int64_t ranks) {
    constexpr int K = std::min(RANKS / 2, SUMS / M);
    for (int64_t r = 0; r < ranks; r += RANKS, A += inputs * RANKS)
        for (int k = 0; k < RANKS / 2; k += K)
            ranks_of<M, K>(x, A + k * 16, inputs, low + r + 2 * k, ranks);
}

// y[m, 0:outs] += low[m, r] B, of outputs of a tile: 16 V of them, or fewer where V is 1
template <int M, int V, class T>
void outputs_of(const float* low, int64_t ranks, const f16* B, int64_t layer_ranks, T* y,
                int64_t stride, int64_t outs) {
    Sixteen sums[V][M];
    for (int v = 0; v < V; ++v)
        for (int m = 0; m < M; ++m) sums[v][m] = sixteen(y + m * stride + 16 * v, outs - 16 * v);
    for (int64_t r = 0; r < layer_ranks; ++r, B += OUTS) {
        Sixteen numbers[V];
        for (int v = 0; v < V; ++v) numbers[v] = sixteen(B + 16 * v);
        for (int m = 0; m < M; ++m) {
            const Sixteen factor = all16(low[m * ranks + r]);
            for (int v = 0; v < V; ++v) sums[v][m] = fused(factor, numbers[v], sums[v][m]);
        }
    }
    for (int v = 0; v < V; ++v)
        for (int m = 0; m < M; ++m) put16(y + m * stride + 16 * v, sums[v][m], outs - 16 * v);
}

// y[m, column:column + O] += low[m, first:first + r] B
template <int M, class T>
void outer(const float* low, int64_t ranks, const Layer& layer, T* y, int64_t stride) {
    constexpr int V = std::min(OUTS / 16, SUMS / M);
    low += layer.first;
    for (int64_t tile = 0; tile < layer.outs; tile += OUTS) {
        const f16* B = layer.B + tile * layer.ranks;
        T* to = y + layer.column + tile;
        const int64_t outs = std::min<int64_t>(OUTS, layer.outs - tile);
        int64_t o = 0;
        for (; o + 16 * V <= outs; o += 16 * V)
            outputs_of<M, V>(low, ranks, B + o, layer.ranks, to + o, stride, 16 * V);
        for (; o < outs; o += 16)
            outputs_of<M, 1>(low, ranks, B + o, layer.ranks, to + o, stride, outs - o);
    }
}

template <int M, class T>
void block(const T* x, int64_t x_stride, T* y, int64_t y_stride, const Adapter& adapter,
           int64_t inputs, float* memory) {
    const int64_t ranks = tiles(adapter.ranks, RANKS) * RANKS, width = tiles(inputs, 8) * 8;
    float *low = memory, *numbers = memory + M * ranks;  // x as float32: each rank reads it
    for (int m = 0; m < M; ++m)
        for (int64_t i = 0; i < width; i += 8)
            put8(numbers + m * width + i, eight(x + m * x_stride + i, inputs - i));
    inner<M>(numbers, adapter.A, width, low, ranks);
    for (int64_t l = 0; l < adapter.layer_count; ++l) {
        const Layer& layer = adapter.layers[l];
        for (int m = 0; m < M; ++m)
            for (int64_t r = 0; r < layer.ranks; ++r) low[m * ranks + layer.first + r] *= layer.scale;
        outer<M>(low, ranks, layer, y, y_stride);
    }
}

// block<rows>
template <int M, class... Arguments>
void block_of(int64_t rows, const Arguments&... arguments) {
    if (rows == M) return block<M>(arguments...);
    if constexpr (M > 1) block_of<M - 1>(rows, arguments...);
}

template <class T>
bool add(const Segments& segments, const T* x, int64_t x_stride, T* y, int64_t y_stride,
         int64_t threads) {
    const auto [adapters, starts, stops, count, inputs] = segments;
    int64_t all_rows = 0, most = 0, turns = 0;
    for (int64_t s = 0; s < count; ++s) all_rows += stops[s] - starts[s];
    const int64_t rows = all_rows < threads * ROWS ? FEW_ROWS : ROWS;
    for (int64_t s = 0; s < count; ++s) {
        most = std::max(most, tiles(adapters[s]->ranks, RANKS) * RANKS);
        turns += tiles(stops[s] - starts[s], rows);
    }
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    in_parallel(std::min(threads, turns), [&] {
        const int64_t size = rows * (most + tiles(inputs, 8) * 8);
        const std::unique_ptr<float[]> memory(new (std::nothrow) float[size]);
        if (!memory) {
            failed = true;
            return;
        }
        int64_t segment = 0, before = 0;  // turns of the segments before this one
        for (int64_t turn; (turn = next++) < turns;) {
            int64_t own;
            while (turn - before >= (own = tiles(stops[segment] - starts[segment], rows))) {
                before += own;
                ++segment;
            }
            const int64_t row = starts[segment] + (turn - before) * rows;
            const int64_t stop = std::min(row + rows, stops[segment]);
            block_of<ROWS>(stop - row, x + row * x_stride, x_stride, y + row * y_stride, y_stride,
                           *adapters[segment], inputs, memory.get());
        }
    });
    return failed;
}

// Returns 0, or 1 where there was no memory for the products x Aᵀ.
extern "C" int lighten_low_rank(const Segments* segments, const void* x, int64_t x_stride, void* y,
                                int64_t y_stride, int half, int64_t threads) {
    if (half) return add(*segments, (const bf16*)x, x_stride, (bf16*)y, y_stride, threads);
    return add(*segments, (const float*)x, x_stride, (float*)y, y_stride, threads);
}
