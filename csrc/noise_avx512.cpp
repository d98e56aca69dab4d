// The tile kernel for AVX-512 (F, BW, DQ, VL, VBMI) and GFNI, which Ice Lake and Zen 4 brought; compiled with these flags and
// called only where the processor has them.
#include "noise.h"

#if defined(__AVX512VBMI__) && defined(__GFNI__)
#include <immintrin.h>

#include <type_traits>

namespace noise {
namespace {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

// Even and odd lanes apart, in 64-bit lanes whose upper halves hold whatever: a product takes the lower ones.
inline void philox_rounds(U (&c)[4], uint64_t seed) {
    __m512i x[2][4];
    for (int w = 0; w < 4; ++w) x[0][w] = (__m512i)c[w], x[1][w] = _mm512_srli_epi64((__m512i)c[w], 32);
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
        for (auto& y : x) {
            __m512i p0 = _mm512_mul_epu32(y[0], m0), p1 = _mm512_mul_epu32(y[2], m1);
            y[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), y[1], key0, 0x96);
            y[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), y[3], key1, 0x96);
            y[1] = p1;
            y[3] = p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int w = 0; w < 4; ++w)
        c[w] = (U)_mm512_mask_blend_epi32(0xaaaa, x[0][w], _mm512_slli_epi64(x[1][w], 32));
}

inline F add_signed(F x, F value, F negative, const uint32_t* words, int element) {
    __mmask16 bits;
    __builtin_memcpy(&bits, reinterpret_cast<const char*>(words) + element / 8, 2);
    return x + (F)_mm512_mask_blend_ps(bits, (__m512)value, (__m512)negative);
}

#define NOISE_OWN_ADD_EIGHT
// As in noise_tile.inc, from tables: the signs of eight updates become one byte an element, by a transposition of bits, and
// its halves choose among the sixteen sums of either four.
inline void add_eight(const float (&c)[8], const uint32_t (*words)[kTile / 32], float* sum) {
    alignas(64) float sums[2][16];
    for (int four = 0; four < 2; ++four)
        for (int signs = 0; signs < 16; ++signs) {
            float s = 0.0f;
            for (int j = 0; j < 4; ++j) s += signs >> j & 1 ? -c[4 * four + j] : c[4 * four + j];
            sums[four][signs] = s;
        }
    const __m512 low = _mm512_load_ps(sums[0]), high = _mm512_load_ps(sums[1]);
    alignas(64) uint8_t order[64];  // byte 8 r + 7 - j comes from byte 8 j + r: the eight updates' bytes side by side
    for (int r = 0; r < 8; ++r)
        for (int j = 0; j < 8; ++j) order[8 * r + 7 - j] = static_cast<uint8_t>(8 * j + r);
    const __m512i bytes = _mm512_load_si512(order), identity = _mm512_set1_epi64(0x8040201008040201);
    for (int i = 0; i < kTile; i += 512) {
        __m512i r[8], t[8], q[8];  // r[j]: 512 signs of update j; q[k]: signs 64 k to 64 k + 63 of all eight
        for (int j = 0; j < 8; ++j) r[j] = _mm512_load_si512(reinterpret_cast<const char*>(words[j]) + i / 8);
        for (int j = 0; j < 8; j += 2) {
            t[j] = _mm512_unpacklo_epi64(r[j], r[j + 1]);
            t[j + 1] = _mm512_unpackhi_epi64(r[j], r[j + 1]);
        }
        for (int odd = 0; odd < 2; ++odd) {
            __m512i a = _mm512_shuffle_i64x2(t[odd], t[2 + odd], 0x88), b = _mm512_shuffle_i64x2(t[4 + odd], t[6 + odd], 0x88);
            __m512i d = _mm512_shuffle_i64x2(t[odd], t[2 + odd], 0xdd), e = _mm512_shuffle_i64x2(t[4 + odd], t[6 + odd], 0xdd);
            q[odd] = _mm512_shuffle_i64x2(a, b, 0x88);
            q[4 + odd] = _mm512_shuffle_i64x2(a, b, 0xdd);
            q[2 + odd] = _mm512_shuffle_i64x2(d, e, 0x88);
            q[6 + odd] = _mm512_shuffle_i64x2(d, e, 0xdd);
        }
        for (int k = 0; k < 8; ++k) {
            __m512i choice = _mm512_gf2p8affine_epi64_epi8(identity, _mm512_permutexvar_epi8(bytes, q[k]), 0);
            alignas(64) uint8_t element[64];
            _mm512_store_si512(element, choice);
            for (int v = 0; v < 64; v += 16) {
                __m512i index = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(element + v)));
                float* at = sum + i + 64 * k + v;
                __m512 s = _mm512_add_ps(_mm512_load_ps(at), _mm512_permutexvar_ps(index, low));
                s = _mm512_add_ps(s, _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), high));
                _mm512_store_ps(at, s);
            }
        }
    }
}

inline F square_root(F x) { return (F)_mm512_sqrt_ps((__m512)x); }

inline void stream(char* to, H a, H b) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1));
}
inline void fence() { _mm_sfence(); }

template <typename V>
inline V interleave_low(V a, V b) { return (V)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b); }
template <typename V>
inline V interleave_high(V a, V b) { return (V)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b); }
template <typename V>
inline V interleave_low_pairs(V a, V b) { return (V)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b); }
template <typename V>
inline V interleave_high_pairs(V a, V b) { return (V)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b); }

#include "noise_tile.inc"

}  // namespace

TileFunction tile_avx512() { return run_tile; }

}  // namespace noise

#else
namespace noise {
TileFunction tile_avx512() { return nullptr; }
}  // namespace noise
#endif
