// The quantising kernels in the compiler's portable vectors of four: for every processor, and what the others are tested
// against.
#include "quantize.h"

namespace quantize {
namespace {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(8)));
typedef int8_t B __attribute__((vector_size(4)));

inline F look_up(const float* codes, I index) {
    return F{codes[index[0]], codes[index[1]], codes[index[2]], codes[index[3]]};
}

#include "quantize_tile.inc"

}  // namespace

double nest(const PassNested& pass) {
    constexpr uint64_t kGroup = 256;
    double error = 0;
    for (uint64_t first = 0; first < pass.count; first += kGroup) {
        const uint64_t last = first + kGroup < pass.count ? first + kGroup : pass.count;
        float top = 0;
        for (uint64_t i = first; i < last; ++i) {
            const float size = __builtin_fabsf(pass.absmax[i] - pass.offset);
            top = size > top ? size : top;
        }
        pass.tops[first / kGroup] = top;
        const float inverse = 1.0f / top;
        for (uint64_t i = first; i < last; ++i) {
            uint8_t code = 0;
            if (top > 0) {
                float scaled = (pass.absmax[i] - pass.offset) * inverse;
                scaled = scaled > -1.0f ? scaled < 1.0f ? scaled : 1.0f : -1.0f;  // a number whatever comes
                const float half = (scaled + 1.0f) * 0.5f;
                // Exact in double and rounded once, as by a fused operation.
                code = pass.table[static_cast<uint32_t>(static_cast<float>(static_cast<double>(half) * 65535.0 + 0.5))];
            }
            pass.codes[i] = code;
            const float again = pass.numbers[code] * top + pass.offset;
            const double change = static_cast<double>(again) - pass.absmax[i];
            error += 2 * change * pass.slopes[i] + change * change * pass.squares[i];
        }
    }
    return error;
}

const Functions* functions_portable() { return &kFunctions; }

}  // namespace quantize
