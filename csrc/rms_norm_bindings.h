#pragma once

#include <nanobind/nanobind.h>

// Adds the submodule `rms_norm`: the kernels behind offload/step/rms_norm.py.
void register_rms_norm(nanobind::module_& m);
