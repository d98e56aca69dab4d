// Decoders of GGUF's blocks, see [Note: GGUF blocks] in offload/weights/formats/gguf_blocks.py: fp32, every product and sum
// rounded, then converted to one dtype, to nearest, ties to even. Code for every instruction set gives the same bits, those of
// PyTorch's operations one after the other (of NaN: one is one).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace blocks {

enum class Type : int { kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kIq4Nl, kIq4Xs };

// Elements and bytes of a block.
constexpr int elements_of(Type type) {
    return type <= Type::kQ8_0 || type == Type::kIq4Nl ? 32 : 256;
}
constexpr int bytes_of(Type type) {
    constexpr int sizes[] = {18, 20, 22, 24, 34, 84, 110, 144, 176, 210, 18, 136};
    return sizes[static_cast<int>(type)];
}

// Decodes `count` blocks one after the other to `target`.
using RunFunction = void (*)(Type type, const uint8_t* from, uint64_t count, Dtype target_dtype, char* target);

RunFunction run_portable();
RunFunction run_avx2();  // null where the compiler has no such target
RunFunction run_avx512();

}  // namespace blocks
