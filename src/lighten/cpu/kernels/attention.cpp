// Causal attention of processors with bfloat16 arithmetic, without a score that outlives its tile.
//
// Rows of queries and keys are cut into blocks of 32. The forward pass keeps the logarithm of each
// query's sum of exponentials; the backward pass forms scores again from it. Products run on AMX
// tiles where the processor has them, else on AVX512-BF16; sums are float32 throughout, what is
// multiplied is rounded to bfloat16, as PyTorch's products of that format do.
//
// Dimensions: D features of a head, Dp the same rounded up to 32; L tokens of a row, Lp up to 32.
// A product's left side lies row by row. Its right side lies in tiles of 32 x 16, in which two
// rows that follow each other alternate: the layout that both instruction sets read.
//
// Source: FlashAttention-2, arXiv 2307.08691, section 3.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include <immintrin.h>

#include "numbers.h"
#include "threads.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int SIDE = 32;         // of a block of queries or keys
constexpr int TILE = 16;         // rows or columns of a tile
constexpr int TILE_SIZE = 512;   // numbers of a tile of a right side
constexpr int64_t AT_ONCE = 4;   // blocks of keys whose scores the first cache holds
constexpr int64_t HEADS_AT_ONCE = 4;

int64_t up(int64_t n) { return (n + SIDE - 1) / SIDE * SIDE; }

template <class T>
struct Buffer {
    explicit Buffer(int64_t size)
        : data(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64))) {
        if (data == nullptr) throw std::bad_alloc();
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(data); }
    operator T*() const { return data; }
    T* data;
};

// Products of blocks

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

