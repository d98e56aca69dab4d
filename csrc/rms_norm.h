// The passes over memory of a root mean square norm, as Transformers' models have it, that PyTorch makes one by one: rows of
// bfloat16, a weight for each column, a factor in fp32 for each row. Every operation is rounded as PyTorch rounds it: to fp32,
// or to bfloat16 where a tensor of that is made. Each function does one row; `gradient` and `out` are that row's.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace rms_norm {

struct Rows {
    const uint16_t* x;       // the norm's input
    const uint16_t* weight;  // [columns]
    uint64_t columns;
};

// out = weight * (x * scale)
void forward(const Rows& rows, uint64_t row, float scale, uint16_t* out);

// out = (gradient * weight) * x: the sum is the gradient of the row's scale
void products(const Rows& rows, uint64_t row, const uint16_t* gradient, float* out);

// out = (gradient * weight) * scale + slope * (2 x): the gradient of x
void backward(const Rows& rows, uint64_t row, const uint16_t* gradient, float scale, float slope, uint16_t* out);

}  // namespace rms_norm
