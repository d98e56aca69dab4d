// The decoders in the compiler's portable vectors of four: for every processor, and what the others are tested against.
#include <type_traits>

#include "decode.h"

namespace decode {
namespace {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(8)));
typedef uint16_t W __attribute__((vector_size(16)));

#include "decode_vectors.inc"

inline F from_half(H bits) {
    F x;
    for (int i = 0; i < kLanes; ++i) {
        _Float16 half;
        const uint16_t of_lane = bits[i];
        __builtin_memcpy(&half, &of_lane, 2);
        x[i] = half;
    }
    return x;
}

inline H to_half(F x) {
    H bits;
    for (int i = 0; i < kLanes; ++i) {
        const _Float16 half = static_cast<_Float16>(x[i]);
        uint16_t of_lane;
        __builtin_memcpy(&of_lane, &half, 2);
        bits[i] = of_lane;
    }
    return bits;
}

inline H words(const uint8_t* from) { return H{from[0], from[1], from[2], from[3]}; }
inline F signed_numbers(const uint8_t* from) {
    F x;
    for (int i = 0; i < kLanes; ++i) x[i] = static_cast<int8_t>(from[i]);
    return x;
}
inline U widen(H h) { return __builtin_convertvector(h, U); }
inline W join_upper(U a, U b) {
    return __builtin_shufflevector((W)a, (W)b, 1, 3, 5, 7, 9, 11, 13, 15);  // little-endian
}
inline W join(H a, H b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7); }

template <typename V>
inline void stream(char* to, V v) { store(to, v); }
inline void fence() {}

template <typename Entry>
struct Table {
    Entry entries[16];

    void fill(const Entry* from) { __builtin_memcpy(entries, from, sizeof entries); }

    template <bool low_first, typename Use>
    void look_up(const uint8_t* codes, Use use) const {
        struct Pair {
            Entry first, second;
        };
        for (int i = 0; i < kStep / 2; ++i) {
            const Entry low = entries[codes[i] & 15], high = entries[codes[i] >> 4];
            use(i * static_cast<int>(sizeof(Pair)), low_first ? Pair{low, high} : Pair{high, low});
        }
    }
};

#include "decode_tile.inc"

}  // namespace

RunFunction run_portable() { return decode_any; }

}  // namespace decode