bool allowed() {
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

bool allowed() { return true; }

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

// Two rows in turn, as a right side wants them.
inline __m512i paired(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// What is read and where it lies

struct View {
    void* data;
    int64_t batch, head, token;  // strides, in numbers

    bf16* at(int64_t b, int64_t h, int64_t t) const {
        return static_cast<bf16*>(data) + b * batch + h * head + t * token;
    }
};

struct Row {
    int64_t batch, start, length, before;  // `before`: tokens of the rows above it
};

struct Job {
    View q, k, v, out, grad, grad_q, grad_k, grad_v;
    float* sums;  // [heads, tokens]: logarithms of each query's sum of exponentials
    const Row* rows;
    int64_t row_count, tokens, heads, key_heads, D;
    float scale;
    int64_t threads;
};

// [count x D] of a view, with zeros up to [rows x Dp].
void copied(bf16* to, const bf16* from, int64_t stride, int64_t count, int64_t rows, int64_t D,
            int64_t Dp) {
    for (int64_t i = 0; i < rows; ++i) {
        bf16* row = to + i * Dp;
        const int64_t have = i < count ? D : 0;
        if (have) std::memcpy(row, from + i * stride, have * sizeof(bf16));
        if (have < Dp) std::memset(row + have, 0, (Dp - have) * sizeof(bf16));
    }
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
void packed_across(bf16* to, const bf16* from, int64_t stride, int64_t rows, int64_t Dp) {
    __m512i r[TILE];
    for (int64_t j = 0; j < rows; j += TILE)
        for (int64_t d = 0; d < Dp; d += 32, to += TILE_SIZE) {
            turned_tile(r, from + j * stride + d, stride * 2);
            for (int i = 0; i < TILE; ++i) _mm512_storeu_si512(to + i * 32, r[i]);
        }
}

// [rows x Dp] as a right side of rows x Dp: tile (k, n) holds rows 32 k.. and features 16 n...
void packed_along(bf16* to, const bf16* from, int64_t stride, int64_t rows, int64_t Dp) {
    for (int64_t k = 0; k < rows / 32; ++k)
        for (int64_t n = 0; n < Dp / TILE; ++n)
            for (int pair = 0; pair < TILE; ++pair, to += 32) {
                const bf16* even = from + (k * 32 + 2 * pair) * stride + n * TILE;
                _mm512_storeu_si512(
                    to, paired(_mm256_loadu_si256((const __m256i*)even),
                               _mm256_loadu_si256((const __m256i*)(even + stride))));
            }
}

// [rows x Dp] turned: [Dp x rows], a left side.
void turned(bf16* to, const bf16* from, int64_t rows, int64_t Dp) {
    __m512i r[TILE];
    for (int64_t i = 0; i < rows; i += TILE)
        for (int64_t d = 0; d < Dp; d += 32) {
            turned_tile(r, from + i * Dp + d, Dp * 2);
            for (int64_t pair = 0; pair < TILE; ++pair) {
                bf16* row = to + (d + 2 * pair) * rows + i;
                _mm256_storeu_si256((__m256i*)row, _mm512_cvtepi32_epi16(r[pair]));
                _mm256_storeu_si256((__m256i*)(row + rows),
                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[pair], 16)));
            }
        }
}

// Rows of Dp numbers into a view.
void written(const View& view, const Row& row, int64_t head, const float* from, int64_t D,
             int64_t Dp) {
    for (int64_t i = 0; i < row.length; ++i) {
        bf16* to = view.at(row.batch, head, row.start + i);
        for (int64_t d = 0; d < D; d += TILE)
            write(to + d, up_to(D - d), _mm512_loadu_ps(from + i * Dp + d));
    }
}

// [Dp x 32] numbers, turned, each row times its factor, into a view.
void written_turned(const View& view, int64_t batch, int64_t head, int64_t token, int64_t count,
                    const float* from, const float* factors, int64_t D) {
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
    Block(const View& view, int64_t batch, int64_t head, int64_t token, int64_t count, int64_t D,
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

// Which of 16 queries see a key of the block on the diagonal.
inline __mmask16 seeing(int64_t key, int64_t half) {
    const int64_t hidden = std::min<int64_t>(TILE, std::max<int64_t>(0, key - half * TILE));
    return static_cast<__mmask16>(0xFFFFu << hidden);
}

// Scores stand on their side, keys by queries: sixteen queries share a register, so that sums over
// keys need no sum within one. What only the block on the diagonal needs, the mask, costs others
// nothing.

// The largest of each query's scaled scores, over the keys [first, last).
template <bool DIAGONAL>
inline void highest(__m512 most[2], const float* scores, int64_t first, int64_t last,
                    __m512 scale) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t key = first; key < last; ++key)
        for (int half = 0; half < 2; ++half) {
            const __m512 score = _mm512_loadu_ps(scores + key * SIDE + half * TILE);
            const __mmask16 real = DIAGONAL ? seeing(key - first, half) : __mmask16(0xFFFF);
            most[half] = _mm512_max_ps(most[half], _mm512_mask_mul_ps(none, real, score, scale));
        }
}

// Exponentials of scores, as a right side; their sums are added to the totals.
template <bool DIAGONAL>
inline void weighed(bf16* weights, __m512 totals[2], const float* scores, int64_t first,
                    int64_t last, __m512 scale, const __m512 most[2]) {
    for (int64_t key = first; key < last; key += 2) {
        bf16* to = weights + key / SIDE * SIDE * SIDE + key % SIDE / 2 * 32;
        for (int half = 0; half < 2; ++half) {
            __m512 weight[2];
            for (int odd = 0; odd < 2; ++odd) {
                const __m512 score = _mm512_loadu_ps(scores + (key + odd) * SIDE + half * TILE);
                weight[odd] = exponential(_mm512_fmsub_ps(score, scale, most[half]));
                if (DIAGONAL)
                    weight[odd] = _mm512_maskz_mov_ps(seeing(key + odd - first, half), weight[odd]);
            }
            totals[half] = _mm512_add_ps(totals[half], _mm512_add_ps(weight[0], weight[1]));
            _mm512_storeu_si512(to + half * TILE_SIZE,
                                paired(rounded(weight[0]), rounded(weight[1])));
        }
    }
}

void forward(const Job& job, const Row& row, int64_t key_head) {
    const int64_t D = job.D, Dp = up(D), L = row.length, Lp = up(L), block = SIDE * Dp;
    const int64_t group = job.heads / job.key_heads;
    const __m512 scale = _mm512_set1_ps(job.scale);
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    Buffer<bf16> keys(Lp * Dp), values(Lp * Dp), values_turned(Lp * Dp);
    Buffer<bf16> filled(block), queries_across(block), weights(Lp * SIDE);
    Buffer<float> scores(Lp * SIDE), found(block);
    copied(keys, job.k.at(row.batch, key_head, row.start), job.k.token, L, Lp, D, Dp);
    copied(values, job.v.at(row.batch, key_head, row.start), job.v.token, L, Lp, D, Dp);
    turned(values_turned, values, Lp, Dp);
    for (int64_t first = 0; first < L; first += SIDE)
        for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
            const int64_t count = std::min<int64_t>(SIDE, L - first), width = first + SIDE;
            const int64_t at = row.start + first;
            const Block queries(job.q, row.batch, head, at, count, D, Dp, filled);
            packed_across(queries_across, queries.data, queries.stride, SIDE, Dp);
            for (int64_t key = 0; key < width; key += SIDE)
                product(scores + key * SIDE, SIDE, keys + key * Dp, Dp, 32, queries_across,
                        TILE * Dp, TILE_SIZE, Dp / 32, false);
            __m512 most[2] = {none, none}, sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            highest<false>(most, scores, 0, first, scale);
            highest<true>(most, scores, first, width, scale);
            weighed<false>(weights, sums, scores, 0, first, scale, most);
            weighed<true>(weights, sums, scores, first, width, scale, most);
            alignas(64) float tops[SIDE], totals[SIDE], factors[SIDE];
            for (int half = 0; half < 2; ++half) {
                _mm512_store_ps(tops + half * TILE, most[half]);
                _mm512_store_ps(totals + half * TILE, sums[half]);
            }
            for (int64_t i = 0; i < count; ++i) {
                factors[i] = 1.0f / totals[i];
                job.sums[head * job.tokens + row.before + first + i] = tops[i] + std::log(totals[i]);
            }
            for (int64_t d = 0; d < Dp; d += SIDE)
                product(found + d * SIDE, SIDE, values_turned + d * Lp, Lp, 32, weights, TILE_SIZE,
                        2 * TILE_SIZE, width / SIDE, false);
            written_turned(job.out, row.batch, head, at, count, found, factors, D);
        }
}

