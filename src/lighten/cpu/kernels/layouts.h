// How rows of queries, keys and values are laid out for products.
//
// Dimensions: D features of a head, Dp the same rounded up to 32.

#pragma once

#include <algorithm>
#include <cstdint>

#include <immintrin.h>

#include "numbers.h"
#include "products.h"
#include "rows.h"

// Two rows in turn, as a right side wants them.
inline __m512i paired(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Sixteen registers of sixteen numbers of 32 bits, turned: the first then holds every first one.
inline void turn(__m512i r[TILE]) {
    __m512i t[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i += 4)
        for (int half = 0; half < 2; ++half) {
            r[i + 2 * half] = _mm512_unpacklo_epi64(t[i + half], t[i + half + 2]);
            r[i + 2 * half + 1] = _mm512_unpackhi_epi64(t[i + half], t[i + half + 2]);
        }
    // Now every fourth register has numbers of the same four columns, one in each quarter.
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        const __m512i even = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD);
        const __m512i even_below = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        const __m512i odd_below = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
        r[i] = _mm512_shuffle_i32x4(even, even_below, 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(even, even_below, 0xDD);
        r[12 + i] = _mm512_shuffle_i32x4(odd, odd_below, 0xDD);
    }
}

// Sixteen rows of 64 bytes, turned.
inline void turned_tile(__m512i r[TILE], const void* from, int64_t row_bytes) {
#pragma GCC unroll 16
    for (int i = 0; i < TILE; ++i)
        r[i] = _mm512_loadu_si512(static_cast<const char*>(from) + i * row_bytes);
    turn(r);
}

// [rows x Dp] as a right side of Dp x rows: tile (j, d) holds rows 16 j.. and features 32 d...
inline void packed_across(bf16* to, const bf16* from, int64_t stride, int64_t rows, int64_t Dp) {
    __m512i r[TILE];
    for (int64_t j = 0; j < rows; j += TILE)
        for (int64_t d = 0; d < Dp; d += 32, to += TILE_SIZE) {
            turned_tile(r, from + j * stride + d, stride * 2);
            for (int i = 0; i < TILE; ++i) _mm512_storeu_si512(to + i * 32, r[i]);
        }
}

// [rows x Dp] as a right side of rows x Dp: tile (k, n) holds rows 32 k.. and features 16 n...
inline void packed_along(bf16* to, const bf16* from, int64_t stride, int64_t rows, int64_t Dp) {
    for (int64_t k = 0; k < rows / 32; ++k)
        for (int64_t n = 0; n < Dp / TILE; ++n)
            for (int pair = 0; pair < TILE; ++pair, to += 32) {
                const bf16* even = from + (k * 32 + 2 * pair) * stride + n * TILE;
                _mm512_storeu_si512(
                    to, paired(_mm256_loadu_si256((const __m256i*)even),
                               _mm256_loadu_si256((const __m256i*)(even + stride))));
            }
}

// A block of 32 x Dp turned: [Dp x 32], a left side.
inline void turned(bf16* to, const bf16* from, int64_t stride, int64_t Dp) {
    __m512i r[TILE];
    for (int64_t i = 0; i < SIDE; i += TILE)
        for (int64_t d = 0; d < Dp; d += 32) {
            turned_tile(r, from + i * stride + d, stride * 2);
            for (int64_t pair = 0; pair < TILE; ++pair) {
                bf16* row = to + (d + 2 * pair) * SIDE + i;
                _mm256_storeu_si256((__m256i*)row, _mm512_cvtepi32_epi16(r[pair]));
                _mm256_storeu_si256((__m256i*)(row + SIDE),
                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[pair], 16)));
            }
        }
}

// Rows of Dp numbers into a view.
inline void written(const View<bf16>& view, const Row& row, int64_t head, const float* from, int64_t D,
                    int64_t Dp) {
    for (int64_t i = 0; i < row.length; ++i) {
        bf16* to = view.at(row.batch, head, row.start + i);
        for (int64_t d = 0; d < D; d += TILE)
            write(to + d, up_to(D - d), _mm512_loadu_ps(from + i * Dp + d));
    }
}

// [Dp x 32] numbers, turned, each row times its factor, into a view.
inline void written_turned(const View<bf16>& view, int64_t batch, int64_t head, int64_t token,
                           int64_t count, const float* from, const float* factors, int64_t D) {
    __m512i r[TILE];
    for (int64_t first = 0; first < count; first += TILE)
        for (int64_t d = 0; d < D; d += TILE) {
            turned_tile(r, from + d * SIDE + first, SIDE * 4);
            for (int64_t i = 0; i < std::min<int64_t>(TILE, count - first); ++i)
                write(view.at(batch, head, token + first + i) + d, up_to(D - d),
                      _mm512_mul_ps(_mm512_castsi512_ps(r[i]), _mm512_set1_ps(factors[first + i])));
        }
}

// A block's rows: in the view itself, or, where they have to be filled up, in a buffer.
struct Block {
    Block(const View<bf16>& view, int64_t batch, int64_t head, int64_t token, int64_t count, int64_t D,
          int64_t Dp, bf16* buffer)
        : data(view.at(batch, head, token)), stride(view.token) {
        if (count == SIDE && D == Dp) return;
        copied(buffer, data, stride, count, SIDE, D, Dp);
        data = buffer;
        stride = Dp;
    }
    const bf16* data;
    int64_t stride;
};
