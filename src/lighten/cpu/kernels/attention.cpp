// Causal attention of processors with bfloat16 arithmetic, without a score that outlives its tile.
//
// Rows of queries and keys are cut into blocks of 32. The forward pass keeps the logarithm of each
// query's sum of exponentials; the backward pass forms scores again from it. Long rows are cut into
// parts for several threads, which may be more than there are key heads. Sums are float32
// throughout, what is multiplied is rounded to bfloat16, as PyTorch's products of that format do.
//
// Dimensions: D features of a head, Dp the same rounded up to 32; L tokens of a row.
//
// Source: FlashAttention-2, arXiv 2307.08691, section 3.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <immintrin.h>

#include "layouts.h"
#include "numbers.h"
#include "products.h"
#include "rows.h"

namespace {

constexpr int64_t CHUNK = 256;  // keys of the forward pass whose scores the second cache holds
constexpr int64_t AT_ONCE = 4;  // blocks of keys of the backward pass that the first cache holds
constexpr int64_t HEADS_AT_ONCE = 4;

using HalfJob = Job<bf16>;

// Which of 16 queries see a key: none sees one that comes after it, nor one that is `window` or
// more tokens before it. The key's place is counted from the block's first query.
inline __mmask16 seeing(int64_t key, int64_t half, int64_t window) {
    const int64_t before = std::clamp<int64_t>(key - half * TILE, 0, TILE);
    const int64_t after = std::clamp<int64_t>(key + window - half * TILE, 0, TILE);
    return static_cast<__mmask16>((0xFFFFu << before) & ((1u << after) - 1));
}

// Scores stand on their side, keys by queries: sixteen queries share a register, so that sums over
// keys need no sum within one. What only blocks on an edge need, the mask, costs others nothing.

// Keys whose scores lie one after another.
struct Keys {
    int64_t from, count;  // the place of the first, counted from the block's first query
    int64_t window;

    // All queries see the keys from `whole` on and before `diagonal`; both are even.
    int64_t whole() const {
        const int64_t hidden = std::clamp<int64_t>(SIDE - window - from + 1, 0, count) / 2 * 2;
        return std::min(hidden, diagonal());
    }
    int64_t diagonal() const { return std::clamp<int64_t>(-from, 0, count); }
};

// The largest of each query's scaled scores, over the keys [first, last).
template <bool EDGE>
inline void highest(__m512 most[2], const float* scores, const Keys& keys, int64_t first,
                    int64_t last, __m512 scale) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t key = first; key < last; ++key)
        for (int half = 0; half < 2; ++half) {
            const __m512 score = _mm512_loadu_ps(scores + key * SIDE + half * TILE);
            const __mmask16 real =
                EDGE ? seeing(keys.from + key, half, keys.window) : __mmask16(0xFFFF);
            most[half] = _mm512_max_ps(most[half], _mm512_mask_mul_ps(none, real, score, scale));
        }
}

// Exponentials of scores, as a right side; their sums are added to the totals.
template <bool EDGE>
inline void weighed(bf16* weights, __m512 totals[2], const float* scores, const Keys& keys,
                    int64_t first, int64_t last, __m512 scale, const __m512 most[2]) {
    for (int64_t key = first; key < last; key += 2) {
        bf16* to = weights + key / SIDE * SIDE * SIDE + key % SIDE / 2 * 32;
        for (int half = 0; half < 2; ++half) {
            __m512 weight[2];
            for (int odd = 0; odd < 2; ++odd) {
                const __m512 score = _mm512_loadu_ps(scores + (key + odd) * SIDE + half * TILE);
                weight[odd] = exponential(_mm512_fmsub_ps(score, scale, most[half]));
                if (EDGE)
                    weight[odd] = _mm512_maskz_mov_ps(
                        seeing(keys.from + key + odd, half, keys.window), weight[odd]);
            }
            totals[half] = _mm512_add_ps(totals[half], _mm512_add_ps(weight[0], weight[1]));
            _mm512_storeu_si512(to + half * TILE_SIZE,
                                paired(rounded(weight[0]), rounded(weight[1])));
        }
    }
}

// What 32 queries of a head have gathered from the keys so far: the online softmax of the source.
struct Gathered {
    explicit Gathered(int64_t Dp) : Dp(Dp), values(Dp * SIDE) {}

