// Python's view of the optimizers: choice of the instruction set, threads, and checks of what the kernels take on trust.
#include "optimizer.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "norm.h"
#include "optimizer_bindings.h"

namespace nb = nanobind;

namespace optimizer {

namespace {

constexpr uint64_t kTilesAtOnce = 8;  // what a thread takes from the common count: runs that prefetchers follow

const Choices<const Functions*>& choices() {
    static const Processor p;
    static const Choices<const Functions*> found{p.avx512 ? functions_avx512() : nullptr,
                                                 p.avx2 && p.fma && p.f16c ? functions_avx2() : nullptr,
                                                 functions_portable()};
    return found;
}

std::vector<std::string> available() { return choices().available(); }

// unit, count, weights, weight dtype, gradients, gradient dtype, copy, element
using SegmentArguments = std::tuple<uint64_t, uint64_t, uint64_t, Dtype, uint64_t, Dtype, uint64_t, uint64_t>;
using StateArguments = std::array<uint64_t, 5>;  // addresses in the order of State, 0 where there is none

State state_of(const StateArguments& addresses, bool wanted, bool coded) {
    if (!wanted) return {};
    for (int i = 0; i < (coded ? 5 : 1); ++i)
        if (addresses[i] == 0) throw std::invalid_argument("state with a null address");
    return {reinterpret_cast<char*>(addresses[0]), reinterpret_cast<float*>(addresses[1]),
            reinterpret_cast<const float*>(addresses[2]), reinterpret_cast<const float*>(addresses[3]),
            reinterpret_cast<const uint8_t*>(addresses[4])};
}

std::pair<double, double> run(const std::string& instructions, Rule rule, StateFormat format, Root root, bool stochastic,
                              uint64_t seed, const std::array<float, 9>& scalars, uint64_t units, uint64_t remainder,
                              const StateArguments& first, const StateArguments& second,
                              const std::vector<SegmentArguments>& segment_arguments, int threads) {
    const Functions& functions = *choices().named(instructions);
    Pass pass{};
    pass.rule = rule;
    pass.format = format;
    pass.root = root;
    pass.stochastic = stochastic;
    pass.seed = seed;
    static_assert(sizeof(Scalars) == sizeof scalars);
    std::memcpy(&pass.scalars, scalars.data(), sizeof scalars);
    pass.units = units;
    pass.remainder = reinterpret_cast<int16_t*>(remainder);
    const bool coded = pass.format == StateFormat::kEightBit, empty = segment_arguments.empty();
    pass.first = state_of(first, has_state(pass.rule) && !empty, coded);
    pass.second = state_of(second, pass.rule == Rule::kAdamW && !empty, coded);

    std::vector<Segment> segments;
    uint64_t after = 0;
    for (const auto& [unit, count, weights, weight_dtype, gradients, gradient_dtype, copy, element] : segment_arguments) {
        if (weights == 0 || gradients == 0) throw std::invalid_argument("a segment with a null address");
        if (unit < after || unit > units || count > units - unit)
            throw std::invalid_argument("segments must be sorted, apart and within the piece");
        if (weight_dtype == Dtype::kFloat16 && (remainder || stochastic))
            throw std::invalid_argument("float16 weights are rounded to nearest and have no remainder");
        if (gradient_dtype == Dtype::kFloat16) throw std::invalid_argument("expected fp32 or bf16 gradients");
        after = unit + count;
        segments.push_back({unit, count, reinterpret_cast<char*>(weights), weight_dtype,
                            reinterpret_cast<const char*>(gradients), gradient_dtype, reinterpret_cast<char*>(copy),
                            element});
    }
    pass.segments = segments.data();
    pass.segment_count = segments.size();

    nb::gil_scoped_release release;
    const uint64_t tiles = (after + kTile - 1) / kTile;
    std::vector<Sums> of_tiles(tiles);
    in_parallel(tiles, kTilesAtOnce, threads, [&](uint64_t i) { of_tiles[i] = functions.update_tile(pass, i); });
    std::pair<double, double> sums{0.0, 0.0};  // in the tiles' order, whatever the threads
    for (const Sums& s : of_tiles) sums.first += s.change, sums.second += s.weights;
    return sums;
}

void square_roots(const std::string& instructions, Root root, uint64_t from, uint64_t to, uint64_t count) {
    const Functions& functions = *choices().named(instructions);
    if (count % kGroup || !from || !to) throw std::invalid_argument("expected whole groups at addresses that are not null");
    functions.square_roots(root, reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to), count);
}

uint64_t checksum(const std::string& instructions, uint64_t address, uint64_t num_bytes, int threads) {
    const Functions& functions = *choices().named(instructions);
    if (num_bytes && !address) throw std::invalid_argument("a null address");
    nb::gil_scoped_release release;
    const char* bytes = reinterpret_cast<const char*>(address);
    const uint64_t tiles = (num_bytes + kChecksumTile - 1) / kChecksumTile;
    std::atomic<uint64_t> total{0};
    in_parallel(tiles, 1, threads, [&](uint64_t tile) {
        constexpr uint64_t kStride = 4 * kChecksumLanes;
        uint32_t lanes[kChecksumLanes];
        for (int lane = 0; lane < kChecksumLanes; ++lane) lanes[lane] = lane;
        const char* from = bytes + tile * kChecksumTile;
        const uint64_t size = std::min(kChecksumTile, num_bytes - tile * kChecksumTile), whole = size / kStride * kStride;
        functions.checksum_words(reinterpret_cast<const uint32_t*>(from), whole / 4, lanes);
        if (whole < size) {
            alignas(64) char rest[kStride] = {};
            std::memcpy(rest, from + whole, size - whole);
            functions.checksum_words(reinterpret_cast<const uint32_t*>(rest), kChecksumLanes, lanes);
        }
        uint64_t sum = 0;  // of a bijection of every lane: one lane that changes always changes it
        for (int lane = 0; lane < kChecksumLanes; ++lane) sum += mix64(uint64_t{lanes[lane]} | (uint64_t(lane) + 1) << 32);
        total += mix64(sum ^ mix64(tile + 1));
    });
    return mix64(total ^ mix64(num_bytes));
}

void add_squares(uint64_t lanes, int width, uint64_t address, Dtype dtype, uint64_t count) {
    if (!lanes || (count && !address)) throw std::invalid_argument("a null address");
    nb::gil_scoped_release release;
    norm::add_squares(reinterpret_cast<float*>(lanes), width, reinterpret_cast<const char*>(address), dtype, count);
}

float sum_of_squares(uint64_t lanes, int width, uint64_t address, Dtype dtype, uint64_t count) {
    if (!lanes || (count && !address)) throw std::invalid_argument("a null address");
    return norm::sum(reinterpret_cast<const float*>(lanes), width, reinterpret_cast<const char*>(address), dtype, count);
}

}  // namespace

}  // namespace optimizer

