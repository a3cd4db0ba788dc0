// Attention of sequences' newest tokens, one each, among N tokens of a step, over the keys and values
// that their slots of a cache hold.
//
// Each sequence is read to its own length, and heads that share keys are computed together, so that
// keys and values are read once. Sums are float32.
//
// Dimensions: H query heads, K key heads, G = H / K, D features of a head, L tokens of a sequence.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <memory>
#include <new>

#include "numbers.h"
#include "threads.h"

struct Job {
    const void *query, *keys, *values;                 // [N, H, D], [slots, K, capacity, D] twice
    void* out;                                         // [N, H, D]
    int64_t query_row, query_head, out_row, out_head;  // strides
    int64_t slot, head, token;                         // strides of keys and of values
    const int64_t *rows, *slots, *lengths;  // of each sequence; its length counts this token
    int64_t count, heads, key_heads, features, window;  // window 0: all tokens are seen
    float scale, softcap;                               // softcap 0: none
};

template <class T>
float dot(const T* a, const T* b, int64_t features) {
    Eight sums = zero();
    const int64_t whole = features & ~7;
    for (int64_t d = 0; d < whole; d += 8) sums = fused(eight(a + d), eight(b + d), sums);
    float found = sum(sums);
    for (int64_t d = whole; d < features; ++d) found += one(a[d]) * one(b[d]);
    return found;
}

template <class T>
void attend(const Job& job, int64_t row, int64_t key_head, float* scores, float* sums) {
    const int64_t group = job.heads / job.key_heads, length = job.lengths[row];
    const int64_t first = job.window ? std::max<int64_t>(0, length - job.window) : 0;
    const int64_t seen = length - first, D = job.features;
    const int64_t place = job.slots[row] * job.slot + key_head * job.head + first * job.token;
    const T* keys = (const T*)job.keys + place;
    const T* values = (const T*)job.values + place;
    const T* query = (const T*)job.query + job.rows[row] * job.query_row + key_head * group * job.query_head;
    T* out = (T*)job.out + job.rows[row] * job.out_row + key_head * group * job.out_head;
    for (int64_t j = 0; j < seen; ++j)
        for (int64_t g = 0; g < group; ++g)
            scores[g * seen + j] = dot(query + g * job.query_head, keys + j * job.token, D);
    for (int64_t g = 0; g < group; ++g) {
        float* own = scores + g * seen;
        float most = -FLT_MAX, total = 0.0f;
        for (int64_t j = 0; j < seen; ++j) {
            own[j] *= job.scale;
            if (job.softcap > 0.0f) own[j] = job.softcap * std::tanh(own[j] / job.softcap);
            most = std::max(most, own[j]);
        }
        for (int64_t j = 0; j < seen; ++j) total += own[j] = std::exp(own[j] - most);
        for (int64_t j = 0; j < seen; ++j) own[j] /= total;
    }
    std::fill(sums, sums + group * D, 0.0f);
    const int64_t whole = D & ~7;
    for (int64_t j = 0; j < seen; ++j) {
        const T* value = values + j * job.token;
        for (int64_t g = 0; g < group; ++g) {
            const float weight = scores[g * seen + j];
            float* own = sums + g * D;
            for (int64_t d = 0; d < whole; d += 8)
                put8(own + d, fused(all(weight), eight(value + d), eight(own + d)));
            for (int64_t d = whole; d < D; ++d) own[d] += weight * one(value[d]);
        }
    }
    for (int64_t g = 0; g < group; ++g)
        for (int64_t d = 0; d < D; ++d) put(out + g * job.out_head + d, sums[g * D + d]);
}

// Returns 0, or 1 where there was no memory for the scores.
extern "C" int lighten_decode_attention(const Job* job, int half, int64_t threads) {
    const int64_t turns = job->count * job->key_heads;
    const int64_t group = job->heads / job->key_heads;
    const int64_t longest = *std::max_element(job->lengths, job->lengths + job->count);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    in_parallel(std::min(threads, turns), [&] {
        const std::unique_ptr<float[]> room(
            new (std::nothrow) float[group * (longest + job->features)]);
        if (!room) {
            failed = true;
            return;
        }
        for (int64_t turn; (turn = next++) < turns;) {
            const int64_t row = turn / job->key_heads, head = turn % job->key_heads;
            float* sums = room.get() + group * longest;
            if (half)
                attend<bf16>(*job, row, head, room.get(), sums);
            else
                attend<float>(*job, row, head, room.get(), sums);
        }
    });
    return failed;
}
