// Python's view of the decoders of GGUF's blocks: choice of the instruction set and threads.
#include "blocks.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "blocks_bindings.h"
#include "dispatch.h"

namespace nb = nanobind;

namespace blocks {

namespace {

constexpr uint64_t kNumbersAtOnce = 65536;  // what a thread takes from the common count

const Choices<RunFunction>& choices() {
    static const Processor p;
    static const Choices<RunFunction> found{p.avx512 ? run_avx512() : nullptr, p.avx2 && p.f16c ? run_avx2() : nullptr,
                                            run_portable()};
    return found;
}

std::vector<std::string> available() { return choices().available(); }

void run(const std::string& instructions, Type type, uint64_t from, uint64_t count, uint64_t target, Dtype target_dtype,
         int threads) {
    const RunFunction function = choices().named(instructions);
    if (count == 0) return;
    if (!from || !target) throw std::invalid_argument("a null address");
    const uint64_t at_once = kNumbersAtOnce / elements_of(type);
    const uint64_t target_bytes = uint64_t(elements_of(type)) * size_of(target_dtype);
    auto one = [&](uint64_t index) {
        const uint64_t first = index * at_once;
        function(type, reinterpret_cast<const uint8_t*>(from) + first * bytes_of(type), std::min(at_once, count - first),
                 target_dtype, reinterpret_cast<char*>(target) + first * target_bytes);
    };
    nb::gil_scoped_release release;
    in_parallel((count + at_once - 1) / at_once, 1, threads, one);
}

}  // namespace

}  // namespace blocks

void register_blocks(nb::module_& m) {
    nb::module_ sub = m.def_submodule("blocks", "Numbers of GGUF's blocks.");
    using blocks::Type;
    nb::enum_<Type>(sub, "Type", "ggml's words.")
        .value("Q4_0", Type::kQ4_0)
        .value("Q4_1", Type::kQ4_1)
        .value("Q5_0", Type::kQ5_0)
        .value("Q5_1", Type::kQ5_1)
        .value("Q8_0", Type::kQ8_0)
        .value("Q2_K", Type::kQ2_K)
        .value("Q3_K", Type::kQ3_K)
        .value("Q4_K", Type::kQ4_K)
        .value("Q5_K", Type::kQ5_K)
        .value("Q6_K", Type::kQ6_K)
        .value("IQ4_NL", Type::kIq4Nl)
        .value("IQ4_XS", Type::kIq4Xs);
    sub.def("available", &blocks::available, "Instruction sets whose code can run here, fastest first.");
    sub.def("run", &blocks::run, nb::arg("instructions"), nb::arg("type"), nb::arg("blocks"), nb::arg("count"),
            nb::arg("target"), nb::arg("target_dtype"), nb::arg("threads"));
}
