"""Runs of random methods, shapes and budgets on small models, each under a hard limit of exactly its budget.

    python benchmarks/bench_budgets.py --work DIR --limit-command "CMD LIMIT" [--count 200] [--seed 0] [--jobs 1]

`--limit-command` is put before each run; in it LIMIT becomes the budget in MiB, as `640M`. A budget is the least that a plan
names, times up to two; every tenth run gets 5% less than the least as its limit, while it is told that it has the least: there
the plan is tight where the run fails. Printed: each run that was killed, failed, or measured more than its budget, then counts
and how predicted and measured peaks compare.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from made_models import write_rows, write_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

VOCAB = 2048
LEAST = re.compile(r"--host-memory (\d+)MiB: ")  # in a refusal
METHODS = ("lora", "zo", "full", "lisa", "badam", "slimfit", "frugal")
MODELS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "qwen3, tied": Qwen3Config(
        vocab_size=VOCAB, hidden_size=384, intermediate_size=1024, num_hidden_layers=20, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=448, n_layer=9, n_head=7, n_positions=1024),
    "mixtral": MixtralConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=640, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run."""

    number: int
    model: str
    options: tuple[str, ...]
    times: float  # of the least memory
    tight: bool  # it gets 5% less than it is told


def draw(number: int, seed: int) -> Case:
    """The case of a number: the same for the same seed."""
    rng = random.Random(f"{seed} {number}")
    batch = rng.choice([1, 2, 3, 5, 8])
    options = [
        "--method", rng.choice(METHODS), "--batch-size", str(batch), "--micro-batch-size", str(rng.randint(1, batch)),
        "--sequence-length", str(rng.choice([33, 100, 256, 500, 900])), "--max-steps", "3",
        "--set", f"engine.dtype={rng.choice(['float32', 'bfloat16'])}",
    ]  # fmt: skip
    if rng.random() < 0.3:
        options += ["--set", f"engine.activations={rng.choice(['host', 'disk'])}"]
    tight = number % 10 == 9
    return Case(number, rng.choice(list(MODELS)), tuple(options), 1.0 if tight else 1 + rng.random() ** 2, tight)


def write_models(folder: Path) -> None:
    """Random weights, a tokenizer of words, and rows of up to 1,000 tokens of unlike lengths."""
    for name, config in MODELS.items():
        if not (folder / name).exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
            write_tokenizer(folder / name, VOCAB)
    write_rows(folder / "rows.jsonl", 64, 20, 1000, VOCAB)


def run(case: Case, work: Path, limit_command: str) -> dict:
    """What became of it: `code`, the end of what was `said`, `budget` in MiB and, where it ran, `report`."""
    output = work / f"run-{case.number}"
    options = ["--model", str(work / case.model), "--data", str(work / "rows.jsonl"), *case.options, "--output", str(output)]
    small = [*options, "--host-memory", "64MiB"]
    asked = subprocess.run([sys.executable, "-m", "finetune", "plan", *small], capture_output=True, text=True)
    least = LEAST.search(asked.stderr)
    if least is None:
        return {"code": asked.returncode, "said": (asked.stdout + asked.stderr)[-800:], "budget": None}
    budget = int(int(least[1]) * case.times)
    limit = int(budget * 0.95) if case.tight else budget
    command = [sys.executable, "-m", "finetune", "run", *options, "--host-memory", f"{budget}MiB"]
    done = subprocess.run(shlex.split(limit_command.replace("LIMIT", f"{limit}M")) + command, capture_output=True, text=True)
    found = {"code": done.returncode, "said": done.stderr[-800:], "budget": budget}
    if (output / "report.json").exists():
        found["report"] = json.loads((output / "report.json").read_text())
    shutil.rmtree(output, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit-command", required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_models(arguments.work)
    cases = [draw(number, arguments.seed) for number in range(arguments.count)]
    ran = over = tight = failed_tight = bad = refused = 0
    ratios = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        every = pool.map(lambda case: run(case, arguments.work, arguments.limit_command), cases)
        for case, found in zip(cases, every, strict=True):
            if found["budget"] is None:  # a combination that does not exist
                refused += 1
                print(f"{case.number}: not planned: {case.model} {' '.join(case.options)}\n    {found['said'].strip()[-300:]}")
                continue
            if case.tight:
                tight, failed_tight = tight + 1, failed_tight + (found["code"] != 0)
                continue
            ran += 1
            if found["code"]:
                bad += 1
                print(f"{case.number}: code {found['code']} in {found['budget']} MiB: {case.model} {' '.join(case.options)}")
                print(f"    {found['said'].strip()}", flush=True)
                continue
            report = found["report"]
            predicted, measured = (report[key]["host_peak_bytes"] for key in ("predicted", "measured"))
            ratios.append(predicted / measured)
            line = f"{predicted / 2**20:.0f} MiB predicted, {measured / 2**20:.0f} measured of {found['budget']}"
            print(f"{case.number}: {line}: {case.model} {' '.join(case.options)}", flush=True)
            over += measured > found["budget"] << 20
    print(f"{ran} runs: {bad} failed or were killed, {over} measured more than their budget; {refused} were no run")
    print(f"{failed_tight} of {tight} with a limit 5% under the least failed")
    if ratios:
        print(f"predicted by measured: least {min(ratios):.3f}, median {statistics.median(ratios):.3f}, most {max(ratios):.3f}")


if __name__ == "__main__":
    main()
