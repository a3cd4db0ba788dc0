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
// However many rows a block has, each is added up in the same order: no answer depends on others.
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

constexpr int64_t ROWS = 4;  // of a block: each number of A and B read serves so many
constexpr int RANKS = 4, OUTS = 32;  // of a tile of A and of B
#ifdef __AVX512VL__
constexpr int SUMS = 16;  // under way at once; there are 32 registers
#else
constexpr int SUMS = 8;
#endif

inline int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

// low[m, 0:K] = x[m, I] A[0:K]ᵀ, of K ranks of a tile
template <int M, int K, class T>
void ranks_of(const T* x, int64_t stride, const f16* A, int64_t inputs, float* low, int64_t ranks) {
    Eight sums[K][M];
    for (auto& row : sums)
        for (Eight& one : row) one = zero();
    for (int64_t i = 0; i < inputs; i += 8, A += RANKS * 8) {
        Eight numbers[M];
        for (int m = 0; m < M; ++m) numbers[m] = eight(x + m * stride + i, inputs - i);
        for (int k = 0; k < K; ++k) {
            const Eight factors = eight(A + k * 8);
            for (int m = 0; m < M; ++m) sums[k][m] = fused(factors, numbers[m], sums[k][m]);
        }
    }
    for (int k = 0; k < K; ++k)
        for (int m = 0; m < M; ++m) low[m * ranks + k] = sum(sums[k][m]);
}

// low[m, R] = x[m, I] Aᵀ, R a multiple of RANKS
template <int M, class T>
void inner(const T* x, int64_t stride, const f16* A, int64_t inputs, float* low, int64_t ranks) {
    constexpr int K = std::min(RANKS, SUMS / M);
    for (int64_t r = 0; r < ranks; r += RANKS, A += tiles(inputs, 8) * RANKS * 8)
        for (int k = 0; k + K <= RANKS; k += K)
            ranks_of<M, K>(x, stride, A + k * 8, inputs, low + r + k, ranks);
}

// y[m, 0:outs] += low[m, r] B, of outputs of a tile: 8 V of them, or fewer where V is 1
template <int M, int V, class T>
void outputs_of(const float* low, int64_t ranks, const f16* B, int64_t layer_ranks, T* y,
                int64_t stride, int64_t outs) {
    Eight sums[V][M];
    for (int v = 0; v < V; ++v)
        for (int m = 0; m < M; ++m) sums[v][m] = eight(y + m * stride + 8 * v, outs - 8 * v);
    for (int64_t r = 0; r < layer_ranks; ++r, B += OUTS) {
        Eight factors[M];
        for (int m = 0; m < M; ++m) factors[m] = all(low[m * ranks + r]);
        for (int v = 0; v < V; ++v) {
            const Eight numbers = eight(B + 8 * v);
            for (int m = 0; m < M; ++m) sums[v][m] = fused(factors[m], numbers, sums[v][m]);
        }
    }
    for (int v = 0; v < V; ++v)
        for (int m = 0; m < M; ++m) put8(y + m * stride + 8 * v, sums[v][m], outs - 8 * v);
}

// y[m, column:column + O] += low[m, first:first + r] B
template <int M, class T>
void outer(const float* low, int64_t ranks, const Layer& layer, T* y, int64_t stride) {
    constexpr int V = std::min(OUTS / 8, SUMS / M);
    low += layer.first;
    for (int64_t tile = 0; tile < layer.outs; tile += OUTS) {
        const f16* B = layer.B + tile * layer.ranks;
        T* to = y + layer.column + tile;
        const int64_t outs = std::min<int64_t>(OUTS, layer.outs - tile);
        int64_t o = 0;
        for (; o + 8 * V <= outs; o += 8 * V)
            outputs_of<M, V>(low, ranks, B + o, layer.ranks, to + o, stride, 8 * V);
        for (; o < outs; o += 8)
            outputs_of<M, 1>(low, ranks, B + o, layer.ranks, to + o, stride, outs - o);
    }
}

template <int M, class T>
void block(const T* x, int64_t x_stride, T* y, int64_t y_stride, const Adapter& adapter,
           int64_t inputs, float* low) {
    const int64_t ranks = tiles(adapter.ranks, RANKS) * RANKS;
    inner<M>(x, x_stride, adapter.A, inputs, low, ranks);
    for (int64_t l = 0; l < adapter.layer_count; ++l) {
        const Layer& layer = adapter.layers[l];
        for (int m = 0; m < M; ++m)
            for (int64_t r = 0; r < layer.ranks; ++r) low[m * ranks + layer.first + r] *= layer.scale;
        outer<M>(low, ranks, layer, y, y_stride);
    }
}

template <class T>
bool add(const Segments& segments, const T* x, int64_t x_stride, T* y, int64_t y_stride,
         int64_t threads) {
    const auto [adapters, starts, stops, count, inputs] = segments;
    int64_t most = 0, turns = 0;
    for (int64_t s = 0; s < count; ++s) {
        most = std::max(most, tiles(adapters[s]->ranks, RANKS) * RANKS);
        turns += tiles(stops[s] - starts[s], ROWS);
    }
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    in_parallel(std::min(threads, turns), [&] {
        const std::unique_ptr<float[]> low(new (std::nothrow) float[ROWS * most]);
        if (!low) {
            failed = true;
            return;
        }
        int64_t segment = 0, before = 0;  // turns of the segments before this one
        for (int64_t turn; (turn = next++) < turns;) {
            int64_t own;
            while (turn - before >= (own = tiles(stops[segment] - starts[segment], ROWS))) {
                before += own;
                ++segment;
            }
            int64_t row = starts[segment] + (turn - before) * ROWS;
            const int64_t stop = std::min(row + ROWS, stops[segment]);
            const Adapter& adapter = *adapters[segment];
            if (stop - row == 4)
                block<4>(x + row * x_stride, x_stride, y + row * y_stride, y_stride, adapter,
                         inputs, low.get());
            else if (stop - row == 3)
                block<3>(x + row * x_stride, x_stride, y + row * y_stride, y_stride, adapter,
                         inputs, low.get());
            else if (stop - row == 2)
                block<2>(x + row * x_stride, x_stride, y + row * y_stride, y_stride, adapter,
                         inputs, low.get());
            else
                block<1>(x + row * x_stride, x_stride, y + row * y_stride, y_stride, adapter,
                         inputs, low.get());
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
