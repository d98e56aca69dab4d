// PyTorch's norm of a tensor that is never whole in memory.
//
// Its CPU kernel for `torch.linalg.vector_norm` of a contiguous tensor goes over it once, alone, with the lanes of one vector:
// lane j adds the square of every element j of a vector, fp32, rounded before it is added; two halves of a vector of
// bfloat16 are added to each other first. In the end the lanes are added in order, then the elements that fill no vector.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace norm {

// lanes: `width` sums. count: a multiple of the elements of a vector, which are `width`, of bfloat16 twice as many.
void add_squares(float* lanes, int width, const char* values, Dtype dtype, uint64_t count);

// The sum of all squares; rest: fewer elements than a vector has.
float sum(const float* lanes, int width, const char* rest, Dtype dtype, uint64_t count);

}  // namespace norm
