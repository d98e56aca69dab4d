// Counter-based noise and the pass that moves weights by it: z = f(seed, parameter, element).
//
// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed as key and
// (element block, parameter) as counter. One counter gives 128 Rademacher signs or 8 normals (Box-Muller), so any element
// can be had without the ones before it: the same numbers whatever the chunking, the order or the number of threads.
//
// All arithmetic is single IEEE fp32 operations, none fused: portable, AVX2 and AVX-512 code give the same bits, and so does
// the plain NumPy transcription in tests/noise_reference.py.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace noise {

enum class Kind : int { kRademacher, kGaussian };

constexpr int kTile = 2048;  // elements; a whole number of counters of either kind

enum class Rounding : int { kNone, kNearest, kStochastic };

struct Update {
    uint64_t seed;
    float coefficient;
};

// theta <- scale * theta + sum_j coefficient_j * z(seed_j): the sum in fp32, in order, added once; signs are summed in fours
// first, the last ones with zeros (see add_eight in noise_tile.inc). Then theta may be rounded
// to `rounded_to`: to nearest, or (bfloat16 only) up or down at random by bits of `rounding_seed`.
struct Group {
    float scale;
    const Update* updates;
    int count;
    Rounding rounding;
    Dtype rounded_to;
    uint64_t rounding_seed;
};

// Where theta + coefficient * z(seed) goes. Neighbours with one seed share its noise. A coefficient of 0: theta itself.
struct Target {
    void* data;
    Dtype dtype;
    uint64_t seed;
    float coefficient;
};

struct Pass {
    Kind kind;
    uint64_t parameter;
    const void* source;
    Dtype source_dtype;
    const Group* groups;
    int group_count;
    const Target* targets;
    int target_count;
    bool streams;  // bfloat16 targets are written past the caches: they are larger
};

// One tile: elements [tile * kTile + first, tile * kTile + last) of the parameter, which are elements [at, at + last - first)
// of source and targets.
using TileFunction = void (*)(const Pass& pass, uint64_t tile, int first, int last, uint64_t at);

TileFunction tile_portable();
TileFunction tile_avx2();    // null where the compiler has no such target
TileFunction tile_avx512();

}  // namespace noise
