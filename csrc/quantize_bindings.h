#pragma once

#include <nanobind/nanobind.h>

// Adds the submodule `quantize`: the kernels behind offload/quantize/kernels.py.
void register_quantize(nanobind::module_& m);
