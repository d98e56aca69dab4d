#include "scaled_sum.h"

#include <stdexcept>

namespace scaled_sum {

namespace {

FOR_EACH_INSTRUCTION_SET void add_bfloat16(uint16_t* __restrict out, const uint16_t* __restrict result,
                                           const float* __restrict update, float scaling, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) out[i] = float_to_bfloat16(bfloat16_to_float(result[i]) + update[i] * scaling);
}

FOR_EACH_INSTRUCTION_SET void add_float32(float* __restrict out, const float* __restrict result,
                                          const float* __restrict update, float scaling, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) out[i] = result[i] + update[i] * scaling;
}

FOR_EACH_INSTRUCTION_SET void scale_bfloat16(float* __restrict out, const uint16_t* __restrict gradient, float scaling,
                                             uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(gradient[i]) * scaling;
}

FOR_EACH_INSTRUCTION_SET void scale_float32(float* __restrict out, const float* __restrict gradient, float scaling,
                                            uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) out[i] = gradient[i] * scaling;
}

}  // namespace

void add(char* out, const char* result, const float* update, float scaling, Dtype dtype, uint64_t count) {
    switch (dtype) {
        case Dtype::kFloat32:
            return add_float32(reinterpret_cast<float*>(out), reinterpret_cast<const float*>(result), update, scaling, count);
        case Dtype::kBfloat16:
            return add_bfloat16(reinterpret_cast<uint16_t*>(out), reinterpret_cast<const uint16_t*>(result), update, scaling,
                                count);
        default: throw std::invalid_argument("expected fp32 or bf16");
    }
}

void scale(float* out, const char* gradient, float scaling, Dtype dtype, uint64_t count) {
    switch (dtype) {
        case Dtype::kFloat32: return scale_float32(out, reinterpret_cast<const float*>(gradient), scaling, count);
        case Dtype::kBfloat16: return scale_bfloat16(out, reinterpret_cast<const uint16_t*>(gradient), scaling, count);
        default: throw std::invalid_argument("expected fp32 or bf16");
    }
}

}  // namespace scaled_sum
