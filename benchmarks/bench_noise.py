"""The perturbation pass against a plain copy of the same bytes, and against torch.normal: both cores, bf16.

    python benchmarks/bench_noise.py [--millions 64] [--repeats 15]

A pass reads weights once and writes one target (read and write: the bytes of a copy), or a pair of targets; with pending
updates it evaluates their noise too. Rounds are interleaved. Printed: billions of parameters a second, and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from finetune.offload.noise.noise import INSTRUCTION_SETS, Group, Noise, Parameter, Target, Update, move


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--millions", type=int, default=64, help="parameters; a block of a 1B to 7B model has 40 to 200"
    )
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    count = arguments.millions * 1_000_000
    source = torch.randn(count).bfloat16()
    plus, minus = torch.empty_like(source), torch.empty_like(source)
    normal = torch.empty(count)

    def one_pass(kind: str, pending: int = 0, pair: bool = False) -> Callable[[], None]:
        groups = [Group(1.0, tuple(Update(j, 1e-6) for j in range(pending)))] if pending else []
        targets = [Target(plus, 99, 1e-3)] + ([Target(minus, 99, -1e-3)] if pair else [])
        return lambda: move(Noise(kind, 4), Parameter(5, 2000), source, groups, targets)

    cases: dict[str, Callable[[], None]] = {
        "copy": lambda: plus.copy_(source),
        "torch.normal": lambda: normal.normal_(),
    }
    for kind in ("rademacher", "gaussian", "low_rank"):
        cases[f"{kind}, one target"] = one_pass(kind)
        cases[f"{kind}, a pair"] = one_pass(kind, pair=True)
        cases[f"{kind}, a pair and 8 pending"] = one_pass(kind, 8, pair=True)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(arguments.repeats + 1):
        for name, run in cases.items():
            if name == "torch.normal" and repeat > 3:
                continue
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    rate = {name: count / statistics.median(times) / 1e9 for name, times in seconds.items()}
    print(f"{arguments.millions}M parameters, bf16, {torch.get_num_threads()} threads, {INSTRUCTION_SETS[0]}")
    for name, value in rate.items():
        print(
            f"{name:34} {value:6.2f} G/s  {value / rate['copy']:5.2f} of the copy  "
            f"{value / rate['torch.normal']:6.1f} x torch.normal"
        )


if __name__ == "__main__":
    main()
