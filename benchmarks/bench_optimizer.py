"""Fused updates against a plain copy and PyTorch's fused AdamW, byte for byte, and the checksum against a plain read.

    python benchmarks/bench_optimizer.py [--millions 32] [--repeats 9] [--threads N]

An update's bytes are those of all its reads and writes; a copy's are twice its size. Rounds are interleaved; medians are
printed: GB/s, the ratio to the copy (to the read, for checksums), and billions of parameters a second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from finetune.offload.update.kernels import (
    INSTRUCTION_SETS,
    ROOT,
    Code,
    PieceState,
    Segment,
    StateFormat,
    Step,
    checksum,
    update,
)
from finetune.offload.update.rules import OPTIMIZERS
from finetune.offload.update.rules.signs import SignSgd

F32, BF16 = torch.float32, torch.bfloat16
RULES = OPTIMIZERS | {"signsgd": SignSgd}
PAUSE_SECONDS = 0.05  # PyTorch's threads spin for a while after an operation, and would take a core from the next one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=32, help="parameters")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count = arguments.millions * 1_000_000

    def weights(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(count).to(dtype)

    def one_update(
        name: str,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        state: str,
        master: bool,
        copied: bool,
        rounding: str = "nearest",
        root: str = ROOT,
    ) -> tuple[int, Callable[[], object]]:
        rule, state_format = RULES[name](weight_decay=0.01), StateFormat(state)
        sizes = state_format.array_bytes(rule, count)
        w, g = weights(dtype), weights(gradient_dtype)
        arrays = {key: torch.zeros(size, dtype=torch.uint8) for key, size in sizes.items()}
        remainder = torch.zeros(count, dtype=torch.int16) if master else 0
        copy = torch.empty_like(w) if copied else 0
        segment = Segment(0, count, w, dtype, g, gradient_dtype, copy)
        num_bytes = 2 * sum(sizes.values()) + count * (
            (2 + copied) * dtype.itemsize + gradient_dtype.itemsize + 4 * master
        )
        step, kept = Step(5, 1e-5, rounding=rounding), PieceState(count, arrays, state_format, remainder)
        return num_bytes, lambda: update(rule, step, [segment], kept, Code(root=root))

    parameter = torch.nn.Parameter(weights(F32))
    parameter.grad = weights(F32)
    fused = torch.optim.AdamW([parameter], lr=1e-5, fused=True)
    source = torch.randn(count * 4)
    target = torch.empty_like(source)
    cases: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2 * source.nbytes, lambda: target.copy_(source)),
        "torch fused AdamW, fp32": (28 * count, fused.step),
        "adamw fp32": one_update("adamw", F32, F32, "float32", False, False),
        "adamw fp32, IEEE roots": one_update("adamw", F32, F32, "float32", False, False, root="ieee"),
        "adamw bf16 + remainder, copied": one_update("adamw", BF16, BF16, "float32", True, True),
        "the same, IEEE roots": one_update("adamw", BF16, BF16, "float32", True, True, root="ieee"),
        "adamw bf16 stochastic, bf16 state": one_update("adamw", BF16, BF16, "bfloat16", False, True, rounding="stochastic"),
        "adamw bf16 stochastic, 8-bit state": one_update("adamw", BF16, BF16, "8bit", False, True, rounding="stochastic"),
        "lion bf16 + remainder, copied": one_update("lion", BF16, BF16, "float32", True, True),
        "sgd bf16 + remainder, copied": one_update("sgd", BF16, BF16, "float32", True, True),
        "signsgd bf16 + remainder, copied": one_update("signsgd", BF16, BF16, "float32", True, True),
        "read (sum of fp64)": (source.nbytes, source.view(torch.float64).sum),
        "checksum": (source.nbytes, lambda: checksum(source, source.nbytes)),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(arguments.repeats + 1):
        for name, (_, run) in cases.items():
            time.sleep(PAUSE_SECONDS)
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rate = {name: num_bytes / median[name] / 1e9 for name, (num_bytes, _) in cases.items()}
    print(f"{arguments.millions}M parameters, {arguments.threads} threads, {INSTRUCTION_SETS[0]}, {ROOT} roots")
    for name, value in rate.items():
        base, of = ("read (sum of fp64)", "read") if name in ("checksum", "read (sum of fp64)") else ("copy", "copy")
        print(
            f"{name:36} {value:6.1f} GB/s  {value / rate[base]:5.2f} of the {of}  {count / median[name] / 1e9:6.2f} G/s"
        )
    speedup = median["torch fused AdamW, fp32"] / median["adamw fp32"]
    print(f"adamw fp32 is {speedup:.2f} x as fast as torch.optim.AdamW(fused=True)")


if __name__ == "__main__":
    main()
