// Eight or sixteen numbers at a time as float32, stored as float32, bfloat16 or float16.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define WIDE 1
#else
#define WIDE 0
#endif

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float one(float x) { return x; }

inline float one(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline float one(f16 x) {
#if WIDE
    return _cvtsh_ss(x.bits);
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
    float found;
    if (rest < 0x0400) {  // below the normal numbers: multiples of 2^-24
        found = float(rest) * 5.9604644775390625e-8f;
        return sign ? -found : found;
    }
    const uint32_t bits = sign | ((rest << 13) + (112u << 23));
    std::memcpy(&found, &bits, 4);
    return found;
#endif
}

inline void put(float* to, float x) { *to = x; }

inline void put(bf16* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#if WIDE
using Eight = __m256;

inline Eight zero() { return _mm256_setzero_ps(); }
inline Eight all(float x) { return _mm256_set1_ps(x); }
inline Eight fused(Eight a, Eight b, Eight sum) { return _mm256_fmadd_ps(a, b, sum); }

inline Eight eight(const float* from) { return _mm256_loadu_ps(from); }

inline Eight eight(const bf16* from) {
    const __m128i words = _mm_loadu_si128((const __m128i*)from);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

inline Eight eight(const f16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}

inline void put8(float* to, Eight x) { _mm256_storeu_ps(to, x); }

inline void put8(bf16* to, Eight x) {
    alignas(32) float numbers[8];
    _mm256_store_ps(numbers, x);
    for (int i = 0; i < 8; ++i) put(to + i, numbers[i]);
}

inline float sum(Eight x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
#else
struct Eight { float of[8]; };

inline Eight all(float x) {
    Eight found;
    for (float& number : found.of) number = x;
    return found;
}

inline Eight zero() { return all(0.0f); }

inline Eight fused(Eight a, Eight b, Eight sum) {
    for (int i = 0; i < 8; ++i) sum.of[i] += a.of[i] * b.of[i];
    return sum;
}

template <class T>
inline Eight eight(const T* from) {
    Eight found;
    for (int i = 0; i < 8; ++i) found.of[i] = one(from[i]);
    return found;
}

template <class T>
inline void put8(T* to, Eight x) {
    for (int i = 0; i < 8; ++i) put(to + i, x.of[i]);
}

inline float sum(Eight x) {
    float found = 0.0f;
    for (float number : x.of) found += number;
    return found;
}
#endif

// The first `count` of eight numbers, the others zero; all of them where there are as many.
template <class T>
inline Eight eight(const T* from, int64_t count) {
    if (count >= 8) return eight(from);
    T numbers[8] = {};
    std::memcpy(numbers, from, count * sizeof(T));
    return eight(numbers);
}

template <class T>
inline void put8(T* to, Eight x, int64_t count) {
    if (count >= 8) return put8(to, x);
    T numbers[8];
    put8(numbers, x);
    std::memcpy(to, numbers, count * sizeof(T));
}

#if WIDE && defined(__AVX512F__) && defined(__AVX512DQ__)
using Sixteen = __m512;

inline Sixteen zero16() { return _mm512_setzero_ps(); }
inline Sixteen all16(float x) { return _mm512_set1_ps(x); }
inline Sixteen twice(const float* eight) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(eight)); }
inline Sixteen both(Eight low, Eight high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
inline Sixteen fused(Sixteen a, Sixteen b, Sixteen sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Sixteen sixteen(const f16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
inline Eight low_half(Sixteen x) { return _mm512_castps512_ps256(x); }
inline Eight high_half(Sixteen x) { return _mm512_extractf32x8_ps(x, 1); }
#else
struct Sixteen { Eight low, high; };

inline Sixteen zero16() { return {zero(), zero()}; }
inline Sixteen all16(float x) { return {all(x), all(x)}; }
inline Sixteen twice(const float* from) { return {eight(from), eight(from)}; }
inline Sixteen both(Eight low, Eight high) { return {low, high}; }
inline Sixteen fused(Sixteen a, Sixteen b, Sixteen sum) {
    return {fused(a.low, b.low, sum.low), fused(a.high, b.high, sum.high)};
}
inline Sixteen sixteen(const f16* from) { return {eight(from), eight(from + 8)}; }
inline Eight low_half(Sixteen x) { return x.low; }
inline Eight high_half(Sixteen x) { return x.high; }
#endif

// The first `count` of sixteen numbers, the others zero; all of them where there are as many.
template <class T>
inline Sixteen sixteen(const T* from, int64_t count) {
    return both(eight(from, count), count > 8 ? eight(from + 8, count - 8) : zero());
}

template <class T>
inline void put16(T* to, Sixteen x, int64_t count) {
    put8(to, low_half(x), count);
    if (count > 8) put8(to + 8, high_half(x), count - 8);
}
