// The decoders for AVX2 and F16C; compiled with these flags and called only where the processor has them.
#include "decode.h"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>

#include <type_traits>

namespace decode {
namespace {

constexpr int kLanes = 8;
typedef float F __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));
typedef uint16_t H __attribute__((vector_size(16)));
typedef uint16_t W __attribute__((vector_size(32)));

#include "decode_vectors.inc"

inline F from_half(H bits) { return (F)_mm256_cvtph_ps((__m128i)bits); }
inline H to_half(F x) { return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
inline H words(const uint8_t* from) {
    return (H)_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
inline F signed_numbers(const uint8_t* from) {
    return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline U widen(H h) { return (U)_mm256_cvtepu16_epi32((__m128i)h); }
inline W join_upper(U a, U b) {  // packing goes by halves of the vectors
    const __m256i packed = _mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16));
    return (W)_mm256_permute4x64_epi64(packed, 0xd8);
}
inline W join(H a, H b) { return (W)_mm256_set_m128i((__m128i)b, (__m128i)a); }

template <typename V>
inline void stream(char* to, V v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v); }
inline void fence() { _mm_sfence(); }

template <typename Entry>
struct Table;

template <>
struct Table<uint32_t> {
    __m256 low, high;  // entries 0 to 7, 8 to 15

    void fill(const uint32_t* entries) { low = (__m256)load<U>(entries), high = (__m256)load<U>(entries + kLanes); }

    template <bool low_first, typename Use>
    void look_up(const uint8_t* codes, Use use) const {
        const __m256i shifts = low_first ? _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)
                                         : _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        for (int part = 0; part < kStep / kLanes; ++part) {
            // A code in the lower bits of each lane, others above it.
            const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(load<int32_t>(codes + 4 * part)), shifts);
            const __m256 a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
            use(32 * part, _mm256_blendv_ps(a, b, (__m256)_mm256_slli_epi32(index, 28)));
        }
    }
};

template <>
struct Table<uint16_t> {
    __m256i low, high;  // the entries' lower and upper bytes, twice

    void fill(const uint16_t* entries) {
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries));
        const __m256i apart = _mm256_shuffle_epi8(
            all, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7,
                                  9, 11, 13, 15));
        low = _mm256_permute4x64_epi64(apart, 0x88), high = _mm256_permute4x64_epi64(apart, 0xdd);
    }

    template <bool low_first, typename Use>
    void look_up(const uint8_t* codes, Use use) const {
        const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const __m256i both = low_first ? _mm256_or_si256(b, _mm256_slli_epi16(b, 4))
                                       : _mm256_or_si256(_mm256_srli_epi16(b, 4), _mm256_slli_epi16(b, 8));
        const __m256i index = _mm256_and_si256(both, _mm256_set1_epi8(15));  // a code in each byte
        const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
        const __m256i even = _mm256_unpacklo_epi8(l, h), odd = _mm256_unpackhi_epi8(l, h);  // eights of the numbers
        use(0, _mm256_permute2x128_si256(even, odd, 0x20));
        use(32, _mm256_permute2x128_si256(even, odd, 0x31));
    }
};

#include "decode_tile.inc"

}  // namespace

RunFunction run_avx2() { return decode_any; }

}  // namespace decode

#else
namespace decode {
RunFunction run_avx2() { return nullptr; }
}  // namespace decode
#endif
