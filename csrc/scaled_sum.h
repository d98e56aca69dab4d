// What an adapter adds to the output of the layer that it wraps, in one pass over memory: PyTorch takes three, over arrays of
// fp32 that are then dropped.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace scaled_sum {

// out[i] = result[i] + update[i] * scaling for fp32 `update`; the product and the sum are rounded to fp32, the sum then to
// `dtype`, which is that of `result` and `out`.
void add(char* out, const char* result, const float* update, float scaling, Dtype dtype, uint64_t count);

// out[i] = gradient[i] * scaling in fp32, for a gradient of `dtype`.
void scale(float* out, const char* gradient, float scaling, Dtype dtype, uint64_t count);

}  // namespace scaled_sum
