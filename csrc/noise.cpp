// Python's view of the noise: choice of the instruction set, threads, and checks of what the kernel takes on trust.
#include "noise.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "noise_bindings.h"

namespace nb = nanobind;

namespace noise {

namespace {

constexpr uint64_t kTilesAtOnce = 64;              // what a thread takes from the common count: runs that prefetchers follow
constexpr uint64_t kStreamedElements = 2'000'000;  // smaller targets are still cached when they are multiplied

const Choices<TileFunction>& choices() {
    static const Processor p;
    static const Choices<TileFunction> found{p.avx512 && p.avx512_vbmi && p.gfni ? tile_avx512() : nullptr,
                                             p.avx2 && p.f16c ? tile_avx2() : nullptr, tile_portable()};
    return found;
}

std::vector<std::string> available() { return choices().available(); }

using SegmentArguments = std::tuple<uint64_t, uint64_t>;  // first element, count
using UpdateArguments = std::tuple<uint64_t, float>;      // seed, coefficient
using GroupArguments = std::tuple<float, std::vector<UpdateArguments>, Rounding, Dtype, uint64_t>;  // in the order of Group
using TargetArguments = std::tuple<uint64_t, Dtype, uint64_t, float>;                               // in the order of Target

struct Segment {
    uint64_t first, count, at, tiles_before;
};

void run(const std::string& instructions, Kind kind, uint64_t parameter, uint64_t source, Dtype source_dtype,
         const std::vector<SegmentArguments>& segment_arguments, const std::vector<GroupArguments>& group_arguments,
         const std::vector<TargetArguments>& target_arguments, int threads) {
    const TileFunction tile = choices().named(instructions);
    std::vector<std::vector<Update>> updates;
    std::vector<Group> groups;
    for (const auto& [scale, entries, rounding, rounded_to, rounding_seed] : group_arguments) {
        auto& list = updates.emplace_back();
        for (const auto& [seed, coefficient] : entries) list.push_back({seed, coefficient});
        groups.push_back({scale, nullptr, static_cast<int>(list.size()), rounding, rounded_to, rounding_seed});
    }
    for (size_t i = 0; i < groups.size(); ++i) groups[i].updates = updates[i].data();
    std::vector<Target> targets;
    for (const auto& [address, dtype, seed, coefficient] : target_arguments) {
        if (address == 0 && !segment_arguments.empty()) throw std::invalid_argument("a target with a null address");
        targets.push_back({reinterpret_cast<void*>(address), dtype, seed, coefficient});
    }
    std::vector<Segment> segments;
    uint64_t at = 0, tiles = 0;
    for (const auto& [first, count] : segment_arguments) {
        if (count == 0) continue;
        segments.push_back({first, count, at, tiles});
        at += count;
        tiles += (first + count - 1) / kTile - first / kTile + 1;
    }
    if (at && source == 0) throw std::invalid_argument("a source with a null address");

    const Pass pass{kind, parameter, reinterpret_cast<const void*>(source), source_dtype, groups.data(),
                    static_cast<int>(groups.size()), targets.data(), static_cast<int>(targets.size()),
                    at >= kStreamedElements};
    auto one = [&](uint64_t index) {
        auto after = std::upper_bound(segments.begin(), segments.end(), index,
                                      [](uint64_t i, const Segment& s) { return i < s.tiles_before; });
        const Segment& s = *(after - 1);
        const uint64_t number = s.first / kTile + index - s.tiles_before;
        const uint64_t low = std::max(s.first, number * kTile), high = std::min(s.first + s.count, (number + 1) * kTile);
        tile(pass, number, static_cast<int>(low - number * kTile), static_cast<int>(high - number * kTile),
             s.at + low - s.first);
    };
    nb::gil_scoped_release release;
    in_parallel(tiles, kTilesAtOnce, threads, one);
}

}  // namespace

}  // namespace noise

void register_noise(nb::module_& m) {
    nb::module_ sub = m.def_submodule("noise", "Counter-based noise and the pass that moves weights by it.");
    using noise::Kind, noise::Rounding;
    nb::enum_<Kind>(sub, "Kind").value("rademacher", Kind::kRademacher).value("gaussian", Kind::kGaussian);
    nb::enum_<Rounding>(sub, "Rounding", "Of what updates were added to.")
        .value("exact", Rounding::kNone)
        .value("nearest", Rounding::kNearest)
        .value("stochastic", Rounding::kStochastic);
    sub.def("available", &noise::available, "Instruction sets whose code can run here, fastest first.");
    sub.def("run", &noise::run, nb::arg("instructions"), nb::arg("kind"), nb::arg("parameter"), nb::arg("source"),
            nb::arg("source_dtype"), nb::arg("segments"), nb::arg("groups"), nb::arg("targets"), nb::arg("threads"));
    register_low_rank(sub);
}
