// What LoRA's dropout keeps of activations: a mask that is formed from counters and used at once.
//
// Dimensions: N rows, I features. A pair of neighbouring features takes the two halves of one
// number of 32 bits, which is mixed from that of the row and that of the pair. The loops are plain:
// a compiler makes vectors of them for any processor.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

using bf16 = uint16_t;

constexpr int64_t WORTH_A_THREAD = 1 << 17;  // numbers

// "lowbias32" of https://github.com/skeeto/hash-prospector, as `adapters/ops.py` has it.
inline uint32_t mixed(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    x ^= x >> 16;
    return x;
}

inline float widened(float x) { return x; }

inline float widened(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <class Number>
inline Number narrowed(float x);

template <>
inline float narrowed<float>(float x) {
    return x;
}

// To the nearest, to the even one of two.
template <>
inline bf16 narrowed<bf16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<bf16>(x != x ? 0x7FC0u : nearest);
}

// What each feature of a row is multiplied with.
void form_factors(uint32_t row, const uint32_t* __restrict columns, int64_t pairs,
                  int32_t threshold, float scale, float* __restrict factors) {
    for (int64_t k = 0; k < pairs; ++k) {
        const uint32_t word = mixed(row ^ columns[k]);
        const int32_t low = static_cast<int32_t>(word << 16) >> 16;
        const int32_t high = static_cast<int32_t>(word) >> 16;
        factors[2 * k] = low < threshold ? scale : 0.0f;
        factors[2 * k + 1] = high < threshold ? scale : 0.0f;
    }
}

// What is dropped is multiplied with zero, as PyTorch's dropout does: not a number stays none.
template <class Number, bool ADD>
void multiply(const Number* __restrict x, const float* __restrict factors, Number* __restrict out,
              int64_t I) {
    for (int64_t j = 0; j < I; ++j) {
        const float value = widened(x[j]) * factors[j];
        out[j] = narrowed<Number>(ADD ? widened(out[j]) + value : value);
    }
}

template <class Number, bool ADD>
void drop(const Number* x, const uint32_t* rows, Number* out, int64_t N, int64_t I, uint32_t salt,
          int32_t threshold, float scale, int64_t threads) {
    scale = widened(narrowed<Number>(scale));  // a mask of PyTorch's has x's format
    const int64_t pairs = (I + 1) / 2;
    std::vector<uint32_t> columns(pairs);
    for (int64_t k = 0; k < pairs; ++k) columns[k] = mixed(static_cast<uint32_t>(k) + salt);
    auto rows_of = [&](int64_t first, int64_t last) {
        std::vector<float> buffer(2 * pairs);
        float* const factors = buffer.data();
        for (int64_t i = first; i < last; ++i) {
            form_factors(rows[i], columns.data(), pairs, threshold, scale, factors);
            multiply<Number, ADD>(x + i * I, factors, out + i * I, I);
        }
    };
    in_ranges(N, I, threads, rows_of, WORTH_A_THREAD);
}

}  // namespace

extern "C" {

void lighten_dropped(const void* x, const uint32_t* rows, void* out, int64_t N, int64_t I,
                     uint32_t salt, int32_t threshold, float scale, int half, int64_t threads) {
    if (half)
        drop<bf16, false>(static_cast<const bf16*>(x), rows, static_cast<bf16*>(out), N, I, salt,
                          threshold, scale, threads);
    else
        drop<float, false>(static_cast<const float*>(x), rows, static_cast<float*>(out), N, I, salt,
                           threshold, scale, threads);
}

void lighten_add_dropped(const void* x, const uint32_t* rows, void* total, int64_t N, int64_t I,
                         uint32_t salt, int32_t threshold, float scale, int half, int64_t threads) {
    if (half)
        drop<bf16, true>(static_cast<const bf16*>(x), rows, static_cast<bf16*>(total), N, I, salt,
                         threshold, scale, threads);
    else
        drop<float, true>(static_cast<const float*>(x), rows, static_cast<float*>(total), N, I, salt,
                          threshold, scale, threads);
}

}  // extern "C"
