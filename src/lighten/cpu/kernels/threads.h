// Work for several threads: those of the OpenMP runtime that PyTorch has loaded.
//
// After a product its threads spin for a while in wait of the next one. Threads of our own would
// have to compete with them for the cores, and lose a millisecond each time.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include <dlfcn.h>

// GCC's interface, which LLVM's and Intel's runtimes have as well.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// Every thread runs the same work: it takes its turns from a counter, so that fewer threads than
// were asked for do all of it.
template <class Work>
void in_parallel(int64_t threads, Work work) {
    if (threads <= 1) return work();  // as after a fork, where the runtime's threads are gone
    static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (parallel) return parallel([](void* own) { (*static_cast<Work*>(own))(); }, &work, threads, 0);
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < threads; ++i) others.emplace_back(std::ref(work));
    } catch (const std::system_error&) {
        // The system makes no more threads.
    }
    work();
    for (auto& other : others) other.join();
}

// Ranges of rows, one for each thread; so many numbers are worth a thread.
template <class Work>
void in_ranges(int64_t rows, int64_t width, int64_t threads, Work work, int64_t worth = 1 << 18) {
    threads = std::max<int64_t>(1, std::min(threads, rows * width / worth));
    std::atomic<int64_t> next{0};
    in_parallel(threads, [&] {
        for (int64_t i = next++; i < threads; i = next++)
            work(rows * i / threads, rows * (i + 1) / threads);
    });
}
