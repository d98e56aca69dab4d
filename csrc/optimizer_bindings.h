#pragma once

#include <nanobind/nanobind.h>

// Adds the submodule `optimizer`: the kernels behind offload/update/kernels.py.
void register_optimizer(nanobind::module_& m);
