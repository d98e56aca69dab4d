// What the numeric kernels share. For code of every instruction set: what is here has internal linkage, because no function
// may be shared between files that are compiled for different ones.
#pragma once

#include <cstdint>
#include <cstring>

// Before a function: its code for each of these, chosen when the module is loaded. They give the same bits where nothing is
// fused (see CMakeLists.txt).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_INSTRUCTION_SET __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_INSTRUCTION_SET
#endif

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

[[maybe_unused]] inline float bfloat16_to_float(uint16_t upper) {
    const uint32_t bits = uint32_t{upper} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

[[maybe_unused]] inline uint16_t float_to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(rounded_to_bfloat16(bits) >> 16);
}

}  // namespace