    void reset() {
        std::fill_n(most, SIDE, -std::numeric_limits<float>::infinity());
        std::fill_n(totals, SIDE, 0.0f);
        std::memset(values, 0, Dp * SIDE * sizeof(float));
    }

    // More keys, by their scores.
    void add(const float* scores, const Keys& keys, __m512 scale, const bf16* values_turned,
             bf16* weights) {
        const int64_t whole = keys.whole(), diagonal = keys.diagonal(), count = keys.count;
        __m512 now[2], total[2];
        for (int half = 0; half < 2; ++half) now[half] = _mm512_load_ps(most + half * TILE);
        highest<true>(now, scores, keys, 0, whole, scale);
        highest<false>(now, scores, keys, whole, diagonal, scale);
        highest<true>(now, scores, keys, diagonal, count, scale);
        for (int half = 0; half < 2; ++half) {
            const __m512 before = _mm512_load_ps(most + half * TILE);
            total[half] = _mm512_load_ps(totals + half * TILE);
            if (_mm512_cmp_ps_mask(before, now[half], _CMP_NEQ_UQ))
                total[half] = lessened(half, total[half], _mm512_sub_ps(before, now[half]));
        }
        weighed<true>(weights, total, scores, keys, 0, whole, scale, now);
        weighed<false>(weights, total, scores, keys, whole, diagonal, scale, now);
        weighed<true>(weights, total, scores, keys, diagonal, count, scale, now);
        for (int half = 0; half < 2; ++half) {
            _mm512_store_ps(most + half * TILE, now[half]);
            _mm512_store_ps(totals + half * TILE, total[half]);
        }
        for (int64_t d = 0; d < Dp; d += SIDE)
            product(values + d * SIDE, SIDE, values_turned + d * SIDE, SIDE, SIDE * Dp, weights,
                    TILE_SIZE, 2 * TILE_SIZE, count / SIDE, true);
    }

    // What there is, times e^by; the total of it.
    __m512 lessened(int half, __m512 total, __m512 by) {
        const __m512 factor = exponential(by);
        for (int64_t d = 0; d < Dp; ++d) {
            float* to = values + d * SIDE + half * TILE;
            _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), factor));
        }
        return _mm512_mul_ps(total, factor);
    }

    int64_t Dp;
    alignas(64) float most[SIDE], totals[SIDE];
    Buffer<float> values;  // [Dp x 32]
};

void forward(const HalfJob& job, const Row& row, int64_t key_head, Part part) {
    const int64_t D = job.D, Dp = up(D), L = row.length, block = SIDE * Dp;
    const int64_t group = job.heads / job.key_heads, most_heads = std::min(group, HEADS_AT_ONCE);
    const int64_t seen = up(part.last);
    const __m512 scale = _mm512_set1_ps(job.scale);
    Buffer<bf16> keys(seen * Dp), values_turned(seen * Dp), filled(block);
    Buffer<bf16> queries_across(most_heads * block), weights(CHUNK * SIDE);
    Buffer<float> scores(CHUNK * SIDE);
    Gathered gathered[HEADS_AT_ONCE] = {Gathered(Dp), Gathered(Dp), Gathered(Dp), Gathered(Dp)};
    for (int64_t key = 0; key < seen; key += SIDE) {
        const int64_t count = std::min<int64_t>(SIDE, L - key), at = row.start + key;
        copied(keys + key * Dp, job.k.at(row.batch, key_head, at), job.k.token, count, SIDE, D, Dp);
        const Block values(job.v, row.batch, key_head, at, count, D, Dp, filled);
        turned(values_turned + key * Dp, values.data, values.stride, Dp);
    }
    for (int64_t first = part.first; first < part.last; first += SIDE)
        for (int64_t done = 0; done < group; done += most_heads) {
            const int64_t count = std::min<int64_t>(SIDE, L - first), width = first + SIDE;
            const int64_t at = row.start + first, head = key_head * group + done;
            const int64_t heads = std::min(most_heads, group - done);
            for (int64_t h = 0; h < heads; ++h) {
                const Block queries(job.q, row.batch, head + h, at, count, D, Dp, filled);
                packed_across(queries_across + h * block, queries.data, queries.stride, SIDE, Dp);
                gathered[h].reset();
            }
            for (int64_t begin = first_seen(first, job.window); begin < width; begin += CHUNK)
                for (int64_t h = 0; h < heads; ++h) {
                    const int64_t end = std::min(width, begin + CHUNK);
                    for (int64_t key = begin; key < end; key += SIDE)
                        product(scores + (key - begin) * SIDE, SIDE, keys + key * Dp, Dp, 32,
                                queries_across + h * block, TILE * Dp, TILE_SIZE, Dp / 32, false);
                    gathered[h].add(scores, {begin - first, end - begin, job.window}, scale,
                                    values_turned + begin * Dp, weights);
                }
            for (int64_t h = 0; h < heads; ++h) {
                const Gathered& all = gathered[h];
                alignas(64) float factors[SIDE];
                for (int64_t i = 0; i < count; ++i) {
                    factors[i] = 1.0f / all.totals[i];
                    job.sums[(head + h) * job.tokens + row.before + first + i] =
                        all.most[i] + std::log(all.totals[i]);
                }
                written_turned(job.out, row.batch, head + h, at, count, all.values, factors, D);
            }
        }
}

