"""One table for a machine with an accelerator: each method inside 8 GiB of it against everything resident, in under 8 minutes.

    python benchmarks/on_gpu.py --work DIR [--shapes 1.17b 7b] [--device-memory 8GiB] [--minutes 8]
    python benchmarks/on_gpu.py --work DIR --shapes tiny --device simulated --device-memory 64MiB     # the rehearsal

Checkpoints with random weights are written into DIR first (7B: 13 GB). The most telling cases come first; none is begun that
would end after `--minutes`, by what the one before it took. Each is a process of its own, 4 rows of 512 tokens a step; first
steps are not counted. The resident loop (`resident.py`) recomputes nothing. Printed of each case: seconds a step, what was
predicted (by measured), the ratio to resident, peaks of device and host, measured of predicted (a simulated device lies in host
memory), and the loss of the first step. At the end: tests that hold streamed steps to the bits of plain loops on this device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from made_models import write_llama, write_rows
from transformers import LlamaConfig

ROOT = Path(__file__).parent.parent
WORDS = 4096  # of the rows
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4},
    "1.17b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KEYS_AND_VALUES = {"1.17b": 4}
BATCH = ["training.batch_size=4", "training.max_steps=5", "training.save_steps=100000", "dataset.sequence_length=512"]
CASES = {  # settings; "resident" is the loop of the other script
    "lora, resident": ["method=lora", "training.micro_batch_size=4"],
    "lora": ["method=lora", "training.micro_batch_size=4"],
    "lora, nothing kept": ["method=lora", "training.micro_batch_size=4", "engine.kept_graphs=0"],
    "lora, 4 micro-batches": ["method=lora", "training.micro_batch_size=1"],
    "lora over nf4": ["method=lora", "training.micro_batch_size=4", "quantize=nf4"],
    "zo": ["method=zo", "training.micro_batch_size=4"],
    "lisa": ["method=lisa", "training.micro_batch_size=4"],
    "full": ["method=full", "training.micro_batch_size=4"],
}
SMALL_ONLY = ("full",)  # of 7B, its store is 100 GB


def run(name: str, model: Path, arguments: argparse.Namespace) -> dict:
    """Seconds, losses and bytes of a case; `failed`: the end of what it said."""
    output = arguments.work / f"{model.name} {name}"
    settings = [f"model={model}", f"data={arguments.work / 'rows.jsonl'}", f"output={output}", *BATCH, *CASES[name]]
    if name.endswith("resident"):
        command = [sys.executable, str(ROOT / "benchmarks" / "resident.py")]
    else:
        command = [sys.executable, "-m", "finetune", "run"]
        settings += [f"device={arguments.device}", f"device_memory={arguments.device_memory}"]
        settings += [f"quantization.cache={arguments.work / 'packed'}"] if "quantize=nf4" in settings else []
    command += [part for setting in settings for part in ("--set", setting)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr[-600:]}
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = {
        "seconds": statistics.median(row["seconds"] for row in rows[2:]), "loss": rows[0]["loss"],
        "device": [max(row["device_peak_bytes"] or 0 for row in rows)], "host": [max(row["host_peak_bytes"] for row in rows)],
        "took": time.monotonic() - started,
    }  # fmt: skip
    if (output / "report.json").exists():
        predicted = json.loads((output / "report.json").read_text())["predicted"]
        found |= {"predicted": predicted["step_seconds"]}
        for key in ("device", "host"):
            found[key].insert(0, predicted[f"{key}_peak_bytes"])
    return found


def describe(name: str, found: dict, resident: float | None) -> str:
    if "failed" in found:
        return f"{name:28} failed: {' '.join(found['failed'].split())[-300:]}"
    seconds, predicted = found["seconds"], found.get("predicted")
    device, host = (" of ".join(f"{size / 2**30:.2f}" for size in reversed(found[key])) for key in ("device", "host"))
    of_resident = "" if resident is None else f"{seconds / resident:.2f}"
    guess = "" if predicted is None else f"{predicted:.3f} ({predicted / seconds:.2f})"
    return f"{name:28}{seconds:8.3f} s  {guess:>15}{of_resident:>7}  {device:>14}{host:>16}  {found['loss']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.17b", "7b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-memory", default="8GiB")
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.work / "rows.jsonl", 32, 512, 600, WORDS)
    print(f"{'':28}{'a step':>10}  {'predicted':>15}{'/ res.':>7}  {'device GiB':>14}{'host GiB':>16}  first loss")
    for shape in arguments.shapes:
        model = arguments.work / shape
        if not (model / "config.json").exists():
            keys = KEYS_AND_VALUES.get(shape, SHAPES[shape]["num_attention_heads"])
            write_llama(model, LlamaConfig(vocab_size=49152, num_key_value_heads=keys, **SHAPES[shape]))
        resident, took = None, 0.0
        for name in CASES:
            if shape == "7b" and name in SMALL_ONLY:
                continue
            if time.monotonic() + took > ends:
                print(f"{shape} {name}: no time left")
                continue
            found = run(name, model, arguments)
            took = found.get("took", took)
            print(describe(f"{shape} {name}", found, resident), flush=True)
            if name.endswith("resident"):
                resident = found.get("seconds")
    left = int(ends - time.monotonic())
    if left > 30:
        command = [sys.executable, "-m", "pytest", "tests/parity/test_accelerator.py", "-m", "not slow", "-x"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
            print(done.stdout.splitlines()[-1] if done.stdout else done.stderr[-300:])
        except subprocess.TimeoutExpired:
            print("tests/parity/test_accelerator.py: no time left")


if __name__ == "__main__":
    main()
