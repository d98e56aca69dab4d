// Python's view of the decoders: where the scales of a run come from, choice of the instruction set, threads, and checks of
// what the kernels take on trust.
#include "decode.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "decode_bindings.h"
#include "dispatch.h"

namespace nb = nanobind;

namespace decode {

namespace {

constexpr uint64_t kPiece = 16384;              // at most so many numbers of a row are decoded in one call
constexpr uint64_t kPieceGroups = 512;          // and of so many groups, whose scales are made first
constexpr uint64_t kNumbersAtOnce = 65536;      // what a thread takes from the common count
constexpr uint64_t kStreamedBytes = 4'000'000;  // smaller targets are still cached when they are multiplied

const Choices<RunFunction>& choices() {
    static const Processor p;
    static const Choices<RunFunction> found{p.avx512 ? run_avx512() : nullptr, p.avx2 && p.f16c ? run_avx2() : nullptr,
                                            run_portable()};
    return found;
}

std::vector<std::string> available() { return choices().available(); }

// kFloat8E8m0: powers of two. kNested: bytes b, for map[b] * outer[index / outer_group] + offset.
enum class ScaleFormat : int { kFloat32, kBfloat16, kFloat16, kFloat8E8m0, kNested };

struct Scales {
    ScaleFormat format;
    const uint8_t* data;  // row after row
    uint64_t rows, columns;  // of the numbers under one scale
    uint64_t into_group;     // columns of the first scale that come before the matrix
    const float* map;
    const float* outer;
    uint64_t outer_group, into_outer;
    float offset;
    const float* zeros;  // as many as scales, or null
};

using ScaleArguments = std::tuple<ScaleFormat, uint64_t, uint64_t, uint64_t, uint64_t>;  // in the order of Scales
using NestedArguments = std::tuple<uint64_t, uint64_t, uint64_t, uint64_t, float>;       // from `map` on

template <typename T>
T read(const uint8_t* from, uint64_t index) {
    T value;
    std::memcpy(&value, from + index * sizeof value, sizeof value);
    return value;
}

float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

float plain_scale(const Scales& s, uint64_t index) {
    switch (s.format) {
        case ScaleFormat::kFloat32: return read<float>(s.data, index);
        case ScaleFormat::kBfloat16: return as_float(uint32_t{read<uint16_t>(s.data, index)} << 16);
        case ScaleFormat::kFloat16: return read<_Float16>(s.data, index);
        case ScaleFormat::kFloat8E8m0: {
            const uint32_t exponent = s.data[index];
            return as_float(exponent == 255 ? 0x7fc00000u : exponent == 0 ? 0x00400000u : exponent << 23);
        }
        case ScaleFormat::kNested: break;
    }
    return 0.0f;
}

// `count` of them from `index` on. A division for each nested one would take as long as decoding its numbers does.
void read_scales(const Scales& s, uint64_t index, uint64_t count, float* to) {
    if (s.format != ScaleFormat::kNested) {
        for (uint64_t i = 0; i < count; ++i) to[i] = plain_scale(s, index + i);
        return;
    }
    const float* const map = s.map;
    const float offset = s.offset;
    while (count) {
        const uint64_t outer = (index + s.into_outer) / s.outer_group;
        const uint64_t run = std::min(count, (outer + 1) * s.outer_group - s.into_outer - index);
        const float top = s.outer[outer];
        const uint8_t* const codes = s.data + index;
        for (uint64_t i = 0; i < run; ++i) to[i] = map[codes[i]] * top + offset;
        index += run, count -= run, to += run;
    }
}

struct Matrix {
    const uint8_t* codes;
    bool odd;
    uint64_t rows, columns;
    char* target;
};

void decode_matrix(RunFunction function, const Pass& pass, const Matrix& m, const Scales& scales, int threads) {
    const uint64_t piece = std::min(kPiece, kPieceGroups * std::min(scales.columns, kPiece)), size = size_of(pass.target_dtype);
    const uint64_t pieces = (m.columns + piece - 1) / piece, bits = bits_of(pass.code);
    const uint64_t row_groups = (scales.into_group + m.columns + scales.columns - 1) / scales.columns;
    auto one = [&](uint64_t index) {
        const uint64_t row = index / pieces, first = index % pieces * piece;
        const uint64_t count = std::min(piece, m.columns - first), number = row * m.columns + first;
        const uint64_t before = scales.into_group + first, group = before / scales.columns;
        const uint64_t groups = (before + count - 1) / scales.columns + 1 - group;
        float of_groups[kPieceGroups + 1];
        if (scales.data) read_scales(scales, row / scales.rows * row_groups + group, groups, of_groups);
        const float* zeros = scales.zeros ? scales.zeros + row / scales.rows * row_groups + group : nullptr;
        function(pass, {m.codes + number * bits / 8, m.odd, count, of_groups, zeros, scales.columns, before % scales.columns,
                        m.target + number * size});
    };
    in_parallel(m.rows * pieces, std::max<uint64_t>(1, kNumbersAtOnce / std::min(piece, m.columns)), threads, one);
}

void run(const std::string& instructions, Code code, uint64_t codes, bool odd, uint64_t rows, uint64_t columns,
         const std::vector<float>& table, const ScaleArguments& scale_arguments, const NestedArguments& nested_arguments,
         uint64_t zeros, float factor, Dtype rounded, uint64_t target, Dtype target_dtype, int threads) {
    const RunFunction function = choices().named(instructions);
    const auto& [format, address, group_rows, group_columns, into_group] = scale_arguments;
    const auto& [map, outer, outer_group, into_outer, offset] = nested_arguments;
    if (rows == 0 || columns == 0) return;
    const int bits = bits_of(code);
    if (!codes || !target || (bits != 16 && !address) || (bits != 16 && format == ScaleFormat::kNested && !(map && outer)))
        throw std::invalid_argument("a null address");
    if (bits == 4 && (table.size() != 16 || (rows > 1 && (columns % 2 || odd))))
        throw std::invalid_argument("expected a table of 16 numbers, and rows of whole bytes");
    if (group_rows == 0 || group_columns == 0 || into_group >= group_columns || outer_group == 0)
        throw std::invalid_argument("expected groups of a row and a column or more, and to begin within one");
    const Scales scales{format, reinterpret_cast<const uint8_t*>(address), group_rows, group_columns, into_group,
                        reinterpret_cast<const float*>(map), reinterpret_cast<const float*>(outer), outer_group, into_outer,
                        offset, reinterpret_cast<const float*>(zeros)};
    const Pass pass{code, table.data(), factor, rounded == target_dtype ? Dtype::kFloat32 : rounded, target_dtype,
                    rows * columns * size_of(target_dtype) >= kStreamedBytes};
    nb::gil_scoped_release release;
    decode_matrix(function, pass, {reinterpret_cast<const uint8_t*>(codes), odd, rows, columns, reinterpret_cast<char*>(target)},
                  scales, threads);
}

}  // namespace

}  // namespace decode

