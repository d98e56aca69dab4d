// Which code a kernel runs, and on how many threads. For the files that bind kernels, not for the kernels themselves.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "worker_pool.h"

// What the processor has; avx512: F, BW, DQ and VL.
struct Processor {
    bool avx2 = false, fma = false, f16c = false, avx512 = false, avx512_vbmi = false, gfni = false;

    Processor() {
#if defined(__x86_64__)
        avx2 = __builtin_cpu_supports("avx2");
        fma = __builtin_cpu_supports("fma");
        f16c = __builtin_cpu_supports("f16c");
        avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        avx512_vbmi = __builtin_cpu_supports("avx512vbmi");
        gfni = __builtin_cpu_supports("gfni");
#endif
    }
};

// Code for each instruction set, a pointer; null where this build or processor has none.
template <typename Code>
struct Choices {
    Code avx512, avx2, portable;

    // The names of those that can run here, fastest first.
    std::vector<std::string> available() const {
        std::vector<std::string> found;
        for (const char* name : {"avx512", "avx2", "portable"})
            if (find(name)) found.push_back(name);
        return found;
    }

    Code named(const std::string& instructions) const {
        const Code found = find(instructions);
        if (!found) throw std::invalid_argument("this processor or build has no " + instructions + " code");
        return found;
    }

  private:
    Code find(const std::string& instructions) const {
        if (instructions == "avx512") return avx512;
        if (instructions == "avx2") return avx2;
        return instructions == "portable" ? portable : nullptr;
    }
};

// Calls one(i) for all i < count, on up to `threads` threads; each takes `at_once` neighbours from the common count.
template <typename One>
void in_parallel(uint64_t count, uint64_t at_once, int threads, One one) {
    std::atomic<uint64_t> next{0};
    auto work = [&] {
        for (uint64_t start; (start = next.fetch_add(at_once)) < count;)
            for (uint64_t i = start; i < std::min(count, start + at_once); ++i) one(i);
    };
    const uint64_t useful = (count + at_once - 1) / at_once;
    run_on_workers(static_cast<int>(std::min<uint64_t>(std::max(threads, 1), useful)), work);
}