// A block's weights and the gradients of its scores: both row by row, these as a right side too.
template <bool EDGE>
inline void derived(bf16* weights, bf16* score_grads, bf16* score_grads_along, const float* scores,
                    const float* weight_grads, const Keys& keys, __m512 scale, const float* sums,
                    const float* along) {
    for (int half = 0; half < 2; ++half) {
        const __m512 sum = _mm512_load_ps(sums + half * TILE);
        const __m512 mean = _mm512_load_ps(along + half * TILE);
        for (int64_t key = 0; key < SIDE; key += 2) {
            __m256i grad[2];
            for (int odd = 0; odd < 2; ++odd) {
                const int64_t place = (key + odd) * SIDE + half * TILE;
                __m512 weight =
                    exponential(_mm512_fmsub_ps(_mm512_loadu_ps(scores + place), scale, sum));
                if (EDGE)
                    weight = _mm512_maskz_mov_ps(seeing(keys.from + key + odd, half, keys.window),
                                                 weight);
                grad[odd] = rounded(
                    _mm512_mul_ps(_mm512_mul_ps(weight, scale),
                                  _mm512_sub_ps(_mm512_loadu_ps(weight_grads + place), mean)));
                _mm256_storeu_si256((__m256i*)(weights + place), rounded(weight));
                _mm256_storeu_si256((__m256i*)(score_grads + place), grad[odd]);
            }
            _mm512_storeu_si512(score_grads_along + half * TILE_SIZE + key / 2 * 32,
                                paired(grad[0], grad[1]));
        }
    }
}

