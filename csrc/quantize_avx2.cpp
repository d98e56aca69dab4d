// The quantising kernels for AVX2; compiled with these flags and called only where the processor has it.
#include "quantize.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace quantize {
namespace {

constexpr int kLanes = 8;
typedef float F __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
typedef uint16_t H __attribute__((vector_size(16)));
typedef int8_t B __attribute__((vector_size(8)));

inline F look_up(const float* codes, I index) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(codes), (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(codes + 8), (__m256i)index);
    return index > 7 ? (F)high : (F)low;
}

#include "quantize_tile.inc"

}  // namespace

const Functions* functions_avx2() { return &kFunctions; }

}  // namespace quantize

#else
namespace quantize {
const Functions* functions_avx2() { return nullptr; }
}  // namespace quantize
#endif
