// Decoders of packed weights: number = (value(code) - zero) * scale * factor, in fp32, every operation rounded; then rounded to one dtype
// and converted to another, each to nearest, ties to even. Portable, AVX2 and AVX-512 code give the same bits, those of
// PyTorch's operations one after the other (of NaN: one is one).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace decode {

// What lies in memory. kFourBit: one of 16 codes, two in a byte, the first in its high half (kFourBitLow: in its low one).
// kBfloat16 and kFloat16 have no scales.
enum class Code : int { kFourBit, kFourBitLow, kInt8, kFloat8E4m3, kFloat8E5m2, kBfloat16, kFloat16 };

constexpr int bits_of(Code code) {
    return code <= Code::kFourBitLow ? 4 : code >= Code::kBfloat16 ? 16 : 8;
}

struct Pass {
    Code code;
    const float* table;  // of 4 bits, the 16 numbers
    float factor;        // of kInt8 only
    Dtype rounded;       // the dtype that numbers are rounded to first
    Dtype target_dtype;
    bool streams;  // targets at a cache line are written past the caches
};

// `count` numbers one after the other.
struct Run {
    const uint8_t* codes;
    bool odd;  // of 4 bits: the first number is the second of its byte
    uint64_t count;
    const float* scales;  // of the groups: the first one's and on
    const float* zeros;   // of 4 bits, the same of zero points; null: there are none
    uint64_t group;       // numbers under a scale
    uint64_t into_group;  // numbers of the first group that come before the run
    char* target;
};

using RunFunction = void (*)(const Pass& pass, const Run& run);

RunFunction run_portable();
RunFunction run_avx2();  // null where the compiler has no such target
RunFunction run_avx512();

}  // namespace decode