// A block's weights, and their slopes: of the scores, row by row and as a right side.
template <bool DIAGONAL>
inline void steepened(bf16* weights, bf16* slopes, bf16* slopes_along, const float* scores,
                      const float* ahead, __m512 scale, const float* sums, const float* along) {
    for (int half = 0; half < 2; ++half) {
        const __m512 own_sums = _mm512_load_ps(sums + half * TILE);
        const __m512 own_along = _mm512_load_ps(along + half * TILE);
        for (int64_t key = 0; key < SIDE; key += 2) {
            __m256i slope[2];
            for (int odd = 0; odd < 2; ++odd) {
                const int64_t place = (key + odd) * SIDE + half * TILE;
                __m512 weight = exponential(
                    _mm512_fmsub_ps(_mm512_loadu_ps(scores + place), scale, own_sums));
                if (DIAGONAL) weight = _mm512_maskz_mov_ps(seeing(key + odd, half), weight);
                const __m512 steep =
                    _mm512_mul_ps(_mm512_mul_ps(weight, scale),
                                  _mm512_sub_ps(_mm512_loadu_ps(ahead + place), own_along));
                slope[odd] = rounded(steep);
                _mm256_storeu_si256((__m256i*)(weights + place), rounded(weight));
                _mm256_storeu_si256((__m256i*)(slopes + place), slope[odd]);
            }
            _mm512_storeu_si512(slopes_along + half * TILE_SIZE + key / 2 * 32,
                                paired(slope[0], slope[1]));
        }
    }
}

