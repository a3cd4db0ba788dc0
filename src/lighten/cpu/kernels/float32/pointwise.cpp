// Norms, gates and losses in float32 on any processor: what ../pointwise.cpp computes of bfloat16.
//
// Dimensions: N tokens, H features of a token, S positions with a label, V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr float NONE = -std::numeric_limits<float>::infinity();

// The first of a vector's numbers; the others are `rest`.
inline Numbers read(const float* from, int64_t count, float rest = 0.0f) {
    Numbers x = all(rest);
    std::memcpy(&x, from, count * sizeof(float));
    return x;
}
inline void write(float* to, int64_t count, Numbers x) { std::memcpy(to, &x, count * sizeof(float)); }

// Work on numbers [first, last), a vector of them at a time: each(place, how many). How many is a
// type of its own but at the end, so that a whole vector is read at once.
using Whole = std::integral_constant<int64_t, LANES>;
template <class Each>
inline void in_vectors(int64_t first, int64_t last, Each each) {
    int64_t i = first;
    for (; i + LANES <= last; i += LANES) each(i, Whole{});
    if (i < last) each(i, last - i);
}

// An activation and its slope: SiLU, x sigmoid(x), or GELU by tanh, x sigmoid(2 u(x)) with
// u(x) = sqrt(2 / pi) (x + 0.044715 x^3).
inline void activate(Numbers x, bool gelu, Numbers* value, Numbers* slope) {
    Numbers inner = x, inner_slope = all(1.0f);
    if (gelu) {
        const Numbers square = x * x;
        inner = 1.5957691216f * x * (square * 0.044715f + 1.0f);
        inner_slope = 1.5957691216f * (square * (3 * 0.044715f) + 1.0f);
    }
    const Numbers s = sigmoid(inner);
    *value = x * s;
    *slope = *value * inner_slope * (1.0f - s) + s;
}

// What the rule of a head makes of a logit: scaled, then capped by softcap tanh(x / softcap).
struct Rule {
    float scale, softcap;

    Numbers operator()(Numbers raw) const {
        const Numbers x = raw * scale;
        // tanh(x) = 2 sigmoid(2 x) - 1
        return softcap == 0.0f ? x : softcap * (2.0f * sigmoid(x * (2.0f / softcap)) - 1.0f);
    }
    // What the slope by the final logit is multiplied with.
    Numbers inner(Numbers final) const {
        if (softcap == 0.0f) return all(scale);
        const Numbers t = final * (1.0f / softcap);
        return scale * (1.0f - t * t);
    }
};

}  // namespace

extern "C" {

// y = x / root mean square, times w; or, `plus_one`, times 1 + w.
void lighten_rms_norm(const float* x, const float* w, float* y, float* scales, int64_t N, int64_t H,
                      float eps, int plus_one, int64_t threads) {
    const float added = plus_one ? 1.0f : 0.0f;
    in_ranges(N, H, threads, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const float* row = x + i * H;
            Numbers sum{};
            in_vectors(0, H, [&](int64_t h, auto count) {
                const Numbers numbers = read(row + h, count);
                sum += numbers * numbers;
            });
            const float scale = 1.0f / std::sqrt(sum_of(sum) / H + eps);
            scales[i] = scale;
            in_vectors(0, H, [&](int64_t h, auto count) {
                write(y + i * H + h, count, read(row + h, count) * scale * (read(w + h, count) + added));
            });
        }
    });
}

// With g = grad w and n = x scale: (g - n mean(g n)) scale.
void lighten_rms_norm_backward(const float* x, const float* w, const float* scales,
                               const float* grad, float* grad_x, int64_t N, int64_t H, int plus_one,
                               int64_t threads) {
    const float added = plus_one ? 1.0f : 0.0f;
    in_ranges(N, H, threads, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const float scale = scales[i];
            auto slope = [&](int64_t h, auto count) {
                return read(grad + i * H + h, count) * (read(w + h, count) + added);
            };
            Numbers sum{};
            in_vectors(0, H, [&](int64_t h, auto count) {
                sum += read(x + i * H + h, count) * slope(h, count);
            });
            const float back = sum_of(sum) * scale / H * scale;
            in_vectors(0, H, [&](int64_t h, auto count) {
                const Numbers rest = slope(h, count) - read(x + i * H + h, count) * back;
                write(grad_x + i * H + h, count, rest * scale);
            });
        }
    });
}

// y = activation(gate) up
void lighten_gated(const float* gate, const float* up, float* y, int64_t count, int gelu,
                   int64_t threads) {
    in_ranges(count, 1, threads, [=](int64_t first, int64_t last) {
        in_vectors(first, last, [=](int64_t i, auto some) {
            Numbers value, slope;
            activate(read(gate + i, some), gelu, &value, &slope);
            write(y + i, some, value * read(up + i, some));
        });
    });
}

void lighten_gated_backward(const float* gate, const float* up, const float* grad, float* grad_gate,
                            float* grad_up, int64_t count, int gelu, int64_t threads) {
    in_ranges(count, 1, threads, [=](int64_t first, int64_t last) {
        in_vectors(first, last, [=](int64_t i, auto some) {
            Numbers value, slope;
            activate(read(gate + i, some), gelu, &value, &slope);
            const Numbers upstream = read(grad + i, some);
            write(grad_up + i, some, upstream * value);
            write(grad_gate + i, some, upstream * read(up + i, some) * slope);
        });
    });
}

// Each row of logits becomes the slopes of its loss by them, in three passes through the caches.
void lighten_cross_entropy(float* logits, const int64_t* labels, float* losses, int64_t S, int64_t V,
                           float scale, float softcap, int64_t threads) {
    in_ranges(S, V, threads, [=](int64_t first, int64_t last) {
        const Rule rule{scale, softcap};
        for (int64_t i = first; i < last; ++i) {
            float* row = logits + i * V;
            // Those behind the end weigh nothing.
            auto final_of = [&](int64_t v, auto count) {
                const Numbers final = rule(read(row + v, count));
                return count == LANES ? final : read((const float*)&final, count, NONE);
            };
            Numbers most = all(NONE), sum{};
            in_vectors(0, V, [&](int64_t v, auto count) { most = larger(most, final_of(v, count)); });
            float top = NONE;
            for (int lane = 0; lane < LANES; ++lane) top = std::max(top, most[lane]);
            const float of_label = rule(all(row[labels[i]]))[0];
            in_vectors(0, V, [&](int64_t v, auto count) {
                const Numbers final = final_of(v, count), weight = exponential(final - top);
                sum += weight;
                write(row + v, count, weight * rule.inner(final));
            });
            const float total = sum_of(sum), share = 1.0f / total;
            losses[i] = top + std::log(total) - of_label;
            in_vectors(0, V, [&](int64_t v, auto count) {
                write(row + v, count, read(row + v, count) * share);
            });
            row[labels[i]] -= rule.inner(all(of_label))[0];
        }
    });
}
}
