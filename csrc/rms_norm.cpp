#include "rms_norm.h"

#include <cstring>

// Chosen when the module is loaded. No operation is fused (see CMakeLists.txt), so all of them give the same bits.
#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace rms_norm {

namespace {

inline float widened(uint16_t half) {
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(rounded_to_bfloat16(bits) >> 16);
}

}  // namespace

FOR_EACH_PROCESSOR void forward(const Rows& rows, uint64_t row, float scale, uint16_t* __restrict out) {
    const uint16_t* __restrict const x = rows.x + row * rows.columns;
    const uint16_t* __restrict const weight = rows.weight;
    for (uint64_t i = 0; i < rows.columns; ++i)
        out[i] = rounded(widened(weight[i]) * widened(rounded(widened(x[i]) * scale)));
}

FOR_EACH_PROCESSOR void products(const Rows& rows, uint64_t row, const uint16_t* __restrict gradient, float* __restrict out) {
    const uint16_t* __restrict const x = rows.x + row * rows.columns;
    const uint16_t* __restrict const weight = rows.weight;
    for (uint64_t i = 0; i < rows.columns; ++i)
        out[i] = widened(rounded(widened(gradient[i]) * widened(weight[i]))) * widened(x[i]);
}

FOR_EACH_PROCESSOR void backward(const Rows& rows, uint64_t row, const uint16_t* __restrict gradient, float scale, float slope,
                                 uint16_t* __restrict out) {
    const uint16_t* __restrict const x = rows.x + row * rows.columns;
    const uint16_t* __restrict const weight = rows.weight;
    for (uint64_t i = 0; i < rows.columns; ++i) {
        const float inner = widened(rounded(widened(gradient[i]) * widened(weight[i])));
        out[i] = rounded(inner * scale + slope * (2.0f * widened(x[i])));
    }
}

}  // namespace rms_norm