void backward(const HalfJob& job, const Row& row, int64_t key_head, Part part, KeyGradients& grads) {
    const int64_t D = job.D, Dp = up(D), L = row.length, block = SIDE * Dp;
    const int64_t group = job.heads / job.key_heads, square = SIDE * SIDE;
    const int64_t seen = up(part.last);
    // Heads that share keys share their gradients: several at once read and write those once.
    const int64_t most = std::min(group, HEADS_AT_ONCE), of_head = AT_ONCE * square;
    const __m512 scale = _mm512_set1_ps(job.scale);
    Buffer<bf16> keys(seen * Dp), values(seen * Dp), keys_turned(seen * Dp);
    Buffer<float> grad_queries(most * block);
    Buffer<bf16> filled(3 * block), queries_across(most * block), grads_across(most * block);
    Buffer<bf16> queries_along(most * block), grads_along(most * block);
    Buffer<bf16> weights(most * of_head), score_grads(most * of_head);
    Buffer<bf16> score_grads_along(of_head);
    Buffer<float> scores(of_head), weight_grads(of_head), sums(most * SIDE), along(most * SIDE);
    alignas(64) float ones[SIDE];
    std::fill_n(ones, SIDE, 1.0f);
    copied(keys, job.k.at(row.batch, key_head, row.start), job.k.token, L, seen, D, Dp);
    copied(values, job.v.at(row.batch, key_head, row.start), job.v.token, L, seen, D, Dp);
    for (int64_t key = 0; key < seen; key += SIDE)
        turned(keys_turned + key * Dp, keys + key * Dp, Dp, Dp);
    for (int64_t first = part.first; first < part.last; first += SIDE)
        for (int64_t done = 0; done < group; done += most) {
            const int64_t count = std::min<int64_t>(SIDE, L - first), blocks = first / SIDE + 1;
            const int64_t at = row.start + first, head = key_head * group + done;
            const int64_t heads = std::min(most, group - done);
            const int64_t first_block = first_seen(first, job.window) / SIDE;
            for (int64_t h = 0; h < heads; ++h) {
                const Block queries(job.q, row.batch, head + h, at, count, D, Dp, filled);
                const Block upstream(job.grad, row.batch, head + h, at, count, D, Dp,
                                     filled + block);
                const Block outs(job.out, row.batch, head + h, at, count, D, Dp,
                                 filled + 2 * block);
                packed_across(queries_across + h * block, queries.data, queries.stride, SIDE, Dp);
                packed_along(queries_along + h * block, queries.data, queries.stride, SIDE, Dp);
                packed_across(grads_across + h * block, upstream.data, upstream.stride, SIDE, Dp);
                packed_along(grads_along + h * block, upstream.data, upstream.stride, SIDE, Dp);
                const float* known = job.sums + (head + h) * job.tokens + row.before + first;
                for (int64_t i = 0; i < SIDE; ++i) {
                    __m512 sum = _mm512_setzero_ps();
                    for (int64_t d = 0; d < Dp; d += TILE)
                        sum = _mm512_fmadd_ps(read(upstream.data + i * upstream.stride + d, 0xFFFF),
                                              read(outs.data + i * outs.stride + d, 0xFFFF), sum);
                    along[h * SIDE + i] = _mm512_reduce_add_ps(sum);
                    // A query that is none weighs nothing.
                    sums[h * SIDE + i] =
                        i < count ? known[i] : std::numeric_limits<float>::infinity();
                }
            }
            for (int64_t begin = first_block; begin < blocks; begin += AT_ONCE) {
                const int64_t end = std::min(blocks, begin + AT_ONCE);
                for (int64_t h = 0; h < heads; ++h) {
                    for (int64_t b = begin; b < end; ++b) {
                        product(scores + (b - begin) * square, SIDE, keys + b * block, Dp, 32,
                                queries_across + h * block, TILE * Dp, TILE_SIZE, Dp / 32, false);
                        product(weight_grads + (b - begin) * square, SIDE, values + b * block, Dp,
                                32, grads_across + h * block, TILE * Dp, TILE_SIZE, Dp / 32,
                                false);
                    }
                    for (int64_t b = begin; b < end; ++b) {
                        const int64_t from = (b - begin) * square, to = h * of_head + from;
                        const Keys of_block{b * SIDE - first, SIDE, job.window};
                        const bool edge = of_block.whole() || of_block.diagonal() < SIDE;
                        (edge ? derived<true> : derived<false>)(
                            weights + to, score_grads + to, score_grads_along + from,
                            scores + from, weight_grads + from, of_block, scale, sums + h * SIDE,
                            along + h * SIDE);
                    }
                    for (int64_t d = 0; d < Dp; d += SIDE)
                        product(grad_queries + h * block + d * SIDE, SIDE,
                                keys_turned + begin * block + d * SIDE, SIDE, block,
                                score_grads_along, TILE_SIZE, 2 * TILE_SIZE, end - begin,
                                begin > first_block);
                }
                for (int64_t b = begin; b < end; ++b)
                    for (int64_t n = 0; n < Dp / TILE; n += 2) {
                        const int64_t to = b * block + n * TILE, from = (b - begin) * square;
                        product(grads.values + to, Dp, weights + from, SIDE, of_head,
                                grads_along + n * TILE_SIZE, TILE_SIZE, block, heads, true);
                        product(grads.keys + to, Dp, score_grads + from, SIDE, of_head,
                                queries_along + n * TILE_SIZE, TILE_SIZE, block, heads, true);
                    }
            }
            for (int64_t h = 0; h < heads; ++h)
                written_turned(job.grad_q, row.batch, head + h, at, count, grad_queries + h * block,
                               ones, D);
        }
}

}  // namespace

extern "C" {

// Whether this process may use what the kernel was compiled for.
int lighten_allowed() { return allowed(); }
int lighten_attention(const void* job) {
    return forward_in_threads<Tiles>(*static_cast<const HalfJob*>(job), forward);
}
int lighten_attention_backward(const void* job) {
    return backward_in_threads<Tiles>(*static_cast<const HalfJob*>(job), backward);
}
}
