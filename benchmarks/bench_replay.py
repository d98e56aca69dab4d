"""How long `finetune export` takes to apply a long journal to a checkpoint, and whether what it writes is right.

    python benchmarks/bench_replay.py --model DIR --steps 1000 --work DIR [--noise rademacher] [--limit-command "CMD"]

A journal of random scalars is written as a run would write it. Printed: seconds of the export, seconds of as many fused passes
(bf16 in and out, one update each) over all weights, by the rate of one block; and the largest difference of some elements of
some tensors, computed again in NumPy.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from finetune.config import Config
from finetune.methods.zeroth_order import probe_seed
from finetune.offload.files.checkpoint import read_checkpoint
from finetune.offload.noise.noise import Group, Noise, Parameter, Target, Update, move, parameter_key
from finetune.offload.perturb.journal import Journal, Record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import noise_reference as reference  # noqa: E402


def write_journal(config: Config, steps: int) -> Journal:
    config.output.mkdir(parents=True)
    about = {
        "model": Path(config.model).name, "noise": config.zo.noise, "rank": 0, "group_steps": config.zo.group_steps,
        "rounding": "exact", "seed": 42, "zo": {"parameters": "all"},
    }  # fmt: skip
    journal = Journal.create(config.output / "journal.zo", about)
    rng = np.random.default_rng(1)
    for step in range(steps):
        scalar = float(rng.normal())
        journal.append(Record(step, 1e-6, (Update(probe_seed(42, step, 0), -1e-6 * scalar),), scalars=(scalar,)))
    return journal


def seconds_of_a_pass(noise: Noise, elements: int) -> float:
    """A fused pass over `elements` bf16 weights: a pending update, one target in place."""
    block = torch.randn(48_000_000).bfloat16()
    times = []
    for i in range(7):
        started = time.perf_counter()
        move(noise, Parameter(1), block, [Group(1.0, (Update(i, 1e-6),))], [Target(block)])
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * elements / block.numel()


def largest_difference(model: Path, tuned: Path, journal: Journal, count: int = 4096) -> tuple[float, int]:
    """Of the first `count` elements of every 40th tensor and of the last; how many elements were compared."""
    largest, compared = 0.0, 0
    names = sorted(name for name in read_checkpoint(model).tensors)
    for name in [*names[::40], names[-1]]:
        values = []
        for directory in (model, tuned):
            with safe_open(read_checkpoint(directory).tensors[name].path, "pt") as file:
                values.append(file.get_slice(name)[:].flatten()[:count])
        expected = reference.moved(journal.noise.kind, parameter_key(name), values[0], journal.groups(0))
        expected = expected.to(values[0].dtype).float()
        largest = max(largest, float((expected - values[1].float()).abs().max()))
        compared += len(expected)
    return largest, compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--noise", choices=("rademacher", "gaussian"), default="rademacher")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit-command", default="")
    arguments = parser.parse_args()
    config = Config(
        model=str(arguments.model), method="zo", output=arguments.work / "run", zo={"noise": arguments.noise}
    )
    journal = write_journal(config, arguments.steps)
    journal.close()
    elements = sum(int(np.prod(entry.shape)) for entry in read_checkpoint(arguments.model).tensors.values())
    one_pass = seconds_of_a_pass(Noise(arguments.noise), elements)
    tuned = arguments.work / "tuned"
    command = shlex.split(arguments.limit_command) + [
        sys.executable, "-m", "finetune", "export", "--model", str(arguments.model), "--output", str(config.output),
        "--to", str(tuned),
    ]  # fmt: skip
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if result.returncode:
        sys.exit(result.stderr[-2000:])
    if arguments.limit_command:
        print(result.stderr.splitlines()[-1])
    difference, compared = largest_difference(arguments.model, tuned, journal)
    print(
        f"{arguments.steps} steps of {arguments.noise} over {elements / 1e9:.2f}e9 weights: {seconds:.1f} s; as many fused "
        f"passes: {arguments.steps * one_pass:.0f} s ({one_pass:.3f} s each); largest difference of {compared} elements "
        f"to NumPy: {difference:g}"
    )


if __name__ == "__main__":
    main()
