// The tile kernel for AVX2 and F16C; compiled with these flags and called only where the processor has them.
#include "noise.h"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>

#include <type_traits>

namespace noise {
namespace {

constexpr int kLanes = 8;
typedef float F __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
typedef uint16_t H __attribute__((vector_size(16)));

// Even and odd lanes apart, in 64-bit lanes whose upper halves hold whatever: a product takes the lower ones.
inline void philox_rounds(U (&c)[4], uint64_t seed) {
    __m256i x[2][4];
    for (int w = 0; w < 4; ++w) x[0][w] = (__m256i)c[w], x[1][w] = _mm256_srli_epi64((__m256i)c[w], 32);
    const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
        for (auto& y : x) {
            __m256i p0 = _mm256_mul_epu32(y[0], m0), p1 = _mm256_mul_epu32(y[2], m1);
            y[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), y[1]), key0);
            y[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), y[3]), key1);
            y[1] = p1;
            y[3] = p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int w = 0; w < 4; ++w)
        c[w] = (U)_mm256_blend_epi32(x[0][w], _mm256_slli_epi64(x[1][w], 32), 0xaa);
}

inline F add_signed(F x, F value, F, const uint32_t* words, int element) {
    U sign = ((U{} + (words[element / 32] >> element % 32)) << U{31, 30, 29, 28, 27, 26, 25, 24}) & 0x80000000u;
    return x + (F)((U)value ^ sign);
}

inline F square_root(F x) { return (F)_mm256_sqrt_ps((__m256)x); }

inline void stream(char* to, H a, H b) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_set_m128i((__m128i)b, (__m128i)a));
}
inline void fence() { _mm_sfence(); }

template <typename V>
inline V interleave_low(V a, V b) { return (V)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b); }
template <typename V>
inline V interleave_high(V a, V b) { return (V)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b); }
template <typename V>
inline V interleave_low_pairs(V a, V b) { return (V)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
template <typename V>
inline V interleave_high_pairs(V a, V b) { return (V)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }

#include "noise_tile.inc"

}  // namespace

TileFunction tile_avx2() { return run_tile; }

}  // namespace noise

#else
namespace noise {
TileFunction tile_avx2() { return nullptr; }
}  // namespace noise
#endif
