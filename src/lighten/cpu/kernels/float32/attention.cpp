// Causal attention in float32 on any processor, without a score that outlives its block.
//
// The forward pass keeps the logarithm of each query's sum of exponentials; the backward pass forms
// scores again from it. Scores stand on their side, keys by queries: the queries of a block share
// registers, so that sums over keys need no sum within one. Of a product's two sides the left is
// read number by number, at any stride, and the right in registers; only blocks of queries and of
// the gradient above are turned for that.
//
// Dimensions: D features of a head, Dp the same rounded up to SIDE; L tokens of a row.
//
// Source: FlashAttention-2, arXiv 2307.08691, section 3.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "rows.h"
#include "vectors.h"

// Rows of Dp numbers into a view.
static void written(const View<float>& view, const Row& row, int64_t head, const float* from,
                    int64_t D, int64_t Dp) {
    for (int64_t i = 0; i < row.length; ++i)
        std::copy_n(from + i * Dp, D, view.at(row.batch, head, row.start + i));
}

namespace {

// Of a product's sums, in two columns of registers: half of the registers that there are.
constexpr int ROWS = LANES / 2;
constexpr int64_t CHUNK = 128;   // keys whose scores the first cache holds
constexpr int REGISTERS = SIDE / LANES;  // of a block's queries
constexpr float NONE = -std::numeric_limits<float>::infinity();

// Numbers by their places: those of the left side of a product.
struct Left {
    const float* data;
    int64_t row, step;
};

// out [rows x columns] (+)= left [rows x steps] · right [steps x columns]; rows are a multiple of
// ROWS, columns of 2 LANES.
inline void product(float* out, int64_t out_row, Left left, const float* right, int64_t right_row,
                    int64_t rows, int64_t columns, int64_t steps, bool add) {
    for (int64_t column = 0; column < columns; column += 2 * LANES)
        for (int64_t first = 0; first < rows; first += ROWS) {
            Numbers sums[ROWS][2];
            for (int i = 0; i < ROWS; ++i)
                for (int half = 0; half < 2; ++half)
                    sums[i][half] = add ? read(out + (first + i) * out_row + column + half * LANES)
                                        : Numbers{};
            const float* a = left.data + first * left.row;
            const float* b = right + column;
            for (int64_t s = 0; s < steps; ++s, a += left.step, b += right_row) {
                const Numbers b0 = read(b), b1 = read(b + LANES);
                for (int i = 0; i < ROWS; ++i) {
                    const Numbers x = all(a[i * left.row]);
                    sums[i][0] += x * b0;
                    sums[i][1] += x * b1;
                }
            }
            for (int i = 0; i < ROWS; ++i)
                for (int half = 0; half < 2; ++half)
                    write(out + (first + i) * out_row + column + half * LANES, sums[i][half]);
        }
}

// [SIDE x Dp] turned: [Dp x SIDE].
inline void turned(float* to, const float* from, int64_t Dp) {
    for (int64_t d = 0; d < Dp; ++d)
        for (int64_t i = 0; i < SIDE; ++i) to[d * SIDE + i] = from[i * Dp + d];
}

// [Dp x SIDE], turned, each of the first rows times its factor, into a view.
inline void written_turned(const View<float>& view, int64_t batch, int64_t head, int64_t token,
                           int64_t count, const float* from, const float* factors, int64_t D) {
    for (int64_t i = 0; i < count; ++i) {
        float* to = view.at(batch, head, token + i);
        for (int64_t d = 0; d < D; ++d) to[d] = from[d * SIDE + i] * factors[i];
    }
}

// Which queries of a block see a key. Its place is counted from the block's first query.
struct Mask {
    explicit Mask(int64_t window) : window(window) {
        for (int i = 0; i < SIDE; ++i) places[i / LANES][i % LANES] = i;
    }
    // Whether all of them do.
    bool whole(int64_t key) const { return key <= 0 && key + window > SIDE - 1; }
    Integers seeing(int64_t key, int part) const {
        const auto last = static_cast<int32_t>(std::clamp<int64_t>(key + window - 1, -1, SIDE));
        const auto first = static_cast<int32_t>(std::clamp<int64_t>(key, -1, SIDE));
        return (places[part] >= first) & (places[part] <= last);
    }
    int64_t window;
    Integers places[REGISTERS];
};

// What a block's queries have gathered from the keys so far: the online softmax of the source.
struct Gathered {
    explicit Gathered(int64_t Dp) : Dp(Dp), values(Dp * SIDE) {}

