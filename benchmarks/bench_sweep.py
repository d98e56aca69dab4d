"""A sweep against its runs alone: bytes read, bits, time.

    python benchmarks/bench_sweep.py --model DIR --data FILE --host-memory 2GiB --sequence-length 512 --runs 8

The runs differ in rank and learning rate, each with `--batch-size` rows a step. Each is done alone first, then all are done
by `finetune sweep`, every time in a process of its own; the first step is not counted. `--limit-command "CMD"` is put before
these commands, to run them under a kernel memory limit. Adapters and losses must be the same, byte for byte. Printed: bytes
read a step by one run and by the sweep; seconds a step of the sweep against the sum of what the runs compute alone, which is
their seconds without those in which they waited for the disk; peaks. `--alone N` does only so many alone: the others' computes
are taken to be like those.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from running import run_finetune

RATES = ("1e-4", "3e-4", "1e-5", "3e-5")


def names_of(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    return [(rank, rate) for rank in arguments.ranks for rate in RATES][: arguments.runs]


def run_sweep(arguments: argparse.Namespace, output: str, base: list[str]) -> None:
    files = []
    for rank, rate in names_of(arguments):
        path = Path(output).parent / f"r{rank}-{rate}.yaml"
        path.write_text(f"lora: {{r: {rank}}}\ntraining: {{learning_rate: {rate}}}\n")
        files.append(str(path))
    command = [*shlex.split(arguments.limit_command), sys.executable, "-m", "finetune", "sweep", *files, *base]
    command += ["--output", output]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"finetune sweep failed:\n{result.stderr[-3000:]}")
    print(next(line for line in result.stderr.splitlines() if "step together" in line or "fit together" in line))
    if arguments.limit_command:
        print(result.stderr.splitlines()[-1])


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--host-memory", required=True)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--alone", type=int, help="runs that are done alone; all, if not given")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit-command", default="")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    given = list(arguments.set)
    base = [
        "--model", arguments.model, "--data", arguments.data, "--host-memory", arguments.host_memory,
        "--max-steps", str(arguments.steps), "--batch-size", str(arguments.batch_size),
        "--micro-batch-size", str(arguments.micro_batch_size), "--sequence-length", str(arguments.sequence_length),
    ]  # fmt: skip
    for setting in ["training.lr_scheduler=constant", "training.save_steps=100000", *given]:
        base += ["--set", setting]
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        alone = {}
        for rank, rate in names_of(arguments)[: arguments.alone]:
            arguments.set = [*given, f"lora.r={rank}", f"training.learning_rate={rate}"]
            name = f"r{rank}-{rate}"
            alone[name] = run_finetune(arguments, f"{scratch}/{name}", "lora")
            print(f"{name} alone: {[round(row['seconds'], 2) for row in alone[name]]} s", flush=True)
        run_sweep(arguments, f"{scratch}/sweep", base)
        report(Path(scratch), alone, names_of(arguments))


def report(scratch: Path, alone: dict[str, list[dict]], names: list[tuple[int, str]]) -> None:
    for name, rows in alone.items():
        files = [scratch / folder / name / "adapter" / "adapter_model.safetensors" for folder in ("sweep", ".")]
        together = rows_of(scratch / "sweep" / name)
        same = files[0].read_bytes() == files[1].read_bytes() and [x["loss"] for x in together] == [x["loss"] for x in rows]
        print(f"{name}: {'the same bits' if same else 'OTHER BITS'}")
    last = [rows_of(scratch / "sweep" / f"r{rank}-{rate}") for rank, rate in names]
    steps = [row for rows in alone.values() for row in rows[1:]]
    read = [statistics.median(row["disk_read_bytes"] for row in rows) / 2**30 for rows in (steps, last[0][1:])]
    print(f"read a step: {read[0]:.3f} GiB alone, {read[1]:.3f} GiB together")
    computes = len(names) * statistics.mean(row["seconds"] - row["stall_seconds"] for row in steps)
    seconds = statistics.median(max(rows[i]["seconds"] for rows in last) for i in range(1, len(last[0])))
    stalled = statistics.median(row["stall_seconds"] for row in last[0][1:])
    print(f"{seconds:.2f} s a step of all, stalled {stalled:.2f} s; {len(names)} computes take {computes:.2f} s")
    print(f"ratio {seconds / computes:.3f}")
    peaks = [max(row["host_peak_bytes"] for row in rows) / 2**30 for rows in (steps, [row for rows in last for row in rows])]
    print(f"peak: {peaks[0]:.2f} GiB alone, {peaks[1]:.2f} GiB together")


if __name__ == "__main__":
    main()
