"""Supervised tuning, then preferences, then reinforcement on GSM8K, each measured by what the model answers on held-out rows.

    python benchmarks/gsm8k.py --model DIR --data gsm8k-train.jsonl --work DIR [--steps 150,40,40] [--held-out 100]

sft    LoRA on all rows but the held-out ones (the last); merged into the base for what follows.
dpo    a fresh adapter on the tuned model. Of pairs, the chosen answer is the row's own, the rejected one what the tuned model
       answers, where that is wrong.
grpo   a fresh adapter on the tuned model, with `reward` below.

The share of right answers on the held-out rows (of the likeliest text), seconds a step and the peak of memory are printed as
soon as they are there, and appended to results.jsonl in the work directory. What is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ANSWER = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")
_RECORD = "GSM8K_RECORD"  # the file that `record` appends to
_SHARED = {
    "training.lr_scheduler": "constant", "training.save_steps": 100_000, "dataset.sequence_length": 512,
    "training.micro_batch_size": 4, "lora.r": 16,
}  # fmt: skip
STAGES: dict[str, dict[str, object]] = {
    "sft": {"training.batch_size": 16, "training.learning_rate": 5e-4},
    "dpo": {"training.objective": "dpo", "training.batch_size": 8, "training.learning_rate": 1e-5},
    "grpo": {
        "training.objective": "grpo", "training.batch_size": 4, "training.learning_rate": 2e-5, "grpo.num_generations": 8,
        "grpo.max_completion_length": 200, "grpo.beta": 0.02,
    },
}  # fmt: skip


def answer(text: str) -> float | None:
    """The number after ####, as GSM8K's rows have it."""
    found = _ANSWER.search(text)
    return float(found[1].replace(",", "")) if found else None


def reward(completions: Sequence[str], references: Sequence[str], **_: object) -> list[float]:
    """1 for the right number, 0.1 for any in the right form."""
    pairs = [(answer(said), answer(wanted)) for said, wanted in zip(completions, references, strict=True)]
    return [0.0 if said is None else 1.0 if said == wanted else 0.1 for said, wanted in pairs]


def correct(completions: Sequence[str], references: Sequence[str], **_: object) -> list[float]:
    """1 for the right number."""
    return [float(value == 1.0) for value in reward(completions, references)]


def record(completions: Sequence[str], references: Sequence[str], **_: object) -> list[float]:
    """As `correct`; what was said is written down."""
    with open(os.environ[_RECORD], "a", encoding="utf-8") as file:
        for said, wanted in zip(completions, references, strict=True):
            file.write(json.dumps({"said": said, "wanted": wanted}) + "\n")
    return correct(completions, references)


def finetune(words: Sequence[str | Path], settings: dict[str, object]) -> str:
    """What the command prints on stdout; ends the benchmark when it fails."""
    line = [sys.executable, "-m", "finetune", *map(str, words)]
    for key, value in settings.items():
        line += ["--set", f"{key}={json.dumps(value)}"]
    result = subprocess.run(line, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(line)} failed:\n{result.stderr[-3000:]}")
    return result.stdout


class Benchmark:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        with open(options.data, encoding="utf-8") as file:
            rows = list(file)
        self.rows = [json.loads(row) for row in rows[: -options.held_out]]
        (self.work / "train.jsonl").write_text("".join(rows[: -options.held_out]), encoding="utf-8")
        (self.work / "held-out.jsonl").write_text("".join(rows[-options.held_out :]), encoding="utf-8")

    def run(self, stage: str, steps: int, model: Path | str, data: Path) -> None:
        """A stage and its measurement."""
        output = self.work / stage
        settings = _SHARED | STAGES[stage] | {"training.max_steps": steps}
        if stage == "grpo":
            settings["grpo.reward_funcs"] = [f"{Path(__file__).resolve()}:reward"]
        if not (output / "report.json").exists():
            words = ["--model", model, "--data", data, "--output", output, "--host-memory", self.options.host_memory]
            finetune(["run", *words], settings)
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        tail = metrics[-max(1, len(metrics) // 5) :]
        names = [name for name in ("loss", "reward", "kl", "rewards/accuracies", "completions/mean_length") if name in tail[-1]]
        self.report(
            stage, self.measure(stage, model, output / "adapter"), steps=len(metrics),
            seconds_a_step=round(statistics.median(row["seconds"] for row in metrics), 1),
            peak_mib=metrics[-1]["host_peak_bytes"] >> 20,
            last_fifth={name: round(statistics.mean(row[name] for row in tail), 4) for name in names},
        )  # fmt: skip

    def measure(self, name: str, model: Path | str, adapter: Path | None) -> float:
        """The share of right answers on the held-out rows."""
        words = ["--model", model, *(["--adapter", adapter] if adapter else []), "--data", self.work / "held-out.jsonl"]
        return self._answers(words, name, "correct")

    def _answers(self, words: Sequence[str | Path], name: str, function: str) -> float:
        settings = _SHARED | STAGES["grpo"] | {"grpo.reward_funcs": [f"{Path(__file__).resolve()}:{function}"]}
        words = ["eval", "--json", *words, "--output", self.work / f"{name}-eval", "--host-memory", self.options.host_memory]
        return json.loads(finetune(words, settings))["reward"]

    def report(self, stage: str, right: float, **more: object) -> None:
        line = json.dumps({"stage": stage, "right": round(right, 4), **more})
        print(line, flush=True)
        with (self.work / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def merged(self) -> Path:
        """The tuned model."""
        target = self.work / "tuned"
        if not target.exists():
            finetune(["export", self.work / "sft", "--merge", "plain", "--to", target], {})
        return target

    def pairs(self, model: Path) -> Path:
        """Rows' own answers beside wrong ones of the model."""
        path, asked, said = (self.work / name for name in ("pairs.jsonl", "asked.jsonl", "said.jsonl"))
        if not path.exists():
            rows = self.rows[: self.options.asked]
            asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            said.unlink(missing_ok=True)
            os.environ[_RECORD] = str(said)
            self._answers(["--model", model, "--data", asked], "asked", "record")
            questions = {row["messages"][-1]["content"].strip(): row["messages"][:-1] for row in rows}
            pairs = []
            for row in map(json.loads, said.read_text(encoding="utf-8").split("\n")[:-1]):
                if correct([row["said"]], [row["wanted"]]) == [0.0] and row["said"].strip():
                    chosen, rejected = ([{"role": "assistant", "content": row[key].strip()}] for key in ("wanted", "said"))
                    pairs.append({"prompt": questions[row["wanted"].strip()], "chosen": chosen, "rejected": rejected})
            path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", default="150,40,40", help="of the three stages; 0: leave it out")
    parser.add_argument("--held-out", type=int, default=100, help="rows")
    parser.add_argument("--asked", type=int, default=300, help="rows that the tuned model answers, for pairs")
    parser.add_argument("--host-memory", default="2GiB")
    options = parser.parse_args()
    supervised, preferred, rewarded = map(int, options.steps.split(","))
    benchmark = Benchmark(options)
    benchmark.report("base", benchmark.measure("base", options.model, None))
    benchmark.run("sft", supervised, options.model, options.work / "train.jsonl")
    tuned = benchmark.merged()
    if preferred:
        benchmark.run("dpo", preferred, tuned, benchmark.pairs(tuned))
    if rewarded:
        benchmark.run("grpo", rewarded, tuned, options.work / "train.jsonl")


if __name__ == "__main__":
    main()