    void reset() {
        for (int part = 0; part < REGISTERS; ++part) most[part] = all(NONE), totals[part] = all(0);
        std::fill_n(values.data, Dp * SIDE, 0.0f);
    }

    // More keys, by their scores, which become their weights; the first of them is `from` behind
    // the block's first query.
    void add(float* scores, int64_t from, int64_t count, const Mask& mask, float scale,
             const float* of_keys) {
        Numbers now[REGISTERS];
        std::copy_n(most, REGISTERS, now);
        for (int64_t key = 0; key < count; ++key)
            for (int part = 0; part < REGISTERS; ++part) {
                float* place = scores + key * SIDE + part * LANES;
                Numbers score = read(place) * scale;
                if (!mask.whole(from + key))
                    score = mask.seeing(from + key, part) ? score : all(NONE);
                write(place, score);
                now[part] = larger(now[part], score);
            }
        for (int part = 0; part < REGISTERS; ++part) {
            // A query that has not seen any key yet: nothing minus nothing would be no number.
            const Numbers base = now[part] == NONE ? all(0) : now[part];
            const Numbers factor = exponential(most[part] - base);
            for (int64_t d = 0; d < Dp; ++d) {
                float* to = values + d * SIDE + part * LANES;
                write(to, read(to) * factor);
            }
            totals[part] *= factor;
            most[part] = now[part];
            Numbers total = totals[part];
            for (int64_t key = 0; key < count; ++key) {
                float* place = scores + key * SIDE + part * LANES;
                const Numbers score = read(place);
                const Numbers weight = score == NONE ? all(0) : exponential(score - base);
                write(place, weight);
                total += weight;
            }
            totals[part] = total;
        }
        product(values, SIDE, {of_keys, 1, Dp}, scores, SIDE, Dp, SIDE, count, true);
    }

