#pragma once

#include <nanobind/nanobind.h>

// Adds the submodule `io`: the engine behind offload/residency/io.py.
void register_io(nanobind::module_& m);
