"""A machine whose disk, link and processor take the same time: is a step as fast as the slowest of them, and as predicted?

    python benchmarks/bench_overlap.py --model DIR --data FILE [--host-memory 1GiB] [--device-memory 1GiB] [--rounds 5]

The device is the simulated one. Two first runs find the length of rows with which it computes as long as the disk reads, and
the speed of the link with which copies take as long; rows of `--data` must be longer than that. Each round is a run of its own.
Printed of each round's last step: how long every link was in use, the step against the slowest of them, and against the
prediction; then medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

LINKS = ("disk", "link", "compute")
FIRST_LENGTH = 128
MEASURED, PREDICTED = 1, 2  # processes in a trace


def busy_seconds(events: list[dict], process: int = MEASURED) -> dict[str, float]:
    """Of each link: the time in which it did something. Under "step": from the first to the last of it."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == process}
    spans = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event["pid"] == process:
            spans[names[event["tid"]]].append((event["ts"], event["ts"] + event["dur"]))
    found = {}
    for name, of_one in spans.items():
        total, end = 0.0, float("-inf")
        for start, stop in sorted(of_one):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        found[name] = total / 1e6
    edges = [edge for of_one in spans.values() for span in of_one for edge in span]
    return found | {"step": (max(edges) - min(edges)) / 1e6}


def run(arguments: argparse.Namespace, length: int, gbps: float | None) -> tuple[dict[str, float], dict]:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        trace = Path(folder, "trace.json")
        command = [
            sys.executable, "-m", "finetune", "run", "--model", arguments.model, "--data", arguments.data, "--method", "lora",
            "--device", "simulated", "--host-memory", arguments.host_memory, "--device-memory", arguments.device_memory,
            "--batch-size", "1", "--micro-batch-size", "1", "--sequence-length", str(length), "--max-steps", "3",
            "--output", f"{folder}/run", "--trace", str(trace), "--set", "engine.kept_graphs=0",
            "--set", "engine.resident_blocks=0",
        ]  # fmt: skip
        if gbps is not None:
            command += ["--set", f"engine.simulated_copy_gbps={gbps}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"finetune run failed:\n{result.stderr[-3000:]}")
        report = json.loads(Path(folder, "run", "report.json").read_text())
        events = json.loads(trace.read_text())["traceEvents"]
        busy = busy_seconds(events)
        if gbps is not None:  # what the simulated link takes follows from its speed: it is not in the trace of what happened
            busy["link"] = busy_seconds(events, PREDICTED)["link"]
        return busy, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--host-memory", default="1GiB")
    parser.add_argument("--device-memory", default="1GiB")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    busy, report = run(arguments, FIRST_LENGTH, None)
    length = max(16, round(FIRST_LENGTH * busy["disk"] / busy["compute"]))
    busy, report = run(arguments, length, None)
    gbps = report["measured"]["disk_read_bytes"] / max(busy["disk"], busy["compute"]) / 1e9
    print(f"rows of {length} tokens, copies at {gbps:.2f} GB/s")
    of_slowest, of_predicted = [], []
    for _ in range(arguments.rounds):
        busy, report = run(arguments, length, gbps)
        slowest = max(busy.get(link, 0.0) for link in LINKS)
        of_slowest.append(busy["step"] / slowest)
        of_predicted.append(report["predicted"]["step_seconds"] / busy["step"])
        links = ", ".join(f"{link} {seconds:.2f} s" for link, seconds in sorted(busy.items()))
        print(f"{links}: {of_slowest[-1]:.3f} of the slowest, predicted {of_predicted[-1]:.3f} of it", flush=True)
    print(f"medians: {statistics.median(of_slowest):.3f} of the slowest, predicted {statistics.median(of_predicted):.3f}")


if __name__ == "__main__":
    main()