    int64_t Dp;
    Numbers most[REGISTERS], totals[REGISTERS];
    Buffer<float> values;  // [Dp x SIDE]
};

void forward(const Job<float>& job, const Row& row, int64_t key_head, Part part) {
    const int64_t D = job.D, Dp = up(D), L = row.length, block = SIDE * Dp;
    const int64_t group = job.heads / job.key_heads, seen = up(part.last);
    const Mask mask(job.window);
    Buffer<float> keys(seen * Dp), values(seen * Dp), queries(block), across(block);
    Buffer<float> scores(CHUNK * SIDE);
    Gathered gathered(Dp);
    copied(keys, job.k.at(row.batch, key_head, row.start), job.k.token, L, seen, D, Dp);
    copied(values, job.v.at(row.batch, key_head, row.start), job.v.token, L, seen, D, Dp);
    for (int64_t first = part.first; first < part.last; first += SIDE)
        for (int64_t h = 0; h < group; ++h) {
            const int64_t count = std::min<int64_t>(SIDE, L - first), width = first + SIDE;
            const int64_t at = row.start + first, head = key_head * group + h;
            copied(queries, job.q.at(row.batch, head, at), job.q.token, count, SIDE, D, Dp);
            turned(across, queries, Dp);
            gathered.reset();
            for (int64_t begin = first_seen(first, job.window); begin < width; begin += CHUNK) {
                const int64_t number = std::min(width - begin, CHUNK);
                product(scores, SIDE, {keys + begin * Dp, Dp, 1}, across, SIDE, number, SIDE, Dp,
                        false);
                gathered.add(scores, begin - first, number, mask, job.scale, values + begin * Dp);
            }
            float factors[SIDE];
            for (int64_t i = 0; i < count; ++i) {
                const float total = gathered.totals[i / LANES][i % LANES];
                factors[i] = 1.0f / total;
                job.sums[head * job.tokens + row.before + first + i] =
                    gathered.most[i / LANES][i % LANES] + std::log(total);
            }
            written_turned(job.out, row.batch, head, at, count, gathered.values, factors, D);
        }
}

void backward(const Job<float>& job, const Row& row, int64_t key_head, Part part, KeyGradients& grads) {
    const int64_t D = job.D, Dp = up(D), L = row.length, block = SIDE * Dp;
    const int64_t group = job.heads / job.key_heads, seen = up(part.last);
    const Mask mask(job.window);
    Buffer<float> keys(seen * Dp), values(seen * Dp), queries(block), upstream(block), outs(block);
    Buffer<float> queries_across(block), upstream_across(block), grad_queries(block);
    Buffer<float> weights(CHUNK * SIDE), score_grads(CHUNK * SIDE);
    float ones[SIDE];
    std::fill_n(ones, SIDE, 1.0f);
    copied(keys, job.k.at(row.batch, key_head, row.start), job.k.token, L, seen, D, Dp);
    copied(values, job.v.at(row.batch, key_head, row.start), job.v.token, L, seen, D, Dp);
    for (int64_t first = part.first; first < part.last; first += SIDE)
        for (int64_t h = 0; h < group; ++h) {
            const int64_t count = std::min<int64_t>(SIDE, L - first), width = first + SIDE;
            const int64_t at = row.start + first, head = key_head * group + h;
            copied(queries, job.q.at(row.batch, head, at), job.q.token, count, SIDE, D, Dp);
            copied(upstream, job.grad.at(row.batch, head, at), job.grad.token, count, SIDE, D, Dp);
            copied(outs, job.out.at(row.batch, head, at), job.out.token, count, SIDE, D, Dp);
            turned(queries_across, queries, Dp);
            turned(upstream_across, upstream, Dp);
            Numbers sums[REGISTERS], along[REGISTERS];
            for (int64_t i = 0; i < SIDE; ++i) {
                Numbers products{};
                for (int64_t d = 0; d < Dp; d += LANES)
                    products += read(upstream + i * Dp + d) * read(outs + i * Dp + d);
                along[i / LANES][i % LANES] = sum_of(products);
                // A query that is none weighs nothing.
                sums[i / LANES][i % LANES] =
                    i < count ? job.sums[head * job.tokens + row.before + first + i] : -NONE;
            }
            const int64_t start = first_seen(first, job.window);
            for (int64_t begin = start; begin < width; begin += CHUNK) {
                const int64_t number = std::min(width - begin, CHUNK);
                product(weights, SIDE, {keys + begin * Dp, Dp, 1}, queries_across, SIDE, number,
                        SIDE, Dp, false);
                product(score_grads, SIDE, {values + begin * Dp, Dp, 1}, upstream_across, SIDE,
                        number, SIDE, Dp, false);
                for (int64_t key = 0; key < number; ++key)
                    for (int part_of = 0; part_of < REGISTERS; ++part_of) {
                        float* weight_place = weights + key * SIDE + part_of * LANES;
                        float* grad_place = score_grads + key * SIDE + part_of * LANES;
                        Numbers weight =
                            exponential(read(weight_place) * job.scale - sums[part_of]);
                        const int64_t place = begin - first + key;
                        if (!mask.whole(place))
                            weight = mask.seeing(place, part_of) ? weight : all(0);
                        write(weight_place, weight);
                        write(grad_place,
                              weight * job.scale * (read(grad_place) - along[part_of]));
                    }
                product(grad_queries, SIDE, {keys + begin * Dp, 1, Dp}, score_grads, SIDE, Dp,
                        SIDE, number, begin > start);
                product(grads.values + begin * Dp, Dp, {weights, SIDE, 1}, upstream, Dp, number,
                        Dp, SIDE, true);
                product(grads.keys + begin * Dp, Dp, {score_grads, SIDE, 1}, queries, Dp, number,
                        Dp, SIDE, true);
            }
            written_turned(job.grad_q, row.batch, head, at, count, grad_queries, ones, D);
        }
}

struct Nothing {};

}  // namespace

extern "C" {

int lighten_attention(const void* job) {
    return forward_in_threads<Nothing>(*static_cast<const Job<float>*>(job), forward);
}
int lighten_attention_backward(const void* job) {
    return backward_in_threads<Nothing>(*static_cast<const Job<float>*>(job), backward);
}
}
