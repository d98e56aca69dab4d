"""What each method makes of the same rows: accuracy or loss on held-out rows, memory, time; one run a method.

    python benchmarks/quality.py --model DIR --train sst2-train.jsonl --dev sst2-dev.jsonl --task sst2 --work DIR METHOD ...

Learning rates and the rest are in `METHODS`, chosen for SmolLM2-135M. Runs go one after the other, each under
`--limit-command` where one is given, and each result is printed as soon as it is there and appended to results.jsonl in
the work directory, which also keeps what the runs write. `zero-shot` measures the model as it is. With `--resident` the
plain loop of `resident.py` trains in place of `finetune run`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ZO: dict[str, object] = {
    "training.max_grad_norm": None,
    "training.batch_size": 16,
    "training.micro_batch_size": 16,
    "zo.objective": "classification",
}

METHODS: dict[str, dict[str, object]] = {
    "lora": {"method": "lora", "training.learning_rate": 5e-4},
    "full": {"method": "full", "training.learning_rate": 1e-4},
    "lisa": {
        "method": "lisa", "training.learning_rate": 2e-4, "selection.layers": 4, "selection.interval": 5,
    },
    "badam": {
        "method": "badam", "training.learning_rate": 2e-4, "selection.layers": 3, "selection.interval": 6,
    },
    "slimfit": {"method": "slimfit", "training.learning_rate": 1e-4, "selection.layers": 8},
    "frugal": {
        "method": "frugal", "training.learning_rate": 1e-4, "selection.layers": 8, "selection.interval": 16,
        "selection.sign_scale": 0.05,
    },
    # Each of these takes 1,000 forward passes of a batch.
    "zo": {"method": "zo", "training.max_steps": 500, "training.learning_rate": 1e-5} | ZO,
    "mezo": {
        "method": "zo", "training.max_steps": 500, "training.learning_rate": 1e-5, "zo.noise": "gaussian",
        "zo.rounding": "nearest", "zo.fold_steps": 1,
    } | ZO,
    "lozo": {
        "method": "zo", "training.max_steps": 500, "training.learning_rate": 3e-5, "zo.noise": "low_rank",
    } | ZO,
    "lozo-products": {
        "method": "zo", "training.max_steps": 500, "training.learning_rate": 3e-5, "zo.noise": "low_rank",
        "zo.perturb": "products",
    } | ZO,
    "fzoo": {
        "method": "zo", "training.max_steps": 125, "training.learning_rate": 4e-4, "zo.estimator": "fzoo",
        "zo.perturbations": 7,
    } | ZO,
    "zo-lora": {
        "method": "zo", "training.max_steps": 500, "training.learning_rate": 5e-4, "zo.parameters": "lora",
        "zo.epsilon": 1e-2,
    } | ZO,
    "zo-prefix": {
        "method": "zo", "training.max_steps": 500, "training.learning_rate": 1e-2, "zo.parameters": "prefix",
        "zo.epsilon": 1e-1,
    } | ZO,
}  # fmt: skip
TASKS: dict[str, dict[str, object]] = {
    "sst2": {"training.batch_size": 32, "training.micro_batch_size": 8, "dataset.sequence_length": 256},
    "gsm8k": {"training.batch_size": 16, "training.micro_batch_size": 2, "dataset.sequence_length": 512},
}


def run(words: list[str], settings: dict[str, object], limit: str = "") -> str:
    """What the Python program prints on stdout; ends the benchmark when it fails."""
    line = shlex.split(limit) + [sys.executable, *words]
    for key, value in settings.items():
        line += ["--set", f"{key}={json.dumps(value)}"]
    result = subprocess.run(line, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{shlex.join(line)} failed:\n{result.stderr[-3000:]}")
    return result.stdout


def measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    settings: dict[str, object] = {"training.lr_scheduler": "linear", "training.save_steps": 100_000, **TASKS[options.task]}
    settings |= METHODS.get(name, {})
    for setting in options.set:
        key, value = setting.split("=", 1)
        settings[key] = json.loads(value)
    output = options.work / name
    model = ["--model", options.model]
    row: dict[str, object] = {"method": name, "task": options.task, "set": options.set}
    if name != "zero-shot":
        if options.resident:
            row["method"] = f"{name}, resident"
            paths = {"model": options.model, "data": options.train, "output": str(output)}
            run([str(Path(__file__).with_name("resident.py"))], settings | paths)
        else:
            budget = ["--host-memory", options.host_memory]
            if options.device_memory:
                budget += ["--device-memory", options.device_memory]
            words = [*model, *budget, "--data", options.train, "--output", str(output)]
            run(["-m", "finetune", "run", *words], settings, options.limit_command)
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        row["steps"] = len(steps)
        row["seconds a step"] = round(statistics.median(step["seconds"] for step in steps), 2)
        row["peak MiB"] = steps[-1]["host_peak_bytes"] >> 20
        row["device MiB"] = (steps[-1]["device_peak_bytes"] or 0) >> 20
        row["training loss, last tenth"] = round(statistics.mean(s["loss"] for s in steps[-((len(steps) + 9) // 10) :]), 4)
        if (output / "adapter").exists():
            model += ["--adapter", str(output / "adapter")]
        else:
            if not options.resident:
                run(["-m", "finetune", "export", *model, "--output", str(output), "--to", str(output / "model")], {})
            model = ["--model", str(output / "model")]
    words = ["--json", "--data", options.dev, "--output", str(options.work / f"{name}-eval")]
    shared = {key: settings[key] for key in settings if key == "dataset.sequence_length" or key.startswith("engine.")}
    measured = json.loads(run(["-m", "finetune", "eval", *model, *words], shared))
    return row | {key: round(measured[key], 4) for key in ("loss", "accuracy") if key in measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--host-memory", default="1GiB")
    parser.add_argument("--device-memory")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--limit-command", default="", help='such as "systemd-run --scope -p MemoryMax=1G"')
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="one more setting for every run")
    parser.add_argument("methods", nargs="+", choices=["zero-shot", *METHODS])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.methods:
        row = json.dumps(measure(name, options))
        print(row, flush=True)
        with (options.work / "results.jsonl").open("a") as file:
            file.write(row + "\n")


if __name__ == "__main__":
    main()
