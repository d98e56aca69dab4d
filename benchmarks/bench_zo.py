"""Zeroth-order steps inside a budget, against two resident forward passes and against the MeZO loop, same batches.

    python benchmarks/bench_zo.py --model DIR --data FILE --host-memory 1GiB --sequence-length 512 --batch-size 1

Each round runs the resident process (forward passes, and with `--mezo-steps N` the reference loop: perturb in place three
times, two forwards, update) and then `finetune run --method zo`, each in a process of its own. The first of everything is
not counted. `--limit-command "CMD"` is put before our command, to run it under a kernel memory limit. Before any time is
looked at, the loss of the resident model must be within 1% of our first step's. Printed: medians, ratios, peaks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from running import run_finetune

RESIDENT = """
import json, sys, time, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from finetune.data import BatchPlan, collate, prepare
from finetune.memory.meter import MemoryMeter
model_dir, data, cache, length, batch, micro, passes, mezo_steps, dtype, seed = json.loads(sys.argv[1])
meter = MemoryMeter().start()
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
rows = prepare(data, model=model_dir, cache_dir=Path(cache), sequence_length=length)
plan = BatchPlan(len(rows), batch, micro, seed, rows.lengths, steps=max(passes, mezo_steps))
parameters = list(model.parameters())

def loss_of(step):
    batches = [collate([[rows[i] for i in row] for row in group], rows.pad_token_id) for group in plan.step(step)]
    items = sum(int((b["labels"] != -100).sum()) for b in batches)
    return sum(model(**b, use_cache=False, num_items_in_batch=torch.tensor(items)).loss.item() for b in batches)

def perturb(seed, scale):  # MeZO's zo_perturb_parameters
    torch.manual_seed(seed)
    for p in parameters:
        p.data = p.data + scale * torch.normal(mean=0, std=1, size=p.data.size(), dtype=p.data.dtype)

with torch.inference_mode():
    for step in range(passes):
        started = time.perf_counter()
        losses = [loss_of(step), loss_of(step)]
        print(json.dumps({"forwards": time.perf_counter() - started, "loss": losses[0]}), flush=True)
    for step in range(mezo_steps):
        started = time.perf_counter()
        perturb(step, 1e-3); a = loss_of(step); perturb(step, -2e-3); b = loss_of(step); perturb(step, 1e-3)
        perturb(step, -1e-6 * (a - b) / 2e-3)
        print(json.dumps({"mezo": time.perf_counter() - started}), flush=True)
print(json.dumps({"peak": meter.stop()}))
"""


def run_resident(arguments: argparse.Namespace, cache: str) -> list[dict]:
    job = json.dumps([
        arguments.model, arguments.data, cache, arguments.sequence_length, arguments.batch_size, arguments.micro_batch_size,
        arguments.steps, arguments.mezo_steps, arguments.resident_dtype, 42,
    ])  # fmt: skip
    output = subprocess.run([sys.executable, "-c", RESIDENT, job], check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--host-memory", required=True)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--mezo-steps", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--resident-dtype", default="bfloat16", help="what the resident loop computes in")
    parser.add_argument("--limit-command", default="")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    forwards, mezo, peaks, ours = [], [], [], []
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        for number in range(arguments.rounds):
            a = run_resident(arguments, f"{scratch}/cache")
            b = run_finetune(arguments, f"{scratch}/out{number}", "zo")
            passes = [row["forwards"] for row in a if "forwards" in row]
            if abs(a[0]["loss"] - b[0]["loss"]) > 1e-2 * a[0]["loss"]:
                sys.exit(f"losses differ: resident {a[0]['loss']}, ours {b[0]['loss']}")
            forwards += passes[1:]
            mezo += [row["mezo"] for row in a if "mezo" in row][1:]
            peaks += [row["peak"] for row in a if "peak" in row]
            ours += b[1:]
            print(
                f"round {number + 1}: two forwards {[round(x, 2) for x in passes]}, "
                f"ours {[round(row['seconds'], 2) for row in b]}",
                flush=True,
            )
    two, step = statistics.median(forwards), statistics.median(row["seconds"] for row in ours)
    print(f"two resident forwards {two:.2f} s, peak {max(peaks) / 2**30:.2f} GiB")
    print(
        f"ours {step:.2f} s a step, peak {max(row['host_peak_bytes'] for row in ours) / 2**30:.2f} GiB, "
        f"read {statistics.median(row['disk_read_bytes'] for row in ours) / 2**30:.2f} GiB a step, "
        f"stalled {statistics.median(row['stall_seconds'] for row in ours):.2f} s"
    )
    print(f"ratio to two forwards {step / two:.3f}")
    if mezo:
        print(f"MeZO loop {statistics.median(mezo):.2f} s a step, {statistics.median(mezo) / step:.1f} x ours")


if __name__ == "__main__":
    main()