void register_optimizer(nb::module_& m) {
    nb::module_ sub = m.def_submodule("optimizer", "Update rules over streamed weights and state, and a checksum.");
    using optimizer::Rule, optimizer::StateFormat, optimizer::Root;
    nb::enum_<Rule>(sub, "Rule", "How an element's state and weight move; the formulas are in `offload.update.rules`.")
        .value("adamw", Rule::kAdamW)
        .value("lion", Rule::kLion)
        .value("sgd", Rule::kSgd)
        .value("signsgd", Rule::kSignSgd)
        .value("descent", Rule::kDescent, "Along what comes as gradient, without state.");
    nb::enum_<StateFormat>(sub, "StateFormat", "How state is kept.")
        .value("float32", StateFormat::kFloat32)
        .value("bfloat16", StateFormat::kBfloat16)
        .value("8bit", StateFormat::kEightBit);
    nb::enum_<Root>(sub, "Root", "Whose square roots AdamW takes.").value("ieee", Root::kIeee).value("mkl", Root::kMkl);
    sub.def("available", &optimizer::available, "Instruction sets whose code can run here, fastest first.");
    sub.def("run", &optimizer::run, nb::arg("instructions"), nb::arg("rule"), nb::arg("format"), nb::arg("root"),
            nb::arg("stochastic"), nb::arg("seed"), nb::arg("scalars"), nb::arg("units"), nb::arg("remainder"),
            nb::arg("first"), nb::arg("second"), nb::arg("segments"), nb::arg("threads"));
    sub.def("square_roots", &optimizer::square_roots, nb::arg("instructions"), nb::arg("root"), nb::arg("source"),
            nb::arg("target"), nb::arg("count"));
    sub.def("checksum", &optimizer::checksum, nb::arg("instructions"), nb::arg("address"), nb::arg("num_bytes"),
            nb::arg("threads"));
    sub.def("add_squares", &optimizer::add_squares, nb::arg("lanes"), nb::arg("width"), nb::arg("address"), nb::arg("dtype"),
            nb::arg("count"));
    sub.def("sum_of_squares", &optimizer::sum_of_squares, nb::arg("lanes"), nb::arg("width"), nb::arg("address"),
            nb::arg("dtype"), nb::arg("count"));
}
