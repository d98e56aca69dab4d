#pragma once

#include <nanobind/nanobind.h>

// Adds the submodule `lossless`: the kernels behind offload/weights/formats/lossless.py.
void register_lossless(nanobind::module_& m);
