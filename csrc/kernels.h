// What the numeric kernels share. For code of every instruction set: what is here has internal linkage, because no function
// may be shared between files that are compiled for different ones.
#pragma once

#include <cstdint>

enum class Dtype : int { kFloat32, kBfloat16, kFloat16 };

namespace {

constexpr int size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// fp32 bits, a number or a vector of them -> bits whose upper half is the nearest bfloat16, ties to even; NaN stays one. The
// lower half is of no meaning.
template <typename Bits>
[[gnu::always_inline]] inline Bits rounded_to_bfloat16(Bits bits) {
    const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc00000u : rounded;
}

}  // namespace
