"""Losses and adapters after three steps beside TRL's own trainers, on a tiny Llama in fp32.

    pip install --no-deps --target LIBS trl;  PYTHONPATH=LIBS python benchmarks/bench_trl.py [NAME ...]

Both get the same rows, all of which are in every step, the same first adapter and the same optimizer, with an epsilon of 1e-3:
with a small one, the update of a gradient near 0 is its sign, which is rounding. GRPO of TRL is given the completions that were
written here. Printed for each objective: the losses of both, and the largest differences of losses and of numbers in the
adapter.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from made_models import write_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from finetune import Config, Trainer
from finetune.objectives import grpo

VOCAB, ROWS, STEPS, SEED, RATE, EPSILON = 200, 4, 3, 42, 5e-3, 1e-3
LORA = {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
COMPLETIONS, MOST = 4, 6


def different(completions: Sequence[Any], **_: object) -> list[float]:
    """A reward: how many different words."""
    return [float(len(set(str(one).split()))) for one in completions]


CASES: dict[str, tuple[str, dict[str, Any], Any, Any, dict[str, Any]]] = {
    "dpo": ("dpo", {}, DPOTrainer, DPOConfig, {"beta": 0.1}),
    "dpo, ipo": ("dpo", {"preference": {"loss_type": "ipo"}}, DPOTrainer, DPOConfig, {"loss_type": "ipo"}),
    "kto": ("kto", {}, KTOTrainer, KTOConfig, {"beta": 0.1}),
    "cpo": ("cpo", {}, CPOTrainer, CPOConfig, {"beta": 0.1}),
    "simpo": ("simpo", {}, CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5}),
    "orpo": ("orpo", {}, ORPOTrainer, ORPOConfig, {"beta": 0.1}),
    "reward": (
        "reward", {"reward": {"center_rewards_coefficient": 0.1}}, RewardTrainer, RewardConfig,
        {"center_rewards_coefficient": 0.1},
    ),
    "grpo": ("grpo", {"grpo": {"beta": 0.1, "loss_type": "grpo"}}, GRPOTrainer, GRPOConfig, {"beta": 0.1, "loss_type": "grpo"}),
    "grpo, dapo": ("grpo", {"grpo": {"scale_rewards": "none"}}, GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}),
}  # fmt: skip
"""Name -> objective and settings here, TRL's trainer, its configuration and settings."""


def write_model(folder: Path) -> None:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB)


def rows_of(objective: str) -> list[dict[str, Any]]:
    draw = random.Random(3)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{draw.randrange(3, VOCAB)}" for _ in range(draw.randint(least, most)))

    rows = [{"prompt": words(2, 8), "chosen": " " + words(1, 6), "rejected": " " + words(1, 6)} for _ in range(ROWS)]
    if objective not in ("kto", "grpo"):
        return rows
    labels = [{"label": i % 2 == 0} if objective == "kto" else {} for i in range(ROWS)]
    return [{"prompt": row["prompt"], "completion": row["chosen"]} | label for row, label in zip(rows, labels, strict=True)]


def ours(model: Path, output: Path, objective: str, settings: dict[str, Any]) -> tuple[list[float], list[dict[str, list]]]:
    """Losses; for grpo, of each step the token ids that were written after each prompt."""
    written: list[dict[str, list]] = []
    write = grpo.write_completions

    def recorded(streamed: Any, prompts: Sequence[Sequence[int]], *more: Any) -> list[list[list[int]]]:
        found = write(streamed, prompts, *more)
        written.append({str(list(prompt)): texts for prompt, texts in zip(prompts, found, strict=True)})
        return found

    grpo.write_completions = recorded
    more = {"reward_funcs": [different], "num_generations": COMPLETIONS, "max_completion_length": MOST}
    settings = settings | ({"grpo": more | settings.get("grpo", {})} if objective == "grpo" else {})
    training = {
        "objective": objective, "batch_size": ROWS, "micro_batch_size": ROWS, "max_steps": STEPS, "learning_rate": RATE,
        "lr_scheduler": "constant", "adam_epsilon": EPSILON, "seed": SEED,
    }  # fmt: skip
    config = Config(
        model=str(model), output=output, data=rows_of(objective), training=training, lora={"alpha": 9, **LORA}, device="cpu",
        engine={"dtype": "float32"}, host_memory="2GiB", sequence_length=64, **settings,
    )  # fmt: skip
    Trainer(config).train()
    grpo.write_completions = write
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()], written


