// What a model does between its products: norms, gates, the loss of its logits. bfloat16 in and out,
// float32 between; each number comes from memory once and goes there once.
//
// Dimensions: N tokens, H features of a token, S positions with a label, V vocabulary.

#include <cmath>
#include <cstdint>
#include <limits>

#include <immintrin.h>

#include "numbers.h"
#include "threads.h"

namespace {

// 1 / (1 + e^-x)
__m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 low = _mm512_min_ps(_mm512_set1_ps(87.0f), _mm512_sub_ps(_mm512_setzero_ps(), x));
    const __m512 sum = _mm512_add_ps(one, exponential(low));
    // An estimate of 14 bits and one step of Newton's take a third of a division.
    const __m512 guess = _mm512_rcp14_ps(sum);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(sum, guess, _mm512_set1_ps(2.0f)));
}

// An activation and its slope: SiLU, x sigmoid(x), or GELU by tanh, x sigmoid(2 u(x)) with
// u(x) = sqrt(2 / pi) (x + 0.044715 x^3).
struct Activation {
    bool gelu;

    void operator()(__m512 x, __m512* value, __m512* slope) const {
        __m512 inner = x, inner_slope = _mm512_set1_ps(1.0f);
        if (gelu) {
            const __m512 two_root = _mm512_set1_ps(1.5957691216f), square = _mm512_mul_ps(x, x);
            inner = _mm512_mul_ps(
                _mm512_mul_ps(two_root, x),
                _mm512_fmadd_ps(square, _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f)));
            inner_slope = _mm512_mul_ps(
                two_root,
                _mm512_fmadd_ps(square, _mm512_set1_ps(3 * 0.044715f), _mm512_set1_ps(1.0f)));
        }
        const __m512 s = sigmoid(inner);
        *value = _mm512_mul_ps(x, s);
        // s + x s (1 - s) u'
        *slope = _mm512_fmadd_ps(_mm512_mul_ps(*value, inner_slope),
                                 _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
    }
};

// Sixteen numbers of the gate at a time, each with its activation and that one's slope.
template <class Each>
void activated(const bf16* gate, int64_t count, int gelu, int64_t threads, Each each) {
    in_ranges(count, 1, threads, [=](int64_t first, int64_t last) {
        const Activation activation{gelu != 0};
        for (int64_t i = first; i < last; i += 16) {
            const __mmask16 real = up_to(last - i);
            __m512 value, slope;
            activation(read(gate + i, real), &value, &slope);
            each(i, real, value, slope);
        }
    });
}

// What the rule of a head makes of a logit: scaled, then capped by softcap tanh(x / softcap).
struct Rule {
    float scale, softcap;

    __m512 operator()(__m512 raw) const {
        const __m512 x = _mm512_mul_ps(raw, _mm512_set1_ps(scale));
        if (softcap == 0.0f) return x;
        // tanh(x) = 2 sigmoid(2 x) - 1
        const __m512 s = sigmoid(_mm512_mul_ps(x, _mm512_set1_ps(2.0f / softcap)));
        return _mm512_mul_ps(_mm512_set1_ps(softcap),
                             _mm512_fmsub_ps(s, _mm512_set1_ps(2.0f), _mm512_set1_ps(1.0f)));
    }
    // What the slope by the final logit is multiplied with.
    __m512 inner(__m512 final) const {
        const __m512 factor = _mm512_set1_ps(scale);
        if (softcap == 0.0f) return factor;
        const __m512 t = _mm512_mul_ps(final, _mm512_set1_ps(1.0f / softcap));
        return _mm512_mul_ps(factor, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.0f)));
    }
};

}  // namespace

extern "C" {

// y = x / root mean square, rounded, times w; or, `plus_one`, times 1 + w before it is rounded.
void lighten_rms_norm(const bf16* x, const bf16* w, bf16* y, float* scales, int64_t N, int64_t H,
                      float eps, int plus_one, int64_t threads) {
    in_ranges(N, H, threads, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const bf16* row = x + i * H;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t h = 0; h < H; h += 16) {
                const __m512 own = read(row + h, up_to(H - h));
                sum = _mm512_fmadd_ps(own, own, sum);
            }
            const float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / H + eps);
            scales[i] = scale;
            const __m512 factor = _mm512_set1_ps(scale), one = _mm512_set1_ps(1.0f);
            for (int64_t h = 0; h < H; h += 16) {
                const __mmask16 real = up_to(H - h);
                const __m512 normal = _mm512_mul_ps(read(row + h, real), factor);
                const __m512 weight = read(w + h, real);
                write(y + i * H + h, real,
                      plus_one ? _mm512_mul_ps(normal, _mm512_add_ps(one, weight))
                               : _mm512_mul_ps(widened(rounded(normal)), weight));
            }
        }
    });
}

