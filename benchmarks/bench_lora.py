"""LoRA steps: this tool inside a budget against Transformers + PEFT with everything resident, in turn, same batches.

    python benchmarks/bench_lora.py --model DIR --data FILE --host-memory 1GiB --sequence-length 512 --batch-size 1

Each round runs the resident loop and then `finetune run`, each in a process of its own; the first step of each is not
counted. `--limit-command "CMD"` is put before our command, to run it under a kernel memory limit, and
`--resident-command "CMD"` before the resident one: what watches one should watch both. The losses of both are
compared before any time is: they must agree to 1e-3. The resident loop recomputes its layers in backward (gradient
checkpointing), unless `--resident-graphs` is given: then it keeps what they computed. Printed: median seconds a step,
their ratio, peaks.
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
from peft import LoraConfig, get_peft_model
from finetune.data import BatchPlan, collate, prepare
from finetune.memory.meter import MemoryMeter
model_dir, data, cache, length, batch, micro, steps, dtype, seed, keeps_graphs = json.loads(sys.argv[1])
meter = MemoryMeter().start()
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
torch.manual_seed(seed)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
if not keeps_graphs:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
model.train()
rows = prepare(data, model=model_dir, cache_dir=Path(cache), sequence_length=length)
plan = BatchPlan(len(rows), batch, micro, seed, rows.lengths, steps=steps)
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
for step in range(steps):
    started, total = time.perf_counter(), 0.0
    batches = [collate([[rows[i] for i in row] for row in group], rows.pad_token_id) for group in plan.step(step)]
    items = sum(int((b["labels"] != -100).sum()) for b in batches)
    for b in batches:
        loss = model(**b, use_cache=False, num_items_in_batch=torch.tensor(items)).loss
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step(); optimizer.zero_grad()
    seconds = time.perf_counter() - started
    meter.sample()
    print(json.dumps({"seconds": seconds, "loss": total, "peak": meter.peak_bytes}), flush=True)
"""


def run_resident(arguments: argparse.Namespace, cache: str) -> list[dict]:
    job = json.dumps([
        arguments.model, arguments.data, cache, arguments.sequence_length, arguments.batch_size,
        arguments.micro_batch_size, arguments.steps, arguments.resident_dtype, 42, arguments.resident_graphs,
    ])  # fmt: skip
    command = [*shlex.split(arguments.resident_command), sys.executable, "-c", RESIDENT, job]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--host-memory", required=True)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--resident-dtype", default="float32", help="what the resident loop computes in")
    parser.add_argument("--resident-graphs", action="store_true", help="the resident loop recomputes nothing")
    parser.add_argument("--limit-command", default="")
    parser.add_argument("--resident-command", default="")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    resident, ours = [], []
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        for number in range(arguments.rounds):
            a = run_resident(arguments, f"{scratch}/cache")
            b = run_finetune(arguments, f"{scratch}/out{number}", "lora")
            for x, y in zip(a, b, strict=True):
                if abs(x["loss"] - y["loss"]) > 1e-3 * abs(x["loss"]):
                    sys.exit(f"losses differ: resident {x['loss']}, ours {y['loss']}")
            resident += a[1:]
            ours += b[1:]
            seconds = [[round(row["seconds"], 2) for row in rows] for rows in (a, b)]
            print(f"round {number + 1}: resident {seconds[0]}, ours {seconds[1]}", flush=True)
    a, b = (statistics.median(row["seconds"] for row in rows) for rows in (resident, ours))
    print(f"resident {a:.2f} s a step, peak {max(x['peak'] for x in resident) / 2**30:.2f} GiB")
    print(
        f"ours     {b:.2f} s a step, peak {max(y['host_peak_bytes'] for y in ours) / 2**30:.2f} GiB, "
        f"read {statistics.median(y['disk_read_bytes'] for y in ours) / 2**30:.2f} GiB a step, "
        f"stalled {statistics.median(y['stall_seconds'] for y in ours):.2f} s"
    )
    print(f"ratio    {b / a:.3f}")


if __name__ == "__main__":
    main()
