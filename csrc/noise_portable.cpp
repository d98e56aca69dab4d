// The tile kernel in the compiler's portable vectors of four: for every processor, and what the others are tested against.
#include <cstring>
#include <type_traits>

#include "noise.h"

namespace noise {
namespace {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(8)));
typedef uint64_t W __attribute__((vector_size(32)));

inline void multiply_wide(U a, uint32_t m, U& hi, U& lo) {
    W product = __builtin_convertvector(a, W) * static_cast<uint64_t>(m);
    hi = __builtin_convertvector(product >> 32, U);
    lo = __builtin_convertvector(product, U);
}

inline void philox_rounds(U (&c)[4], uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        U hi0, lo0, hi1, lo1;
        multiply_wide(c[0], 0xD2511F53u, hi0, lo0);
        multiply_wide(c[2], 0xCD9E8D57u, hi1, lo1);
        c[0] = hi1 ^ c[1] ^ k0;
        c[1] = lo1;
        c[2] = hi0 ^ c[3] ^ k1;
        c[3] = lo0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

inline F add_signed(F x, F value, F, const uint32_t* words, int element) {
    U sign = ((U{} + (words[element / 32] >> element % 32)) >> U{0, 1, 2, 3}) << 31;
    return x + (F)((U)value ^ sign);
}

inline F square_root(F x) {
    return F{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
}

inline void stream(char* to, H a, H b) {
    std::memcpy(to, &a, sizeof a);
    std::memcpy(to + sizeof a, &b, sizeof b);
}
inline void fence() {}

template <typename V>
inline V interleave_low(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
template <typename V>
inline V interleave_high(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
template <typename V>
inline V interleave_low_pairs(V a, V b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
template <typename V>
inline V interleave_high_pairs(V a, V b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }

#include "noise_tile.inc"

}  // namespace

TileFunction tile_portable() { return run_tile; }

}  // namespace noise
