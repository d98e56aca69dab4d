"""Predicted against measured: seconds a step and peak host memory of runs from disk-bound to compute-bound, of all methods.

    python benchmarks/bench_prediction.py --model DIR --data FILE [--packed DIR] [--only NAME ...] [--steps 4]
        [--rounds 3]

Each run is a process of its own, one after the other; its report has what was predicted before its first step. All runs go
round after round, so that what the machine does meanwhile meets all of them: of each, the median of its errors counts.
`--packed` is the same model in a packed format. `--limit-command "CMD"` is put before each run. Rows of `--data` need 512
tokens.
Printed: both, their ratio, then the median and the worst error over all kinds of runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

CASES = {
    "lora 1 x 512": "--method lora --host-memory 1GiB --batch-size 1 --sequence-length 512",
    "lora 1 x 32": "--method lora --host-memory 1GiB --batch-size 1 --sequence-length 32",
    "lora 4 x (1 x 256)": "--method lora --host-memory 1GiB --batch-size 4 --sequence-length 256",
    "lora 2 x 256, half resident": "--method lora --host-memory 2GiB --batch-size 2 --micro-batch-size 2 --sequence-length 256",
    "lora 1 x 512, all resident": "--method lora --host-memory 6GiB --batch-size 1 --sequence-length 512",
    "lora over packed, 1 x 512": "--method lora --host-memory 1GiB --batch-size 1 --sequence-length 512",
    "lora over packed, 4 x (1 x 128)": "--method lora --host-memory 1GiB --batch-size 4 --sequence-length 128",
    "zo 1 x 512": "--method zo --host-memory 1GiB --batch-size 1 --sequence-length 512",
    "zo 1 x 64": "--method zo --host-memory 1GiB --batch-size 1 --sequence-length 64",
    "full 1 x 512": "--method full --host-memory 2GiB --batch-size 1 --sequence-length 512",
    "lisa 1 x 512": "--method lisa --host-memory 2GiB --batch-size 1 --sequence-length 512 --set selection.interval=1",
    "badam 1 x 512": "--method badam --host-memory 2GiB --batch-size 1 --sequence-length 512 --set selection.interval=1",
}
EACH_BLOCK = ("lisa 1 x 512", "badam 1 x 512")
"""Runs that train other blocks in each step, some of which need more memory: with as many steps as the model has blocks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--packed", help="the same model in a packed format; without it those runs are left out")
    parser.add_argument("--only", nargs="*", help="names of runs")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-command", default="")
    arguments = parser.parse_args()
    times, memories = defaultdict(list), defaultdict(list)
    print(f"{'':34}{'predicted':>10}{'measured':>10}{'ratio':>7}   {'predicted':>10}{'measured':>10}{'ratio':>7}")
    for _ in range(arguments.rounds):
        for name, options in CASES.items():
            if (arguments.only and name not in arguments.only) or ("packed" in name and not arguments.packed):
                continue
            model = arguments.packed if "packed" in name else arguments.model
            steps = arguments.steps if name not in EACH_BLOCK else num_blocks(model)
            report = run(arguments, model, [*shlex.split(options), "--max-steps", str(steps)])
            predicted, measured = report["predicted"], report["measured"]
            times[name].append(predicted["step_seconds"] / measured["step_seconds"])
            memories[name].append(predicted["host_peak_bytes"] / measured["host_peak_bytes"])
            print(
                f"{name:34}{predicted['step_seconds']:9.2f}s{measured['step_seconds']:9.2f}s{times[name][-1]:7.2f}   "
                f"{predicted['host_peak_bytes'] / 2**20:7.0f}MiB{measured['host_peak_bytes'] / 2**20:7.0f}MiB"
                f"{memories[name][-1]:7.3f}",
                flush=True,
            )
    for name, ratios in times.items():
        print(f"{name:34}median of {len(ratios)}: time {statistics.median(ratios):.2f}, memory {max(memories[name]):.3f}")
    errors = [abs(statistics.median(ratios) - 1) for ratios in times.values()]
    ratios = [ratio for of_one in memories.values() for ratio in of_one]
    print(f"error of time: median {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    print(f"predicted by measured memory: {min(ratios):.3f} to {max(ratios):.3f}")


def num_blocks(model: str) -> int:
    return json.loads(Path(model, "config.json").read_text())["num_hidden_layers"]


def run(arguments: argparse.Namespace, model: str, options: list[str]) -> dict:
    with tempfile.TemporaryDirectory(dir=".") as output:
        command = shlex.split(arguments.limit_command) + [
            sys.executable, "-m", "finetune", "run", "--model", model, "--data", arguments.data, "--output", f"{output}/run",
            *options, "--set", "training.save_steps=1000000",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{result.stderr[-3000:]}")
        return json.loads(Path(output, "run", "report.json").read_text())


if __name__ == "__main__":
    main()
