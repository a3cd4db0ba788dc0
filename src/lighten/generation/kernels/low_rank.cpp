// Low-rank updates of many adapters on the rows of one batch, in one pass.
//
// Rows that take the same adapter stand behind each other: a segment. Of each segment's rows x the
// product x Aᵀ with the adapter's A is formed, and its product with B is added to the outputs of the
// layers that read x. The factors are read once per block of rows, as float16; sums are float32.
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
    const f16* B;          // [r, O]
    int64_t first, ranks;  // which of the R ranks are its own
    int64_t column, outs;  // which columns of y its outputs are
    float scale;
};

struct Adapter {
    const f16* A;  // [R, I]
    int64_t ranks;
    const Layer* layers;
    int64_t layer_count;
};

constexpr int64_t ROWS = 4;  // of a block: each number of A and B read serves so many

// low[m, R] = x[m, I] Aᵀ
template <int M, class T>
void inner(const T* x, int64_t stride, const Adapter& adapter, int64_t inputs, float* low) {
    const int64_t whole = inputs & ~7;
    for (int64_t r = 0; r < adapter.ranks; ++r) {
        const f16* a = adapter.A + r * inputs;
        Eight sums[M];
        for (Eight& one : sums) one = zero();
        for (int64_t i = 0; i < whole; i += 8) {
            const Eight numbers = eight(a + i);
            for (int m = 0; m < M; ++m) sums[m] = fused(numbers, eight(x + m * stride + i), sums[m]);
        }
        for (int m = 0; m < M; ++m) {
            float found = sum(sums[m]);
            for (int64_t i = whole; i < inputs; ++i) found += one(a[i]) * one(x[m * stride + i]);
            low[m * adapter.ranks + r] = found;
        }
    }
}

// y[m, column:column + O] += low[m, first:first + r] B
template <int M, class T>
void outer(const float* low, int64_t ranks, const Layer& layer, T* y, int64_t stride) {
    y += layer.column;
    low += layer.first;
    const int64_t whole = layer.outs & ~7;
    for (int64_t o = 0; o < whole; o += 8) {
        Eight sums[M];
        for (int m = 0; m < M; ++m) sums[m] = eight(y + m * stride + o);
        for (int64_t r = 0; r < layer.ranks; ++r) {
            const Eight numbers = eight(layer.B + r * layer.outs + o);
            for (int m = 0; m < M; ++m) sums[m] = fused(all(low[m * ranks + r]), numbers, sums[m]);
        }
        for (int m = 0; m < M; ++m) put8(y + m * stride + o, sums[m]);
    }
    for (int64_t o = whole; o < layer.outs; ++o) {
        for (int m = 0; m < M; ++m) {
            float found = one(y[m * stride + o]);
            for (int64_t r = 0; r < layer.ranks; ++r)
                found += low[m * ranks + r] * one(layer.B[r * layer.outs + o]);
            put(y + m * stride + o, found);
        }
    }
}

template <int M, class T>
void block(const T* x, int64_t x_stride, T* y, int64_t y_stride, const Adapter& adapter,
           int64_t inputs, float* low) {
    inner<M>(x, x_stride, adapter, inputs, low);
    for (int64_t l = 0; l < adapter.layer_count; ++l) {
        const Layer& layer = adapter.layers[l];
        for (int m = 0; m < M; ++m)
            for (int64_t r = 0; r < layer.ranks; ++r)
                low[m * adapter.ranks + layer.first + r] *= layer.scale;
        outer<M>(low, adapter.ranks, layer, y, y_stride);
    }
}

template <class T>
bool segments(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t inputs,
              const Adapter* const* adapters, const int64_t* starts, const int64_t* stops,
              int64_t count, int64_t threads) {
    int64_t most = 0, turns = 0;
    for (int64_t s = 0; s < count; ++s) {
        most = std::max(most, adapters[s]->ranks);
        turns += (stops[s] - starts[s] + ROWS - 1) / ROWS;
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
            while (turn - before >= (own = (stops[segment] - starts[segment] + ROWS - 1) / ROWS)) {
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
extern "C" int lighten_low_rank(const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                int64_t inputs, const Adapter* const* adapters,
                                const int64_t* starts, const int64_t* stops, int64_t count,
                                int half, int64_t threads) {
    if (half)
        return segments((const bf16*)x, x_stride, (bf16*)y, y_stride, inputs, adapters, starts,
                        stops, count, threads);
    return segments((const float*)x, x_stride, (float*)y, y_stride, inputs, adapters, starts, stops,
                    count, threads);
}
