#pragma once

#include <nanobind/nanobind.h>

// Adds the submodule `blocks`: the kernels behind `decode_blocks` in offload/weights/formats/native_kernels.py.
void register_blocks(nanobind::module_& m);
