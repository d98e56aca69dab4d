// The optimizers' kernels for AVX2, FMA and F16C; compiled with these flags and called only where the processor has them.
#include "optimizer.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace optimizer {
namespace {

constexpr int kLanes = 8;
typedef float F __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
typedef uint16_t H __attribute__((vector_size(16)));

inline F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline F square_root(F x) { return (F)_mm256_sqrt_ps((__m256)x); }
constexpr bool kHasEstimate = true;
inline F root_estimate(F x) { return (F)_mm256_rsqrt_ps((__m256)x); }

inline bool all(I mask) { return _mm256_movemask_ps((__m256)mask) == 0xff; }
inline U widen(H h) { return (U)_mm256_cvtepu16_epi32((__m128i)h); }
inline I widen_signed(H h) { return (I)_mm256_cvtepi16_epi32((__m128i)h); }
inline H narrow(U u) {
    return (H)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)u), _mm256_extracti128_si256((__m256i)u, 1));
}

template <typename V>
inline void stream(char* to, V a) {
    if constexpr (sizeof a == 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)a);
    else
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)a);
}
inline void fence() { _mm_sfence(); }

#include "optimizer_tile.inc"

}  // namespace

const Functions* functions_avx2() { return &kFunctions; }

}  // namespace optimizer

#else
namespace optimizer {
const Functions* functions_avx2() { return nullptr; }
}  // namespace optimizer
#endif
