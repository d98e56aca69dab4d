// The decoders for AVX-512 (F, BW, DQ, VL); compiled with these flags and called only where the processor has them.
#include "decode.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

#include <type_traits>

namespace decode {
namespace {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
typedef uint16_t W __attribute__((vector_size(64)));

#include "decode_vectors.inc"

inline F from_half(H bits) { return (F)_mm512_cvtph_ps((__m256i)bits); }
inline H to_half(F x) { return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
inline H words(const uint8_t* from) {
    return (H)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline F signed_numbers(const uint8_t* from) {
    return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline U widen(H h) { return (U)_mm512_cvtepu16_epi32((__m256i)h); }
inline W join_upper(U a, U b) {  // packing goes by quarters of the vectors
    const __m512i packed = _mm512_packus_epi32((__m512i)(a >> 16), (__m512i)(b >> 16));
    return (W)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed);
}
inline W join(H a, H b) {
    return (W)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1);
}

template <typename V>
inline void stream(char* to, V v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v); }
inline void fence() { _mm_sfence(); }

template <typename Entry>
struct Table;

template <>
struct Table<uint32_t> {
    __m512 entries;

    void fill(const uint32_t* from) { entries = _mm512_loadu_ps(from); }

    template <bool low_first, typename Use>
    void look_up(const uint8_t* codes, Use use) const {
        const __m512i sixteen = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const __m512i first_half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const __m512i counts = low_first
            ? _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28)
            : _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
        for (int part = 0; part < 2; ++part) {
            const __m512i lanes = _mm512_add_epi32(first_half, _mm512_set1_epi32(2 * part));
            // A code in the lower bits of each lane, others above it.
            const __m512i index = _mm512_srlv_epi32(_mm512_permutexvar_epi32(lanes, sixteen), counts);
            use(64 * part, _mm512_permutexvar_ps(index, entries));
        }
    }
};

template <>
struct Table<uint16_t> {
    __m512i entries;  // twice: an index is of five bits, of which the uppermost belongs to another code

    void fill(const uint16_t* from) {
        entries = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }

    template <bool low_first, typename Use>
    void look_up(const uint8_t* codes, Use use) const {
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const __m512i twice = _mm512_or_si512(b, _mm512_slli_epi32(b, 16));
        const __m512i index = _mm512_srlv_epi16(twice, _mm512_set1_epi32(low_first ? 4 << 16 : 4));
        use(0, _mm512_permutexvar_epi16(index, entries));
    }
};

#include "decode_tile.inc"

}  // namespace

RunFunction run_avx512() { return decode_any; }

}  // namespace decode

#else
namespace decode {
RunFunction run_avx512() { return nullptr; }
}  // namespace decode
#endif
