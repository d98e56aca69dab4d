#pragma once

#include <nanobind/nanobind.h>

// Adds the submodule `decode`: the kernels behind offload/weights/formats/native_kernels.py.
void register_decode(nanobind::module_& m);
