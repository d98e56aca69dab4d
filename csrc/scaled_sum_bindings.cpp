// Python's view of scaled sums: addresses, checks and threads.
#include "scaled_sum_bindings.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "dispatch.h"
#include "scaled_sum.h"

namespace nb = nanobind;

namespace scaled_sum {

namespace {

constexpr uint64_t kAtOnce = 1 << 16;  // numbers that a thread takes from the common count

template <typename Piece>
void in_pieces(uint64_t count, int threads, Piece piece) {
    nb::gil_scoped_release release;
    in_parallel((count + kAtOnce - 1) / kAtOnce, 1, threads,
                [&](uint64_t i) { piece(i * kAtOnce, std::min(kAtOnce, count - i * kAtOnce)); });
}

void check(std::initializer_list<uint64_t> addresses, Dtype dtype) {
    if (std::find(addresses.begin(), addresses.end(), 0u) != addresses.end()) throw std::invalid_argument("a null address");
    if (dtype == Dtype::kFloat16) throw std::invalid_argument("expected fp32 or bf16");
}

void bound_add(uint64_t out, uint64_t result, uint64_t update, float scaling, Dtype dtype, uint64_t count, int threads) {
    check({out, result, update}, dtype);
    in_pieces(count, threads, [&](uint64_t start, uint64_t size) {
        add(reinterpret_cast<char*>(out) + start * size_of(dtype),
            reinterpret_cast<const char*>(result) + start * size_of(dtype), reinterpret_cast<const float*>(update) + start,
            scaling, dtype, size);
    });
}

void bound_scale(uint64_t out, uint64_t gradient, float scaling, Dtype dtype, uint64_t count, int threads) {
    check({out, gradient}, dtype);
    in_pieces(count, threads, [&](uint64_t start, uint64_t size) {
        scale(reinterpret_cast<float*>(out) + start, reinterpret_cast<const char*>(gradient) + start * size_of(dtype), scaling,
              dtype, size);
    });
}

}  // namespace

}  // namespace scaled_sum

void register_scaled_sum(nb::module_& m) {
    nb::module_ sub = m.def_submodule("scaled_sum", "What adapters add to outputs of layers.");
    sub.def("add", &scaled_sum::bound_add, nb::arg("out"), nb::arg("result"), nb::arg("update"), nb::arg("scaling"),
            nb::arg("dtype"), nb::arg("count"), nb::arg("threads"));
    sub.def("scale", &scaled_sum::bound_scale, nb::arg("out"), nb::arg("gradient"), nb::arg("scaling"), nb::arg("dtype"),
            nb::arg("count"), nb::arg("threads"));
}