void backward(const Job& job, const Row& row, int64_t key_head) {
    const int64_t D = job.D, Dp = up(D), L = row.length, Lp = up(L), block = SIDE * Dp;
    const int64_t group = job.heads / job.key_heads, square = SIDE * SIDE;
    // Heads that share keys share their gradients: several at once read and write those once.
    const int64_t most = std::min(group, HEADS_AT_ONCE), of_head = AT_ONCE * square;
    const __m512 scale = _mm512_set1_ps(job.scale);
    Buffer<bf16> keys(Lp * Dp), values(Lp * Dp), keys_turned(Lp * Dp);
    Buffer<float> grad_keys(Lp * Dp), grad_values(Lp * Dp), grad_queries(block);
    Buffer<bf16> filled(3 * block), queries_across(most * block), grads_across(most * block);
    Buffer<bf16> queries_along(most * block), grads_along(most * block);
    Buffer<bf16> weights(most * of_head), slopes(most * of_head), slopes_along(most * Lp * SIDE);
    Buffer<float> scores(of_head), ahead(of_head), sums(most * SIDE), along(most * SIDE);
    alignas(64) float ones[SIDE];
    std::fill_n(ones, SIDE, 1.0f);
    copied(keys, job.k.at(row.batch, key_head, row.start), job.k.token, L, Lp, D, Dp);
    copied(values, job.v.at(row.batch, key_head, row.start), job.v.token, L, Lp, D, Dp);
    turned(keys_turned, keys, Lp, Dp);
    std::memset(grad_keys, 0, Lp * Dp * sizeof(float));
    std::memset(grad_values, 0, Lp * Dp * sizeof(float));
    for (int64_t first = 0; first < L; first += SIDE)
        for (int64_t done = 0; done < group; done += most) {
            const int64_t count = std::min<int64_t>(SIDE, L - first), blocks = first / SIDE + 1;
            const int64_t at = row.start + first, head = key_head * group + done;
            const int64_t heads = std::min(most, group - done);
            for (int64_t h = 0; h < heads; ++h) {
                const Block queries(job.q, row.batch, head + h, at, count, D, Dp, filled);
                const Block grads(job.grad, row.batch, head + h, at, count, D, Dp, filled + block);
                const Block outs(job.out, row.batch, head + h, at, count, D, Dp,
                                 filled + 2 * block);
                packed_across(queries_across + h * block, queries.data, queries.stride, SIDE, Dp);
                packed_along(queries_along + h * block, queries.data, queries.stride, SIDE, Dp);
                packed_across(grads_across + h * block, grads.data, grads.stride, SIDE, Dp);
                packed_along(grads_along + h * block, grads.data, grads.stride, SIDE, Dp);
                const float* known = job.sums + (head + h) * job.tokens + row.before + first;
                for (int64_t i = 0; i < SIDE; ++i) {
                    __m512 sum = _mm512_setzero_ps();
                    for (int64_t d = 0; d < Dp; d += TILE)
                        sum = _mm512_fmadd_ps(read(grads.data + i * grads.stride + d, 0xFFFF),
                                              read(outs.data + i * outs.stride + d, 0xFFFF), sum);
                    along[h * SIDE + i] = _mm512_reduce_add_ps(sum);
                    // A query that is none weighs nothing.
                    sums[h * SIDE + i] =
                        i < count ? known[i] : std::numeric_limits<float>::infinity();
                }
            }
            for (int64_t begin = 0; begin < blocks; begin += AT_ONCE) {
                const int64_t end = std::min(blocks, begin + AT_ONCE);
                for (int64_t h = 0; h < heads; ++h) {
                    for (int64_t b = begin; b < end; ++b) {
                        product(scores + (b - begin) * square, SIDE, keys + b * block, Dp, 32,
                                queries_across + h * block, TILE * Dp, TILE_SIZE, Dp / 32, false);
                        product(ahead + (b - begin) * square, SIDE, values + b * block, Dp, 32,
                                grads_across + h * block, TILE * Dp, TILE_SIZE, Dp / 32, false);
                    }
                    for (int64_t b = begin; b < end; ++b) {
                        const int64_t from = (b - begin) * square, to = h * of_head + from;
                        (b + 1 == blocks ? steepened<true> : steepened<false>)(
                            weights + to, slopes + to, slopes_along + h * Lp * SIDE + b * square,
                            scores + from, ahead + from, scale, sums + h * SIDE, along + h * SIDE);
                    }
                }
                for (int64_t b = begin; b < end; ++b)
                    for (int64_t n = 0; n < Dp / TILE; n += 2) {
                        const int64_t to = b * block + n * TILE, from = (b - begin) * square;
                        product(grad_values + to, Dp, weights + from, SIDE, of_head,
                                grads_along + n * TILE_SIZE, TILE_SIZE, block, heads, true);
                        product(grad_keys + to, Dp, slopes + from, SIDE, of_head,
                                queries_along + n * TILE_SIZE, TILE_SIZE, block, heads, true);
                    }
            }
            for (int64_t h = 0; h < heads; ++h) {
                for (int64_t d = 0; d < Dp; d += SIDE)
                    product(grad_queries + d * SIDE, SIDE, keys_turned + d * Lp, Lp, 32,
                            slopes_along + h * Lp * SIDE, TILE_SIZE, 2 * TILE_SIZE, blocks, false);
                written_turned(job.grad_q, row.batch, head + h, at, count, grad_queries, ones, D);
            }
        }
    written(job.grad_k, row, key_head, grad_keys, D, Dp);
    written(job.grad_v, row, key_head, grad_values, D, Dp);
}

// Every row and key head by itself, the threads taking turns; 0, or 1 where memory ran out.
template <class Each>
int in_threads(const Job& job, Each each) {
    const int64_t all = job.row_count * job.key_heads;
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
    in_parallel(std::min(job.threads, all), [&] {
        [[maybe_unused]] Tiles tiles;
        try {
            for (int64_t i = next++; i < all; i = next++)
                each(job, job.rows[i / job.key_heads], i % job.key_heads);
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    });
    return failed;
}

}  // namespace

extern "C" {

// Whether this process may use what the kernel was compiled for.
int lighten_allowed() { return allowed(); }
int lighten_attention(const void* job) { return in_threads(*static_cast<const Job*>(job), forward); }
int lighten_attention_backward(const void* job) {
    return in_threads(*static_cast<const Job*>(job), backward);
}
}
