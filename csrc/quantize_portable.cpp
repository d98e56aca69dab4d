// The quantising kernels in the compiler's portable vectors of four: for every processor, and what the others are tested
// against.
#include "quantize.h"

namespace quantize {
namespace {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(8)));
typedef int8_t B __attribute__((vector_size(4)));

inline F look_up(const float* codes, I index) {
    return F{codes[index[0]], codes[index[1]], codes[index[2]], codes[index[3]]};
}

#include "quantize_tile.inc"

}  // namespace

const Functions* functions_portable() { return &kFunctions; }

}  // namespace quantize
