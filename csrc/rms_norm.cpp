#include "rms_norm.h"

namespace rms_norm {

namespace {

// (gradient * weight), rounded as the tensor of it that PyTorch makes
inline float weighted(uint16_t gradient, uint16_t weight) {
    return bfloat16_to_float(float_to_bfloat16(bfloat16_to_float(gradient) * bfloat16_to_float(weight)));
}

}  // namespace

FOR_EACH_INSTRUCTION_SET void forward(const Rows& rows, uint64_t row, float scale, uint16_t* __restrict out) {
    const uint16_t* __restrict const x = rows.x + row * rows.columns;
    const uint16_t* __restrict const weight = rows.weight;
    for (uint64_t i = 0; i < rows.columns; ++i) {
        const uint16_t scaled = float_to_bfloat16(bfloat16_to_float(x[i]) * scale);
        out[i] = float_to_bfloat16(bfloat16_to_float(weight[i]) * bfloat16_to_float(scaled));
    }
}

FOR_EACH_INSTRUCTION_SET void products(const Rows& rows, uint64_t row, const uint16_t* __restrict gradient,
                                       float* __restrict out) {
    const uint16_t* __restrict const x = rows.x + row * rows.columns;
    const uint16_t* __restrict const weight = rows.weight;
    for (uint64_t i = 0; i < rows.columns; ++i) out[i] = weighted(gradient[i], weight[i]) * bfloat16_to_float(x[i]);
}

FOR_EACH_INSTRUCTION_SET void backward(const Rows& rows, uint64_t row, const uint16_t* __restrict gradient, float scale,
                                       float slope, uint16_t* __restrict out) {
    const uint16_t* __restrict const x = rows.x + row * rows.columns;
    const uint16_t* __restrict const weight = rows.weight;
    for (uint64_t i = 0; i < rows.columns; ++i)
        out[i] = float_to_bfloat16(weighted(gradient[i], weight[i]) * scale + slope * (2.0f * bfloat16_to_float(x[i])));
}

}  // namespace rms_norm
