// The extension module: one submodule for each kind of native work.
#include <nanobind/nanobind.h>

#include "io_bindings.h"
#if __has_include("arena.h")
#include "arena.h"
#endif

NB_MODULE(finetune_native, m) {
    m.doc() = "Native parts of finetune: disk I/O and memory.";
    register_io(m);
#if __has_include("arena.h")
    register_arena(m);
#endif
}