void register_decode(nb::module_& m) {
    nb::module_ sub = m.def_submodule("decode", "Numbers of packed weights.");
    using decode::Code, decode::ScaleFormat;
    nb::enum_<Code>(sub, "Code", "What is decoded.")
        .value("four_bit", Code::kFourBit, "16 codes, the first of a byte in its high half.")
        .value("four_bit_low", Code::kFourBitLow, "16 codes, the first of a byte in its low half.")
        .value("int8", Code::kInt8)
        .value("float8_e4m3fn", Code::kFloat8E4m3)
        .value("float8_e5m2", Code::kFloat8E5m2)
        .value("bfloat16", Code::kBfloat16, "Without scales.")
        .value("float16", Code::kFloat16, "Without scales.");
    nb::enum_<ScaleFormat>(sub, "ScaleFormat", "How scales are stored.")
        .value("float32", ScaleFormat::kFloat32)
        .value("bfloat16", ScaleFormat::kBfloat16)
        .value("float16", ScaleFormat::kFloat16)
        .value("float8_e8m0fnu", ScaleFormat::kFloat8E8m0)
        .value("nested", ScaleFormat::kNested);
    sub.def("available", &decode::available, "Instruction sets whose code can run here, fastest first.");
    sub.def("run", &decode::run, nb::arg("instructions"), nb::arg("code"), nb::arg("codes"), nb::arg("odd"), nb::arg("rows"),
            nb::arg("columns"), nb::arg("table"), nb::arg("scales"), nb::arg("nested"), nb::arg("zeros"), nb::arg("factor"), nb::arg("rounded"),
            nb::arg("target"), nb::arg("target_dtype"), nb::arg("threads"));
}
