#pragma once

#include <nanobind/nanobind.h>

// Adds the submodule `noise`: the kernels behind offload/noise/noise.py.
void register_noise(nanobind::module_& m);

// Adds the pass along low-rank noise to it.
void register_low_rank(nanobind::module_& noise);
