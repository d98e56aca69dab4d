// The extension module: one submodule for each kind of native work.
#include <nanobind/nanobind.h>

#include "arena.h"
#include "blocks_bindings.h"
#include "decode_bindings.h"
#include "io_bindings.h"
#include "kernels.h"
#include "lossless_bindings.h"
#include "noise_bindings.h"
#include "optimizer_bindings.h"
#include "quantize_bindings.h"
#include "rms_norm_bindings.h"
#include "scaled_sum_bindings.h"

NB_MODULE(finetune_native, m) {
    m.doc() = "Native parts of finetune: disk I/O, memory, noise, optimizers and decoders.";
    // After Ctrl-C the traceback keeps an engine alive until the interpreter ends: nothing a user should read about.
    nanobind::set_leak_warnings(false);
    nanobind::enum_<Dtype>(m, "Dtype", "Of the numbers at an address.")
        .value("float32", Dtype::kFloat32)
        .value("bfloat16", Dtype::kBfloat16)
        .value("float16", Dtype::kFloat16);
    register_io(m);
    register_arena(m);
    register_noise(m);
    register_optimizer(m);
    register_decode(m);
    register_blocks(m);
    register_quantize(m);
    register_lossless(m);
    register_rms_norm(m);
    register_scaled_sum(m);
}
