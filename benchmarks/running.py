"""What the benchmarks of whole runs share: one `finetune run`, in a process of its own, maybe under a limit."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path


def run_finetune(arguments: argparse.Namespace, output: str, method: str) -> list[dict]:
    """The rows of metrics of a run with a constant learning rate; ends the benchmark when the run fails.

    arguments: model, data, host_memory, steps, batch_size, micro_batch_size, sequence_length, limit_command (put before the
    command; what it says last is printed) and set (more settings).
    """
    command = shlex.split(arguments.limit_command) + [
        sys.executable, "-m", "finetune", "run", "--method", method, "--model", arguments.model, "--data", arguments.data,
        "--output", output, "--host-memory", arguments.host_memory, "--max-steps", str(arguments.steps),
        "--batch-size", str(arguments.batch_size), "--micro-batch-size", str(arguments.micro_batch_size),
        "--sequence-length", str(arguments.sequence_length), "--set", "training.lr_scheduler=constant",
        "--set", "training.save_steps=100000",
    ]  # fmt: skip
    for setting in arguments.set:
        command += ["--set", setting]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"finetune run failed:\n{result.stderr[-3000:]}")
    if arguments.limit_command:
        print(result.stderr.splitlines()[-1])
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