// With g = grad w and n = x scale: (g - n mean(g n)) scale.
void lighten_rms_norm_backward(const bf16* x, const bf16* w, const float* scales, const bf16* grad,
                               bf16* grad_x, int64_t N, int64_t H, int plus_one, int64_t threads) {
    in_ranges(N, H, threads, [=](int64_t first, int64_t last) {
        const __m512 added = _mm512_set1_ps(plus_one ? 1.0f : 0.0f);
        for (int64_t i = first; i < last; ++i) {
            const __m512 factor = _mm512_set1_ps(scales[i]);
            __m512 sum = _mm512_setzero_ps();
            auto slope = [&](int64_t h, __mmask16 real) {
                return _mm512_mul_ps(read(grad + i * H + h, real),
                                     _mm512_add_ps(read(w + h, real), added));
            };
            for (int64_t h = 0; h < H; h += 16) {
                const __mmask16 real = up_to(H - h);
                sum = _mm512_fmadd_ps(read(x + i * H + h, real), slope(h, real), sum);
            }
            const float along = _mm512_reduce_add_ps(sum) * scales[i] / H;
            const __m512 back = _mm512_set1_ps(along * scales[i]);
            for (int64_t h = 0; h < H; h += 16) {
                const __mmask16 real = up_to(H - h);
                const __m512 rest = _mm512_fnmadd_ps(read(x + i * H + h, real), back, slope(h, real));
                write(grad_x + i * H + h, real, _mm512_mul_ps(rest, factor));
            }
        }
    });
}

// y = activation(gate) up
void lighten_gated(const bf16* gate, const bf16* up, bf16* y, int64_t count, int gelu,
                   int64_t threads) {
    activated(gate, count, gelu, threads, [=](int64_t i, __mmask16 real, __m512 value, __m512) {
        write(y + i, real, _mm512_mul_ps(value, read(up + i, real)));
    });
}

void lighten_gated_backward(const bf16* gate, const bf16* up, const bf16* grad, bf16* grad_gate,
                            bf16* grad_up, int64_t count, int gelu, int64_t threads) {
    activated(gate, count, gelu, threads,
              [=](int64_t i, __mmask16 real, __m512 value, __m512 slope) {
                  const __m512 own = read(grad + i, real);
                  write(grad_up + i, real, _mm512_mul_ps(own, value));
                  write(grad_gate + i, real,
                        _mm512_mul_ps(_mm512_mul_ps(own, read(up + i, real)), slope));
              });
}

// Each row of logits becomes the slopes of its loss by them: a row stays in the second cache.
void lighten_cross_entropy(bf16* logits, const int64_t* labels, float* losses, int64_t S, int64_t V,
                           float scale, float softcap, int64_t threads) {
    in_ranges(S, V, threads, [=](int64_t first, int64_t last) {
        const Rule rule{scale, softcap};
        for (int64_t i = first; i < last; ++i) {
            bf16* row = logits + i * V;
            const float least = -std::numeric_limits<float>::infinity();
            __m512 most = _mm512_set1_ps(least), sum = _mm512_setzero_ps();
            for (int64_t v = 0; v < V; v += 16) {
                const __mmask16 real = up_to(V - v);
                most = _mm512_mask_max_ps(most, real, most, rule(read(row + v, real)));
            }
            const float top = _mm512_reduce_max_ps(most);
            const __m512 tops = _mm512_set1_ps(top);
            for (int64_t v = 0; v < V; v += 16) {
                const __mmask16 real = up_to(V - v);
                const __m512 weight = exponential(_mm512_sub_ps(rule(read(row + v, real)), tops));
                sum = _mm512_mask_add_ps(sum, real, sum, weight);
            }
            const float total = _mm512_reduce_add_ps(sum);
            // In the label's own place: its slope is one less, and its loss is known.
            const int64_t label = labels[i];
            const __m512 own = rule(read(row + label, 1));
            losses[i] = top + std::log(total) - _mm512_cvtss_f32(own);
            const __m512 share = _mm512_set1_ps(1.0f / total), one = _mm512_set1_ps(1.0f);
            const __m512 of_label = _mm512_mul_ps(
                _mm512_sub_ps(_mm512_mul_ps(exponential(_mm512_sub_ps(own, tops)), share), one),
                rule.inner(own));
            for (int64_t v = 0; v < V; v += 16) {
                const __mmask16 real = up_to(V - v);
                const __m512 final = rule(read(row + v, real));
                const __m512 weight = exponential(_mm512_sub_ps(final, tops));
                write(row + v, real,
                      _mm512_mul_ps(_mm512_mul_ps(weight, share), rule.inner(final)));
            }
            write(row + label, 1, of_label);
        }
    });
}
}
