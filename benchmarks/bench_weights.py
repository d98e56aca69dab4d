"""Steps that train the model's own weights: this tool inside a budget against Transformers with everything resident, in turn.

    python benchmarks/bench_weights.py --method full --model DIR --data FILE --host-memory 2GiB --batch-size 8

Each round runs the resident loop (bf16 weights, gradients and AdamW state, gradient checkpointing, PyTorch's fused AdamW;
with `--masters` fp32 masters and state of what is trained, as ours has) and then `finetune run`, each in a process of its
own, over the same rows; the first two steps of each are not counted, for ours allocates its store in them. With method
lisa both train the same blocks. `--limit-command "CMD"` is put before our command, `--resident-command "CMD"` before the
resident one, `--no-resident` leaves it out. Printed: median seconds a step, their ratio, peaks, bytes, and what the disk
alone would take at `--disk-gbps` (fio's mixed reads and writes).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile

from running import run_finetune

RESIDENT = """
import json, sys, time, torch, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
from transformers import AutoModelForCausalLM
from finetune import Config
from finetune.data import BatchPlan, collate, prepare
from finetune.methods.selection import make_selection
from finetune.memory.meter import MemoryMeter
from finetune.offload.weights.skeleton import find_blocks
model_dir, data, cache, length, batch, micro, steps, method, seed, masters = json.loads(sys.argv[1])
meter = MemoryMeter().start()
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
blocks = list(find_blocks(model).values())
chosen = make_selection(Config(model=model_dir, method=method, seed=seed), len(blocks)).blocks(0)
for index, block in enumerate(blocks):
    block.requires_grad_(index in chosen)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.train()
rows = prepare(data, model=model_dir, cache_dir=Path(cache), sequence_length=length)
plan = BatchPlan(len(rows), batch, micro, seed, rows.lengths, steps=steps)
parameters = [p for p in model.parameters() if p.requires_grad]
copies = [torch.nn.Parameter(p.detach().float()) for p in parameters] if masters else parameters
optimizer = torch.optim.AdamW(copies, lr=2e-5, weight_decay=0.0, fused=True)
for step in range(steps):
    started, total = time.perf_counter(), 0.0
    batches = [collate([[rows[i] for i in row] for row in group], rows.pad_token_id) for group in plan.step(step)]
    items = sum(int((b["labels"] != -100).sum()) for b in batches)
    for b in batches:
        loss = model(**b, use_cache=False, num_items_in_batch=torch.tensor(items)).loss
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if masters:
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.grad = parameter.grad.float()
            parameter.grad = None
    optimizer.step(); optimizer.zero_grad()
    if masters:
        for copy, parameter in zip(copies, parameters, strict=True):
            parameter.data.copy_(copy)
    seconds = time.perf_counter() - started
    meter.sample()
    print(json.dumps({"seconds": seconds, "loss": total, "peak": meter.peak_bytes}), flush=True)
"""
NOT_COUNTED = 2


def run_resident(arguments: argparse.Namespace, cache: str) -> list[dict]:
    job = json.dumps([
        arguments.model, arguments.data, cache, arguments.sequence_length, arguments.batch_size,
        arguments.micro_batch_size, arguments.steps, arguments.method, 42, arguments.masters,
    ])  # fmt: skip
    command = [*shlex.split(arguments.resident_command), sys.executable, "-c", RESIDENT, job]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["full", "lisa"], default="full")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--host-memory", required=True)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--disk-gbps", type=float, default=0.0)
    parser.add_argument("--masters", action="store_true")
    parser.add_argument("--no-resident", action="store_true")
    parser.add_argument("--limit-command", default="")
    parser.add_argument("--resident-command", default="")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    resident, ours = [], []
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        for number in range(arguments.rounds):
            a = [] if arguments.no_resident else run_resident(arguments, f"{scratch}/cache")
            b = run_finetune(arguments, f"{scratch}/out{number}", arguments.method)
            if a and abs(a[0]["loss"] - b[0]["loss"]) > 1e-2 * abs(a[0]["loss"]):
                sys.exit(f"losses of the first step differ: resident {a[0]['loss']}, ours {b[0]['loss']}")
            resident += a[NOT_COUNTED:]
            ours += b[NOT_COUNTED:]
            seconds = [[round(row["seconds"], 2) for row in rows] for rows in (a, b)]
            print(f"round {number + 1}: resident {seconds[0]}, ours {seconds[1]}", flush=True)
            subprocess.run(["rm", "-rf", f"{scratch}/out{number}"], check=True)
    b = statistics.median(row["seconds"] for row in ours)
    read, written = (statistics.median(y[key] for y in ours) for key in ("disk_read_bytes", "disk_write_bytes"))
    print(
        f"ours     {b:.2f} s a step, peak {max(y['host_peak_bytes'] for y in ours) / 2**30:.2f} GiB, read "
        f"{read / 2**30:.2f} GiB and written {written / 2**30:.2f} GiB a step, "
        f"stalled {statistics.median(y['stall_seconds'] for y in ours):.2f} s"
    )
    if arguments.disk_gbps:
        print(f"disk     {(read + written) / arguments.disk_gbps / 1e9:.2f} s a step at {arguments.disk_gbps} GB/s")
    if resident:
        a = statistics.median(row["seconds"] for row in resident)
        print(f"resident {a:.2f} s a step, peak {max(x['peak'] for x in resident) / 2**30:.2f} GiB")
        print(f"ratio    {b / a:.3f}")


if __name__ == "__main__":
    main()
