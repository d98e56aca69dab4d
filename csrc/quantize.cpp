// Python's view of quantising: choice of the instruction set, threads, and checks of what the kernels take on trust.
#include "quantize.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "quantize_bindings.h"

namespace nb = nanobind;

namespace quantize {

namespace {

constexpr uint64_t kTilesAtOnce = 16;  // what a thread takes from the common count: runs that prefetchers follow
constexpr uint64_t kRowWeights = kTile * kTilesAtOnce;

const Choices<const Functions*>& choices() {
    static const Processor p;
    static const Choices<const Functions*> found{p.avx512 ? functions_avx512() : nullptr,
                                                 p.avx2 ? functions_avx2() : nullptr, functions_portable()};
    return found;
}

std::vector<std::string> available() { return choices().available(); }

std::pair<double, double> total(const std::vector<Sums>& parts) {
    std::pair<double, double> sums{0.0, 0.0};  // in their order, whatever the threads
    for (const Sums& s : parts) sums.first += s.error, sums.second += s.weights;
    return sums;
}

std::pair<double, double> pack_4bit(const std::string& instructions, uint64_t source, Dtype dtype, uint64_t count,
                                    const std::array<float, 16>& codes, const std::array<float, 15>& bounds,
                                    uint64_t packed, const std::array<uint64_t, 3>& of_blocks, int threads) {
    const Functions& functions = *choices().named(instructions);
    for (const uint64_t address : {source, packed, of_blocks[0], of_blocks[1], of_blocks[2]})
        if (count && !address) throw std::invalid_argument("a null address");
    const Pass4Bit pass{reinterpret_cast<const void*>(source), dtype, count, codes.data(), bounds.data(),
                        reinterpret_cast<uint8_t*>(packed), reinterpret_cast<float*>(of_blocks[0]),
                        reinterpret_cast<float*>(of_blocks[1]), reinterpret_cast<float*>(of_blocks[2])};
    nb::gil_scoped_release release;
    std::vector<Sums> parts((count + kTile - 1) / kTile);
    in_parallel(parts.size(), kTilesAtOnce, threads, [&](uint64_t i) { parts[i] = functions.tile_4bit(pass, i); });
    return total(parts);
}

std::pair<double, double> pack_int8(const std::string& instructions, uint64_t source, Dtype dtype, uint64_t rows,
                                    uint64_t columns, uint64_t packed, uint64_t absmax, int threads) {
    const Functions& functions = *choices().named(instructions);
    if (rows && columns && (!source || !packed || !absmax)) throw std::invalid_argument("a null address");
    const PassInt8 pass{reinterpret_cast<const void*>(source), dtype, columns, reinterpret_cast<int8_t*>(packed),
                        reinterpret_cast<float*>(absmax)};
    nb::gil_scoped_release release;
    std::vector<Sums> parts(columns ? rows : 0);
    in_parallel(parts.size(), std::max<uint64_t>(1, kRowWeights / std::max<uint64_t>(1, columns)), threads,
                [&](uint64_t i) { parts[i] = functions.row_int8(pass, i); });
    return total(parts);
}

double nest_absmax(const std::array<uint64_t, 3>& of_blocks, uint64_t count, float offset, uint64_t numbers, uint64_t table,
                   uint64_t codes, uint64_t tops) {
    for (const uint64_t address : {of_blocks[0], of_blocks[1], of_blocks[2], numbers, table, codes, tops})
        if (count && !address) throw std::invalid_argument("a null address");
    nb::gil_scoped_release release;
    return nest({reinterpret_cast<const float*>(of_blocks[0]), reinterpret_cast<const float*>(of_blocks[1]),
                 reinterpret_cast<const float*>(of_blocks[2]), count, offset, reinterpret_cast<const float*>(numbers),
                 reinterpret_cast<const uint8_t*>(table), reinterpret_cast<uint8_t*>(codes),
                 reinterpret_cast<float*>(tops)});
}

}  // namespace

}  // namespace quantize

void register_quantize(nb::module_& m) {
    nb::module_ sub = m.def_submodule("quantize", "Weights to NF4 and LLM.int8().");
    sub.def("available", &quantize::available, "Instruction sets whose code can run here, fastest first.");
    sub.def("pack_4bit", &quantize::pack_4bit, nb::arg("instructions"), nb::arg("source"), nb::arg("dtype"),
            nb::arg("count"), nb::arg("codes"), nb::arg("bounds"), nb::arg("packed"), nb::arg("of_blocks"),
            nb::arg("threads"));
    sub.def("pack_int8", &quantize::pack_int8, nb::arg("instructions"), nb::arg("source"), nb::arg("dtype"),
            nb::arg("rows"), nb::arg("columns"), nb::arg("packed"), nb::arg("absmax"), nb::arg("threads"));
    sub.def("nest", &quantize::nest_absmax, nb::arg("of_blocks"), nb::arg("count"), nb::arg("offset"), nb::arg("numbers"),
            nb::arg("table"), nb::arg("codes"), nb::arg("tops"));
}
