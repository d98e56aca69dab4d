"""Adapters of experts and routers after training: plain PEFT loads them, runs go on, text is generated."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from mixtures import MIXTURES
from peft import PeftModel
from safetensors.torch import save_file
from text_models import StopAfter
from text_models import make_config as text_config
from tiny_models import VOCAB, aligned_copies, assert_same_bits, make_config, streamed_run, token_data
from torch.nn import functional

import finetune.one_run
from finetune.data import Example, TokenDataset
from finetune.decoding import Sampling, chooser, decode
from finetune.methods.results import find_result
from finetune.objectives.scoring import ask_trained, score
from finetune.planned_run import BatchShape
from finetune.session import Session
from finetune.trainer import Trainer

IDS = np.random.default_rng(3).integers(3, VOCAB, 19).astype(np.int32)
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS = {
    "attention and experts": ("qwen3-moe", {"target_modules": ["q_proj", "o_proj"], "target_parameters": STACKS}),
    "experts alone, transposed": ("gpt-oss", {"target_modules": [], "target_parameters": STACKS}),
    "experts and routers, by PEFT's word": ("mixtral", {"target_modules": "all-linear"}),
    "a router as a parameter": ("granite-moe", {"target_modules": [], "target_parameters": [*STACKS, "router.weight"]}),
    "whole routers": ("deepseek-v3", {"target_modules": ["o_proj"], "extra": {"modules_to_save": ["mlp.gate"]}}),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> TokenDataset:
    return token_data(tmp_path_factory.mktemp("tokens") / "cache")


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(finetune.one_run, "prepare_for", lambda config, source, *to, **options: source)
    aligned_copies(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {name: save(name, tmp_path_factory.mktemp(name) / "model") for name, _ in ADAPTERS.values()}


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(7)
    model = tf.AutoModelForCausalLM.from_config(MIXTURES[name](), dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def plain(model: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return PeftModel.from_pretrained(base, adapter).eval()


def opened(model: Path, adapter: Path | None, output: Path) -> tuple[Session, Any]:
    config = text_config(model, output, engine={"resident_blocks": 0})
    session = Session(find_result(config, adapter))
    planned = session.plan(BatchShape.of_text(1, len(IDS), 1, train=False))
    return session, session.open(planned, output / "scratch")


@pytest.mark.parametrize("case", ADAPTERS)
def test_plain_peft_loads_what_is_trained(case, models, tokens, tmp_path):
    name, lora = ADAPTERS[case]
    lora = {"dropout": 0.0, "init_lora_weights": "gaussian"} | lora
    training = {"learning_rate": 0.05, "warmup_steps": 0}
    run = make_config(models[name], tokens, tmp_path / "run", lora=lora, training=training)
    trained = streamed_run(run)
    adapter = run.output / "adapter"
    reference = plain(models[name], adapter)
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor(IDS)[None].long(), use_cache=False).logits[0]
    expected = functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:]).long(), reduction="none")
    losses, texts = {}, {}
    for kind, result in {"bare": None, "adapted": adapter}.items():
        session, streamed = opened(models[name], result, tmp_path / kind)
        losses[kind] = torch.tensor(score(streamed, [[ask_trained(Example(IDS, IDS))]], 2)[0].losses)
        steps = decode(streamed, [IDS[:7].tolist()], [chooser(Sampling())], frozenset(), 6)
        texts[kind] = [token for tokens in steps for _, token in tokens]
        session.close()
    torch.testing.assert_close(losses["adapted"], expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(losses["bare"], expected, rtol=1e-3)
    generated = reference.generate(
        input_ids=torch.tensor(IDS[None, :7]).long(), attention_mask=torch.ones(1, 7, dtype=torch.int64), max_new_tokens=6,
        do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert texts["adapted"] == generated[0, 7:].tolist()
    going_on = make_config(models[name], tokens, tmp_path / "stopped", lora=lora, training=training)
    Trainer(going_on, callbacks=[StopAfter(2)]).train()
    assert_same_bits(streamed_run(going_on.model_copy(update={"resume": True})), trained)


def test_an_adapter_of_single_experts_is_converted(models, tmp_path):
    """As Mixtral's were before experts were stacked: PEFT loads it by another name."""
    config = tf.AutoConfig.from_pretrained(models["mixtral"])
    directory, rank = tmp_path / "adapter", 2
    directory.mkdir()
    generator = torch.Generator().manual_seed(3)
    shapes = {"w1": (config.intermediate_size, config.hidden_size), "w2": (config.hidden_size, config.intermediate_size)}
    shapes["w3"] = shapes["w1"]
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_local_experts):
            for word, (rows, columns) in shapes.items():
                place = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{word}"
                tensors[f"{place}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
                tensors[f"{place}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3"]}
    (directory / "adapter_config.json").write_text(json.dumps(words))
    with torch.no_grad():
        logits = plain(models["mixtral"], directory)(input_ids=torch.tensor(IDS)[None].long(), use_cache=False).logits[0]
    expected = functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:]).long(), reduction="none")
    found = {}
    for kind, result in {"bare": None, "adapted": directory}.items():
        session, streamed = opened(models["mixtral"], result, tmp_path / kind)
        found[kind] = torch.tensor(score(streamed, [[ask_trained(Example(IDS, IDS))]], 2)[0].losses)
        session.close()
    assert not torch.allclose(found["bare"], expected, rtol=1e-3)
    torch.testing.assert_close(found["adapted"], expected, rtol=2e-5, atol=2e-5)
