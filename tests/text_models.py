"""Tiny random language models with a tokenizer of their own, and what is asserted of runs that go from text to text."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from data_tools import write_tokenizer
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune import Trainer
from finetune.config import Config
from finetune.evaluate import evaluate
from finetune.generate import generate

VOCAB = 345  # the tokenizer has fewer, as is common
_TEXT = {"vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS = {
    "llama": tf.LlamaConfig(**_TEXT, **_HEADS, **_IDS, max_position_embeddings=256),
    "mixtral": tf.MixtralConfig(**_TEXT, **_HEADS, **_IDS, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": tf.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=40, n_layer=3, n_head=4, **_IDS),
    "gemma2": tf.Gemma2Config(**_TEXT, **_HEADS, **_IDS, sliding_window=6, final_logit_softcapping=3.0),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "gemma2": ["q_proj", "v_proj"]}


def write_model(kind: str, folder: Path, template: str | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint whose weights, norms and biases are all random, with the tokenizer of `data_tools`."""
    torch.manual_seed(5)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    config = (folder / "config.json").read_text()
    write_tokenizer(folder, template)
    (folder / "config.json").write_text(config)
    return folder


def write_adapter(model: Path, kind: str, folder: Path) -> Path:
    """A PEFT adapter that changes what the model says."""
    torch.manual_seed(6)
    base = tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base, LoraConfig(r=3, task_type="CAUSAL_LM", target_modules=TARGETS[kind]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(folder)
    return folder


def write_prefix(model: Path, folder: Path) -> Path:
    """PEFT's prefix of three positions, which changes what the model says."""
    torch.manual_seed(6)
    base = tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(folder)
    return folder


def make_adapter(model: Path, kind: str, folder: Path, word: str | None) -> Path | None:
    """word: "lora", "prefix" or None, for none."""
    return {"lora": lambda: write_adapter(model, kind, folder), "prefix": lambda: write_prefix(model, folder)}.get(
        word, lambda: None
    )()


def plain_model(model: Path, adapter: Path | None = None) -> Any:
    """The reference: everything in memory, fp32, eval mode."""
    plain = tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        plain = PeftModel.from_pretrained(plain, adapter)
    return plain.eval()


def make_config(model: Path, output: Path, **changes: Any) -> Config:
    engine = {"dtype": "float32", "num_threads": 1, **changes.pop("engine", {})}
    values = {"model": str(model), "output": output, "device": "cpu", "host_memory": "8GiB", "sequence_length": 64}
    return Config(**values | changes, engine=engine)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        return control


def assert_same_answers(models: Iterable[Path], folder: Path) -> None:
    """`eval` and `generate` over two models of the same numbers. Runs are in `folder`."""
    rows = write_rows(folder / "rows.jsonl", [{"prompt": "hello the cat", "completion": " sat on the mat"}] * 3)
    results = []
    for model in models:
        config = make_config(model, folder / f"out-{model.name}", data=rows)
        losses = evaluate(config)
        results.append((losses["loss"], "".join(generate(config, None, ["the cat", "hello"], max_new_tokens=5))))
    assert results[0] == results[1]


def assert_resumes(model: Path, folder: Path, **lora: Any) -> None:
    """A run that is stopped goes on with the same bits. Three runs, in `folder`."""
    rows = write_rows(folder / "rows.jsonl", [{"text": f"the cat sat on {i} mats and hello"} for i in range(7)])
    training = {"max_steps": 4, "batch_size": 2, "learning_rate": 5e-3}

    def config(name: str, **more: Any) -> Config:
        return make_config(model, folder / name, data=rows, training=training, lora={"r": 3, **lora}, **more)

    Trainer(config("whole")).train()
    Trainer(config("parts"), callbacks=[StopAfter(2)]).train()
    Trainer(config("parts", resume=True)).train()
    found, expected = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in found)
