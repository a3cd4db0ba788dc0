// Rows of an attention: where they lie, and which thread takes which part of them.
//
// Dimensions: D features of a head, Dp the same rounded up to 32.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "threads.h"

constexpr int SIDE = 32;              // of a block of queries or keys
constexpr int64_t LEAST_PART = 1024;  // queries that are worth another copy of their keys
constexpr int64_t MOST_PARTS = 16;

inline int64_t up(int64_t n) { return (n + SIDE - 1) / SIDE * SIDE; }

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

template <class Number>
struct View {
    void* data;
    int64_t batch, head, token;  // strides, in numbers

    Number* at(int64_t b, int64_t h, int64_t t) const {
        return static_cast<Number*>(data) + b * batch + h * head + t * token;
    }
};

struct Row {
    int64_t batch, start, length, before;  // `before`: tokens of the rows above it
};

template <class Number>
struct Job {
    View<Number> q, k, v, out, grad, grad_q, grad_k, grad_v;
    float* sums;  // [heads, tokens]: logarithms of each query's sum of exponentials
    const Row* rows;
    int64_t row_count, tokens, heads, key_heads, D, window;
    float scale;
    int64_t threads;
};

// [count x D] of a view, with zeros up to [rows x Dp].
template <class Number>
inline void copied(decltype(Number())* to, const Number* from, int64_t stride, int64_t count, int64_t rows,
                   int64_t D, int64_t Dp) {
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t have = i < count ? D : 0;
        std::copy_n(from + i * stride, have, to + i * Dp);
        std::fill(to + i * Dp + have, to + (i + 1) * Dp, Number(0));
    }
}

// Where the first block of keys begins of which a block of queries sees any.
inline int64_t first_seen(int64_t first, int64_t window) {
    return std::max<int64_t>(0, first + 1 - window) / SIDE * SIDE;
}

// The queries of a row that one thread takes at once.
struct Part {
    int64_t first, last;
};

// Gradients of the keys and values that a part of the queries sees.
struct KeyGradients {
    explicit KeyGradients(int64_t size) : size(size), keys(size), values(size) {
        std::fill_n(keys.data, size, 0.0f);
        std::fill_n(values.data, size, 0.0f);
    }
    void add(const KeyGradients& fewer) {
        for (int64_t i = 0; i < fewer.size; ++i) keys[i] += fewer.keys[i];
        for (int64_t i = 0; i < fewer.size; ++i) values[i] += fewer.values[i];
    }
    int64_t size;
    Buffer<float> keys, values;
};

// How many parts a row is cut into. The number of threads must not decide it, since gradients of
// keys are summed part by part.
inline int64_t parts_of(const Row& row) {
    return std::max<int64_t>(1, std::min(MOST_PARTS, row.length / LEAST_PART));
}

// One of a row's parts, each of about as many scores: later queries have more of them, unless a
// window keeps them from it.
inline Part part_of(const Row& row, int64_t number, int64_t parts, int64_t window) {
    const auto end = [&](int64_t count) {
        const double even = static_cast<double>(count) / parts;
        const double share = window < row.length / 2 ? even : std::sqrt(even);
        return std::min(row.length, up(static_cast<int64_t>(share * row.length)));
    };
    return {end(number), end(number + 1)};
}

// A row's queries of the heads that share one key head.
struct Unit {
    // A part's gradients of keys. They are summed in the order of the parts, whichever ends first.
    template <class Number>
    void finished(const Job<Number>& job, int64_t number, std::unique_ptr<KeyGradients> grads) {
        const std::lock_guard<std::mutex> alone(mutex);
        waiting[number] = std::move(grads);
        for (; next < parts && waiting[next]; ++next) {
            if (summed) waiting[next]->add(*summed);  // which is of fewer keys
            summed = std::move(waiting[next]);
        }
        if (next < parts) return;
        written(job.grad_k, *row, key_head, summed->keys, job.D, up(job.D));
        written(job.grad_v, *row, key_head, summed->values, job.D, up(job.D));
        summed.reset();
    }

    const Row* row = nullptr;
    int64_t key_head = 0, parts = 1, next = 0;
    std::unique_ptr<KeyGradients> waiting[MOST_PARTS], summed;
    std::mutex mutex;
};

// Each part of each row's heads, the threads taking turns; 0, or 1 where memory ran out.
//
// `Begun` lives in each thread for as long as it works.
template <class Begun, class Number, class Each>
int in_threads(const Job<Number>& job, Each each) try {
    const int64_t count = job.row_count * job.key_heads;
    const std::unique_ptr<Unit[]> units(new Unit[count]);
    std::vector<std::pair<Unit*, int64_t>> parts;
    for (int64_t i = 0; i < count; ++i) {
        Unit& unit = units[i];
        unit.row = job.rows + i / job.key_heads;
        unit.key_head = i % job.key_heads;
        unit.parts = parts_of(*unit.row);
        for (int64_t part = 0; part < unit.parts; ++part) parts.emplace_back(&unit, part);
    }
    std::atomic<size_t> next{0};
    std::atomic<int> failed{0};
    in_parallel(std::min<int64_t>(job.threads, parts.size()), [&] {
        [[maybe_unused]] Begun begun;
        try {
            for (size_t i = next++; i < parts.size() && !failed; i = next++)
                each(*parts[i].first, parts[i].second);
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    });
    return failed;
} catch (const std::bad_alloc&) {
    return 1;
}

// The forward pass of a part of a row.
template <class Begun, class Number, class Forward>
int forward_in_threads(const Job<Number>& job, Forward forward) {
    return in_threads<Begun>(job, [&](Unit& unit, int64_t number) {
        forward(job, *unit.row, unit.key_head,
                part_of(*unit.row, number, unit.parts, job.window));
    });
}

// The backward pass of a part of a row, and of its keys once all parts are there.
template <class Begun, class Number, class Backward>
int backward_in_threads(const Job<Number>& job, Backward backward) {
    return in_threads<Begun>(job, [&](Unit& unit, int64_t number) {
        const Part part = part_of(*unit.row, number, unit.parts, job.window);
        std::unique_ptr<KeyGradients> grads(new KeyGradients(up(part.last) * up(job.D)));
        backward(job, *unit.row, unit.key_head, part, *grads);
        unit.finished(job, number, std::move(grads));
    });
}
