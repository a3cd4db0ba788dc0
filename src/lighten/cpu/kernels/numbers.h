// bfloat16 numbers, 16 at a time as float32.

#pragma once

#include <cstdint>

#include <immintrin.h>

using bf16 = uint16_t;

inline __m512 widened(__m256i words) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Those of sixteen numbers that are among the next so many.
inline __mmask16 up_to(int64_t left) { return left >= 16 ? 0xFFFF : (1u << left) - 1; }

inline __m512 read(const bf16* from, __mmask16 real) {
    return widened(_mm256_maskz_loadu_epi16(real, from));
}

inline void write(bf16* to, __mmask16 real, __m512 x) {
    _mm256_mask_storeu_epi16(to, real, rounded(x));
}

// e^x, at least the smallest normal number: to round to less takes the processor a hundred times
// as long. NaN stays NaN: of a maximum the second is taken where one of the two is.
inline __m512 exponential(__m512 x) {
    const __m512 t = _mm512_max_ps(_mm512_set1_ps(-126.0f),
                                   _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.54035304e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.33335581e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}
