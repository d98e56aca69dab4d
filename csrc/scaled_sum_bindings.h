#pragma once

#include <nanobind/nanobind.h>

// Adds the submodule `scaled_sum`: the kernels behind offload/step/scaled_sum.py.
void register_scaled_sum(nanobind::module_& m);
