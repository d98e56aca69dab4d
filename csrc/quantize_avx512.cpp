// The quantising kernels for AVX-512 (F, BW, DQ, VL); compiled with these flags and called only where the processor has them.
#include "quantize.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace quantize {
namespace {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
typedef int8_t B __attribute__((vector_size(16)));

inline F look_up(const float* codes, I index) {
    return (F)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(codes));
}

#include "quantize_tile.inc"

}  // namespace

const Functions* functions_avx512() { return &kFunctions; }

}  // namespace quantize

#else
namespace quantize {
const Functions* functions_avx512() { return nullptr; }
}  // namespace quantize
#endif
