// Update rules of optimizers over pieces of weights and state that stream through memory, and a checksum of what was read.
//
// One pass reads gradients, weights and state once and writes the new ones. The fp32 operations, fused where PyTorch's
// vectorised CPU code fuses them, are those of torch.optim with foreach=False, so the results are the same bits; portable,
// AVX2 and AVX-512 code agree bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace optimizer {

enum class Rule : int { kAdamW, kLion, kSgd, kSignSgd, kDescent };
constexpr bool has_state(Rule rule) { return rule != Rule::kSignSgd && rule != Rule::kDescent; }
enum class StateFormat : int { kFloat32, kBfloat16, kEightBit };
// kMkl: of MKL's code for processors that it has none for, which PyTorch runs on AMD's: an estimate and two Newton steps,
// often one unit in the last place off.
enum class Root : int { kIeee, kMkl };

constexpr int kTile = 2048;  // units, what a thread takes at once
constexpr int kBlock = 256;  // units under one scale of 8-bit state; divides kTile
constexpr int kGroup = 16;   // units of a step of the inner loop, on every instruction set; divides kBlock

struct Segment {
    uint64_t unit, count;
    char* weights;
    Dtype weight_dtype;
    const char* gradients;
    Dtype gradient_dtype;
    char* copy;  // null: the new weights are written once
    uint64_t element;
};

// State of one kind: fp32 or bfloat16 `values`; or 8-bit codes, a scale for every block, the 256 sorted values that codes
// stand for (1 is the largest), the bounds above each, and the lowest code of the numbers whose fp32 bits have an upper
// half: among them is one bound at most.
struct State {
    char* values;
    float* scales;
    const float* table;
    const float* bounds;
    const uint8_t* lowest;
};

struct Scalars {
    float gradient_scale;
    float decay;           // 1 - learning rate * weight decay
    float keep1, weight1;  // beta1 or momentum, 1 - beta1
    float keep2, weight2;
    float root_divisor;  // AdamW: sqrt(1 - beta2^step)
    float epsilon;
    float step;  // what the direction is multiplied with: negative
};

struct Pass {
    Rule rule;
    StateFormat format;
    Root root;
    bool stochastic;  // bfloat16 weights without a remainder are rounded at random; else to nearest
    uint64_t seed;
    Scalars scalars;
    uint64_t units;
    int16_t* remainder;  // null: 16-bit weights are all there is
    State first, second;
    const Segment* segments;
    size_t segment_count;
};

struct Sums {
    double change, weights;  // of squares
};

constexpr uint64_t kChecksumTile = 1 << 16;  // bytes
constexpr int kChecksumLanes = 64;

struct Functions {
    Sums (*update_tile)(const Pass& pass, uint64_t tile);
    void (*square_roots)(Root root, const float* from, float* to, uint64_t count);  // count: a multiple of kGroup
    // Adds `count` words, a multiple of kChecksumLanes, to the lanes.
    void (*checksum_words)(const uint32_t* words, uint64_t count, uint32_t* lanes);
};

const Functions* functions_portable();
const Functions* functions_avx2();  // null where the compiler has no such target
const Functions* functions_avx512();

// A bijection with good avalanche (Steele et al. 2014, "Fast splittable pseudorandom number generators").
static inline uint64_t mix64(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

}  // namespace optimizer
