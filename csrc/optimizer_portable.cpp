// The optimizers' kernels in the compiler's portable vectors of four: for every processor, and what the others are tested
// against.
#include "optimizer.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace optimizer {
namespace {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(8)));

inline F fused(F a, F b, F c) {
    return F{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]),
             __builtin_fmaf(a[3], b[3], c[3])};
}

inline F square_root(F x) {
    return F{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
}

#if defined(__SSE2__)
constexpr bool kHasEstimate = true;
inline F root_estimate(F x) { return (F)_mm_rsqrt_ps((__m128)x); }
#else
constexpr bool kHasEstimate = false;
inline F root_estimate(F x) { return x; }
#endif

inline bool all(I mask) { return (mask[0] & mask[1] & mask[2] & mask[3]) != 0; }
inline U widen(H h) { return __builtin_convertvector(h, U); }
inline I widen_signed(H h) { return (I)(widen(h) << 16) >> 16; }
inline H narrow(U u) { return __builtin_convertvector(u, H); }

template <typename V>
inline void stream(char* to, V a) { __builtin_memcpy(to, &a, sizeof a); }
inline void fence() {}

#include "optimizer_tile.inc"

}  // namespace

const Functions* functions_portable() { return &kFunctions; }

}  // namespace optimizer
