// Weights moved along low-rank noise, z = U V^T: the pass of noise.h for LOZO's perturbations.
//
// A group of updates that shares V is one product: its sum over j of coefficient_j U_j comes in as one U. Every element is a
// short chain of single fp32 operations in a fixed order, so chunks, threads and instruction sets change nothing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "noise_bindings.h"

namespace nb = nanobind;

namespace {

constexpr int kChunk = 512;          // columns at once
constexpr uint64_t kRowsAtOnce = 16;  // what a thread takes from the common count

struct Factors {
    const float* u;  // [rows, rank], the first row is that of the call's first element
    const float* v;  // [rank, columns]
};

struct Group {
    float scale;
    Factors factors;
    Dtype rounded_to;  // to nearest after the group
};

struct Target {
    char* data;
    Dtype dtype;
    Factors factors;
    float coefficient;
};

FOR_EACH_INSTRUCTION_SET void read(const char* from, Dtype dtype, int count, float* out) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(out, from, 4 * count);
    } else if (dtype == Dtype::kBfloat16) {
        for (int i = 0; i < count; ++i) {
            uint16_t half;
            std::memcpy(&half, from + 2 * i, 2);
            uint32_t bits = static_cast<uint32_t>(half) << 16;
            std::memcpy(out + i, &bits, 4);
        }
    } else {
        for (int i = 0; i < count; ++i) {
            _Float16 half;
            std::memcpy(&half, from + 2 * i, 2);
            out[i] = half;
        }
    }
}

FOR_EACH_INSTRUCTION_SET void write(const float* from, Dtype dtype, int count, char* to) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(to, from, 4 * count);
    } else if (dtype == Dtype::kBfloat16) {
        for (int i = 0; i < count; ++i) {
            uint32_t bits;
            std::memcpy(&bits, from + i, 4);
            uint16_t half = rounded_to_bfloat16(bits) >> 16;
            std::memcpy(to + 2 * i, &half, 2);
        }
    } else {
        for (int i = 0; i < count; ++i) {
            _Float16 half = static_cast<_Float16>(from[i]);
            std::memcpy(to + 2 * i, &half, 2);
        }
    }
}

// out[j] = sum over k of u[k] v[k][j], k ascending.
FOR_EACH_INSTRUCTION_SET void product(const float* u, const float* v, int rank, uint64_t columns, int count, float* out) {
    for (int j = 0; j < count; ++j) out[j] = u[0] * v[j];
    for (int k = 1; k < rank; ++k)
        for (int j = 0; j < count; ++j) out[j] += u[k] * v[k * columns + j];
}

FOR_EACH_INSTRUCTION_SET void scale_and_add(float* theta, float scale, const float* z, int count) {
    for (int j = 0; j < count; ++j) theta[j] = theta[j] * scale + z[j];
}

FOR_EACH_INSTRUCTION_SET void add_multiple(const float* theta, float c, const float* z, int count, float* out) {
    for (int j = 0; j < count; ++j) out[j] = theta[j] + c * z[j];
}

struct Pass {
    const char* source;
    Dtype source_dtype;
    uint64_t columns;
    int rank;
    std::vector<Group> groups;
    std::vector<Target> targets;

    // Elements [at, at + count) of source and targets: columns [column, column + count) of row `row` of the factors.
    void run(uint64_t row, uint64_t column, int count, uint64_t at) const {
        float theta[kChunk], z[kChunk], moved[kChunk];
        read(source + at * size_of(source_dtype), source_dtype, count, theta);
        for (const Group& group : groups) {
            product(group.factors.u + row * rank, group.factors.v + column, rank, columns, count, z);
            scale_and_add(theta, group.scale, z, count);
            if (group.rounded_to != Dtype::kFloat32) {
                char rounded[2 * kChunk];
                write(theta, group.rounded_to, count, rounded);
                read(rounded, group.rounded_to, count, theta);
            }
        }
        for (const Target& target : targets) {
            const float* result = theta;
            if (target.coefficient != 0.0f) {
                product(target.factors.u + row * rank, target.factors.v + column, rank, columns, count, z);
                add_multiple(theta, target.coefficient, z, count, moved);
                result = moved;
            }
            write(result, target.dtype, count, target.data + at * size_of(target.dtype));
        }
    }
};

using GroupArguments = std::tuple<float, uint64_t, uint64_t, Dtype>;             // scale, U, V, dtype rounded to
using TargetArguments = std::tuple<uint64_t, Dtype, uint64_t, uint64_t, float>;  // data, dtype, U, V, coefficient

// Elements [first_column, first_column + count) of a matrix that begins with the factors' first row.
void run(uint64_t source, Dtype source_dtype, uint64_t first_column, uint64_t count, uint64_t columns, int rank,
         const std::vector<GroupArguments>& groups, const std::vector<TargetArguments>& targets, int threads) {
    if (columns == 0 || rank < 1 || first_column >= columns) throw std::invalid_argument("no such matrix");
    auto at = [](uint64_t address) { return reinterpret_cast<const float*>(address); };
    Pass pass{reinterpret_cast<const char*>(source), source_dtype, columns, rank, {}, {}};
    for (const auto& [scale, u, v, rounded_to] : groups) pass.groups.push_back({scale, {at(u), at(v)}, rounded_to});
    for (const auto& [data, dtype, u, v, coefficient] : targets)
        pass.targets.push_back({reinterpret_cast<char*>(data), dtype, {at(u), at(v)}, coefficient});
    nb::gil_scoped_release release;
    const uint64_t end = first_column + count, rows = (end + columns - 1) / columns;
    in_parallel(rows, kRowsAtOnce, threads, [&](uint64_t row) {
        const uint64_t low = std::max(row * columns, first_column), high = std::min((row + 1) * columns, end);
        for (uint64_t e = low; e < high; e += kChunk)
            pass.run(row, e - row * columns, static_cast<int>(std::min<uint64_t>(kChunk, high - e)), e - first_column);
    });
}

}  // namespace

void register_low_rank(nb::module_& noise) {
    noise.def("run_low_rank", &run, nb::arg("source"), nb::arg("source_dtype"), nb::arg("first_column"), nb::arg("count"),
              nb::arg("columns"), nb::arg("rank"), nb::arg("groups"), nb::arg("targets"), nb::arg("threads"));
}
