// Vectors of float32 in the compiler's own words, as wide as the processor's registers.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Numbers __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

inline Numbers all(float x) { return x - Numbers{}; }
inline Numbers read(const float* from) {
    Numbers x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline void write(float* to, Numbers x) { std::memcpy(to, &x, sizeof x); }
inline Numbers larger(Numbers a, Numbers b) { return a < b ? b : a; }
inline Numbers smaller(Numbers a, Numbers b) { return b < a ? b : a; }
inline float sum_of(Numbers x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
}

// e^x of numbers up to 87, at least about the smallest normal one; NaN stays NaN.
inline Numbers exponential(Numbers x) {
    const Numbers t = x * 1.44269504f, least = all(-126.0f);
    const Numbers clamped = t < least ? least : t;
    const Numbers shifted = clamped + 12582912.0f;  // 1.5 · 2^23: rounds to the nearest integer
    const Numbers r = clamped - (shifted - 12582912.0f);
    Numbers p = all(1.54035304e-4f);
    p = p * r + 1.33335581e-3f;
    p = p * r + 9.61812911e-3f;
    p = p * r + 5.55041087e-2f;
    p = p * r + 2.40226507e-1f;
    p = p * r + 6.93147181e-1f;
    p = p * r + 1.0f;
    // The integer's last bits are the shifted number's: as an exponent they are the power of two.
    return p * (Numbers)(((Integers)shifted << 23) + (127 << 23));
}

// 1 / (1 + e^-x)
inline Numbers sigmoid(Numbers x) { return 1.0f / (1.0f + exponential(smaller(all(0) - x, all(87.0f)))); }
