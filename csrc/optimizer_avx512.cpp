// The optimizers' kernels for AVX-512 (F, BW, DQ, VL); compiled with these flags and called only where the processor has
// them.
#include "optimizer.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace optimizer {
namespace {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

inline F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline F square_root(F x) { return (F)_mm512_sqrt_ps((__m512)x); }
constexpr bool kHasEstimate = true;
// Not rsqrt14ps: its estimate is another.
inline F root_estimate(F x) {
    const __m256 low = _mm256_rsqrt_ps(_mm512_castps512_ps256((__m512)x));
    const __m256 high = _mm256_rsqrt_ps(_mm512_extractf32x8_ps((__m512)x, 1));
    return (F)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

inline bool all(I mask) { return _mm512_movepi32_mask((__m512i)mask) == 0xffff; }
inline U widen(H h) { return (U)_mm512_cvtepu16_epi32((__m256i)h); }
inline I widen_signed(H h) { return (I)_mm512_cvtepi16_epi32((__m256i)h); }
inline H narrow(U u) { return (H)_mm512_cvtepi32_epi16((__m512i)u); }

template <typename V>
inline void stream(char* to, V a) {
    if constexpr (sizeof a == 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)a);
    else
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)a);
}
inline void fence() { _mm_sfence(); }

#include "optimizer_tile.inc"

}  // namespace

const Functions* functions_avx512() { return &kFunctions; }

}  // namespace optimizer

#else
namespace optimizer {
const Functions* functions_avx512() { return nullptr; }
}  // namespace optimizer
#endif
