// Weights to NF4 and to LLM.int8(), with bitsandbytes' bits, and how far that is from the weights.
//
// All arithmetic that decides a code is single IEEE fp32 operations, none fused: every instruction set gives the same bytes.
// Sums of errors are added in another order by each.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace quantize {

constexpr int kBlock = 64;               // weights under one absmax
constexpr uint64_t kTile = 32 * kBlock;  // weights that a thread takes at once

struct Sums {
    double error = 0, weights = 0;  // squares of the differences and of the weights; NaN or infinite where a weight is
};

// A run of a matrix's weights, row after row, that begins at a block.
struct Pass4Bit {
    const void* source;
    Dtype dtype;
    uint64_t count;
    const float* codes;   // 16, ascending
    const float* bounds;  // 15: a number above bounds[i] has a code above i
    uint8_t* packed;      // two in a byte, the first in its high half
    float* absmax;        // of each block
    float* slopes;        // of each block, the sum of code * (code * absmax - weight)
    float* squares;       // of each block, the sum of code * code
};

// Whole rows. Weights are rounded to fp16 first, as bitsandbytes' layer does; one beyond its range makes absmax infinite.
struct PassInt8 {
    const void* source;
    Dtype dtype;
    uint64_t columns;
    int8_t* packed;
    float* absmax;  // of each row
};

// absmax of a matrix's blocks less their mean, in 8 bits: codes of `numbers`, which are ascending.
struct PassNested {
    const float* absmax;
    const float* slopes;
    const float* squares;
    uint64_t count;
    float offset;
    const float* numbers;  // 256
    const uint8_t* table;  // the nearest number's code, of 65536 equal steps from -1 to 1
    uint8_t* codes;
    float* tops;  // the largest difference of each 256
};

// Returns what this adds to the squared error.
double nest(const PassNested& pass);

struct Functions {
    Sums (*tile_4bit)(const Pass4Bit& pass, uint64_t tile);
    Sums (*row_int8)(const PassInt8& pass, uint64_t row);
};

const Functions* functions_portable();
const Functions* functions_avx2();  // null where the compiler has no such target
const Functions* functions_avx512();

}  // namespace quantize