def theirs(
    model: Path, output: Path, objective: str, make: Any, config: Any, settings: dict[str, Any],
    written: Sequence[dict[str, list]],
) -> tuple[list[float], Any]:  # fmt: skip
    """Losses, and PEFT's model after the last step."""
    losses: list[float] = []

    class Recorded(make):
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            found = super().compute_loss(*arguments, **named)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

        def _generate_single_turn(self, prompt_ids: Sequence[Sequence[int]], *_: Any) -> tuple[list[list[int]], None]:
            left = {key: list(texts) for key, texts in written[self.state.global_step].items()}
            return [left[str(list(prompt))].pop(0) for prompt in prompt_ids], None

    torch.manual_seed(SEED)
    scores = objective == "reward"
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    base = kind.from_pretrained(model, dtype=torch.float32, **({"num_labels": 1} if scores else {}))
    torch.manual_seed(SEED)
    task = "SEQ_CLS" if scores else "CAUSAL_LM"
    peft = get_peft_model(base, LoraConfig(task_type=task, lora_alpha=9, **LORA))
    size = ROWS * COMPLETIONS if objective == "grpo" else ROWS
    named = settings | {
        "output_dir": str(output), "per_device_train_batch_size": size, "gradient_accumulation_steps": 1, "max_steps": STEPS,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "adam_epsilon": EPSILON, "seed": SEED, "report_to": [],
        "use_cpu": True, "bf16": False, "save_strategy": "no", "gradient_checkpointing": False, "max_grad_norm": 1.0,
    }  # fmt: skip
    more: dict[str, Any] = {}
    if objective == "grpo":
        named |= {"num_generations": COMPLETIONS, "max_completion_length": MOST, "temperature": 1.0}
        more["reward_funcs"] = [different]
    tokenizer = AutoTokenizer.from_pretrained(model)
    if make in (CPOTrainer, ORPOTrainer):  # which put it before prompts even where the tokenizer does not
        tokenizer.bos_token = None
    trainer = Recorded(
        model=peft, args=config(**named), train_dataset=Dataset.from_list(rows_of(objective)), processing_class=tokenizer,
        **more,
    )  # fmt: skip
    trainer.train()
    return losses, trainer.accelerator.unwrap_model(trainer.model)


def compare(name: str, place: Path) -> str:
    objective, settings, make, config, named = CASES[name]
    model, output = place / "model", place / name.replace(", ", "-")
    found, written = ours(model, output, objective, settings)
    wanted, peft = theirs(model, output / "trl", objective, make, config, named, written)
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    expected = {
        key.replace(".default", "").replace(".modules_to_save", ""): value.detach()
        for key, value in peft.named_parameters()
        if value.requires_grad
    }
    assert saved.keys() == expected.keys(), saved.keys() ^ expected.keys()
    losses = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    numbers = max(float((saved[key] - expected[key]).abs().max()) for key in saved)
    moved = max(float(value.abs().max()) for key, value in saved.items() if "lora_B" in key)
    here, there = (", ".join(f"{value:.6f}" for value in values) for values in (found, wanted))
    return f"{name}: {here} here, {there} by TRL; at most {losses:.1e} apart, adapters {numbers:.1e} of {moved:.1e}"


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_model(place / "model")
        for name in sys.argv[1:] or CASES:
            print(compare(name, place), flush=True)


if __name__ == "__main__":
    main()
