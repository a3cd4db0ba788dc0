// Products of blocks of bfloat16 numbers, summed in float32: on AMX tiles where the processor has
// them, else on AVX512-BF16.
//
// A product's left side lies row by row. Its right side lies in tiles of 32 x 16, in which two
// rows that follow each other alternate: the layout that both instruction sets read.

#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "numbers.h"
#include "rows.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int TILE = 16;        // rows or columns of a tile
constexpr int TILE_SIZE = 512;  // numbers of a tile of a right side

#if defined(__AMX_BF16__)

struct Config {
    uint8_t palette = 0, start = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
};

// The kernel's tiles for as long as this lives; whoever had configured others finds them again.
struct Tiles {
    Tiles() {
        _tile_storeconfig(&before);
        Config own;
        own.palette = 1;
        for (int i = 0; i < 8; ++i) own.columns[i] = 64, own.rows[i] = TILE;
        _tile_loadconfig(&own);
    }
    ~Tiles() {
        if (before.palette != 0) _tile_loadconfig(&before); else _tile_release();
    }
    alignas(64) Config before;
};

inline bool allowed() {
    constexpr int ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}

// out [32 x 32] (+)= the sum over steps of left [32 x 32] by right [32 x 32].
inline void product(float* out, int64_t out_row, const bf16* left, int64_t left_row,
                    int64_t left_step, const bf16* right, int64_t right_tile, int64_t right_step,
                    int64_t steps, bool add) {
    const int64_t row = out_row * 4, half = TILE * out_row;
    if (add) {
        _tile_loadd(0, out, row);
        _tile_loadd(1, out + TILE, row);
        _tile_loadd(2, out + half, row);
        _tile_loadd(3, out + half + TILE, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; ++s) {
        const bf16* a = left + s * left_step;
        const bf16* b = right + s * right_step;
        _tile_loadd(4, a, left_row * 2);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + right_tile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE * left_row, left_row * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, row);
    _tile_stored(1, out + TILE, row);
    _tile_stored(2, out + half, row);
    _tile_stored(3, out + half + TILE, row);
}

#else

struct Tiles {};

inline bool allowed() { return true; }

inline void product(float* out, int64_t out_row, const bf16* left, int64_t left_row,
                    int64_t left_step, const bf16* right, int64_t right_tile, int64_t right_step,
                    int64_t steps, bool add) {
    constexpr int ROWS = 8;  // with two columns of numbers: 16 sums in registers
    for (int first = 0; first < SIDE; first += ROWS) {
        __m512 sums[ROWS][2];
        for (int i = 0; i < ROWS; ++i) {
            float* to = out + (first + i) * out_row;
            sums[i][0] = add ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
            sums[i][1] = add ? _mm512_loadu_ps(to + TILE) : _mm512_setzero_ps();
        }
        for (int64_t s = 0; s < steps; ++s) {
            const bf16* a = left + s * left_step + first * left_row;
            const bf16* b = right + s * right_step;
            for (int pair = 0; pair < TILE; ++pair) {
                const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + pair * 32);
                const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + right_tile + pair * 32);
                for (int i = 0; i < ROWS; ++i) {
                    int32_t two;
                    std::memcpy(&two, a + i * left_row + 2 * pair, 4);
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, b0);
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, b1);
                }
            }
        }
        for (int i = 0; i < ROWS; ++i) {
            float* to = out + (first + i) * out_row;
            _mm512_storeu_ps(to, sums[i][0]);
            _mm512_storeu_ps(to + TILE, sums[i][1]);
        }
    }
}

#endif
