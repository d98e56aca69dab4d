#include "norm.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace norm {

namespace {

constexpr uint64_t kTogether = 4;  // of the rest, PyTorch's compiler takes so many squares at once and fuses the others

inline float at(const char* values, Dtype dtype, uint64_t i) {
    if (dtype == Dtype::kFloat32) {
        float value;
        std::memcpy(&value, values + 4 * i, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, values + 2 * i, 2);
    return bfloat16_to_float(half);
}

template <int width, Dtype dtype>
void add(float* lanes, const char* values, uint64_t count) {
    float sums[width];
    std::memcpy(sums, lanes, sizeof sums);
    constexpr int step = dtype == Dtype::kFloat32 ? width : 2 * width;
    for (uint64_t i = 0; i < count; i += step)
        for (int j = 0; j < width; ++j) {
            const float first = at(values, dtype, i + j);
            float squares = first * first;
            if constexpr (dtype == Dtype::kBfloat16) {
                const float second = at(values, dtype, i + width + j);
                squares += second * second;
            }
            sums[j] += squares;
        }
    std::memcpy(lanes, sums, sizeof sums);
}

template <int width>
void add_of(float* lanes, const char* values, Dtype dtype, uint64_t count) {
    if (dtype == Dtype::kFloat32)
        add<width, Dtype::kFloat32>(lanes, values, count);
    else
        add<width, Dtype::kBfloat16>(lanes, values, count);
}

}  // namespace

void add_squares(float* lanes, int width, const char* values, Dtype dtype, uint64_t count) {
    if (dtype == Dtype::kFloat16) throw std::invalid_argument("expected fp32 or bf16");
    if (count % (dtype == Dtype::kFloat32 ? width : 2 * width)) throw std::invalid_argument("expected whole vectors");
    switch (width) {
        case 4: return add_of<4>(lanes, values, dtype, count);
        case 8: return add_of<8>(lanes, values, dtype, count);
        case 16: return add_of<16>(lanes, values, dtype, count);
        default: throw std::invalid_argument("expected 4, 8 or 16 lanes");
    }
}

float sum(const float* lanes, int width, const char* rest, Dtype dtype, uint64_t count) {
    float total = lanes[0];
    for (int j = 1; j < width; ++j) total += lanes[j];
    for (uint64_t i = 0; i < count; ++i) {
        const float value = at(rest, dtype, i);
        if (i < count / kTogether * kTogether)
            total += value * value;
        else
            total = std::fma(value, value, total);
    }
    return total;
}

}  // namespace norm
