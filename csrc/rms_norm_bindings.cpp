// Python's view of root mean square norms: addresses, checks and threads.
#include "rms_norm_bindings.h"

#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <tuple>

#include "dispatch.h"
#include "rms_norm.h"

namespace nb = nanobind;

namespace rms_norm {

namespace {

constexpr uint64_t kNumbersAtOnce = 1 << 15;  // what a thread takes from the common count

using Arguments = std::tuple<uint64_t, uint64_t, uint64_t, uint64_t>;  // x, weight, rows, columns

// one(rows, row, offset): what has the shape of x begins with its row at `offset`.
template <typename One>
void for_rows(const Arguments& arguments, std::initializer_list<uint64_t> others, int threads, One one) {
    const auto [x, weight, count, columns] = arguments;
    if (!x || !weight || std::find(others.begin(), others.end(), 0u) != others.end())
        throw std::invalid_argument("a null address");
    const Rows rows{reinterpret_cast<const uint16_t*>(x), reinterpret_cast<const uint16_t*>(weight), columns};
    nb::gil_scoped_release release;
    in_parallel(count, std::max<uint64_t>(1, kNumbersAtOnce / std::max<uint64_t>(1, columns)), threads,
                [&](uint64_t row) { one(rows, row, row * rows.columns); });
}

void bound_forward(const Arguments& arguments, uint64_t scales, uint64_t out, int threads) {
    for_rows(arguments, {scales, out}, threads, [&](const Rows& rows, uint64_t row, uint64_t offset) {
        forward(rows, row, reinterpret_cast<const float*>(scales)[row], reinterpret_cast<uint16_t*>(out) + offset);
    });
}

void bound_products(const Arguments& arguments, uint64_t gradient, uint64_t out, int threads) {
    for_rows(arguments, {gradient, out}, threads, [&](const Rows& rows, uint64_t row, uint64_t offset) {
        products(rows, row, reinterpret_cast<const uint16_t*>(gradient) + offset, reinterpret_cast<float*>(out) + offset);
    });
}

void bound_backward(const Arguments& arguments, uint64_t gradient, uint64_t scales, uint64_t slopes, uint64_t out,
                    int threads) {
    for_rows(arguments, {gradient, scales, slopes, out}, threads, [&](const Rows& rows, uint64_t row, uint64_t offset) {
        backward(rows, row, reinterpret_cast<const uint16_t*>(gradient) + offset, reinterpret_cast<const float*>(scales)[row],
                 reinterpret_cast<const float*>(slopes)[row], reinterpret_cast<uint16_t*>(out) + offset);
    });
}

}  // namespace

}  // namespace rms_norm

void register_rms_norm(nb::module_& m) {
    nb::module_ sub = m.def_submodule("rms_norm", "Passes over memory of root mean square norms.");
    sub.def("forward", &rms_norm::bound_forward, nb::arg("rows"), nb::arg("scales"), nb::arg("out"), nb::arg("threads"));
    sub.def("products", &rms_norm::bound_products, nb::arg("rows"), nb::arg("gradient"), nb::arg("out"), nb::arg("threads"));
    sub.def("backward", &rms_norm::bound_backward, nb::arg("rows"), nb::arg("gradient"), nb::arg("scales"),
            nb::arg("slopes"), nb::arg("out"), nb::arg("threads"));
}
