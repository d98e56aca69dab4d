"""Adapters that PEFT saved elsewhere: plain PEFT's losses on the streamed model, or a refusal that says why."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from text_models import CONFIGS, make_config, plain_model
from torch.nn import functional

from finetune.adapters.saved import find
from finetune.data import Example
from finetune.memory.errors import UserError
from finetune.methods.results import find_result
from finetune.objectives.scoring import ask_trained, score
from finetune.planned_run import BatchShape
from finetune.session import Session

IDS = np.random.default_rng(3).integers(3, 345, 19).astype(np.int32)
Q = {"target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("tied") / "model", tie_word_embeddings=True)


def save_base(folder: Path, **options: Any) -> Path:
    config = tf.LlamaConfig(**CONFIGS["llama"].to_diff_dict() | {"attention_bias": True} | options)
    torch.manual_seed(5)
    base = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    base.save_pretrained(folder)
    return folder


def save_adapter(model: Path, folder: Path, config: peft.PeftConfig, scale: float = 0.3) -> Path:
    """A PEFT adapter all of whose numbers were changed."""
    torch.manual_seed(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=scale)
        adapted.save_pretrained(folder)
    return folder


def plain_losses(model: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = plain_model(model, adapter)(input_ids=torch.tensor(IDS)[None].long(), use_cache=False).logits[0]
    logits = logits[-len(IDS) :]  # behind a prompt
    return functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:]).long(), reduction="none")


def streamed_losses(model: Path, adapter: Path | str | None, output: Path, **engine: Any) -> torch.Tensor:
    session = Session(find_result(make_config(model, output, engine={"resident_blocks": 0, **engine}), adapter))
    try:
        planned = session.plan(BatchShape.of_text(1, len(IDS), 1, train=False))
        streamed = session.open(planned, output / "scratch")
        return torch.tensor(score(streamed, [[ask_trained(Example(IDS, IDS))]], 2)[0].losses)
    finally:
        session.close()


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=3, task_type="CAUSAL_LM", **Q | options)


SAME = {
    "patterns": lora(rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 3}, use_rslora=True),
    "embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "both ends with dora": lora(target_modules=["embed_tokens", "lm_head"], use_dora=True),
    "biases": lora(bias="all"),
    "modules trained whole": lora(modules_to_save=["lm_head", "embed_tokens", "k_proj", "model.norm"]),
    "rows": lora(trainable_token_indices=[int(IDS[3]), int(IDS[8])]),
    "not of a causal model": peft.LoraConfig(r=3, **Q, init_lora_weights="gaussian"),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize("case", SAME)
@pytest.mark.parametrize("ends", ["apart", "tied"])
def test_gives_plain_pefts_losses(case, ends, model, tied, tmp_path):
    base = {"apart": model, "tied": tied}[ends]
    adapter = save_adapter(base, tmp_path / "adapter", SAME[case])
    expected = plain_losses(base, adapter)
    assert not torch.allclose(expected, streamed_losses(base, None, tmp_path / "bare"), rtol=1e-3)
    for tile in (None, 77):
        found = streamed_losses(base, adapter, tmp_path / "out", loss_tile_vocab=tile)
        assert torch.allclose(found, expected, rtol=2e-5, atol=2e-5)


REFUSED = {
    "pissa": (lora(init_lora_weights="pissa"), "has init_lora_weights='pissa'.* was made for a base that PEFT has changed"),
    "layer_replication": (lora(layer_replication=[[0, 2], [1, 3]]), "has layer_replication="),
    "alora": (lora(alora_invocation_tokens=[5]), r"has alora_invocation_tokens=\[5\]"),
    "kind": (peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "of kind poly, .* number of the task"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name(case, model, tmp_path):
    config, message = REFUSED[case]
    adapter = save_adapter(model, tmp_path / "adapter", config)
    with pytest.raises(UserError, match=message):
        streamed_losses(model, adapter, tmp_path / "out")


def change(adapter: Path, edit: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path)


def test_tensors_that_do_not_fit_are_named(model, tmp_path):
    adapter = save_adapter(model, tmp_path / "adapter", lora())
    other = shutil.copytree(adapter, tmp_path / "other")
    change(other, lambda tensors: {name.replace("layers.1", "blocks.1"): value for name, value in tensors.items()})
    with pytest.raises(UserError) as refused:
        streamed_losses(model, other, tmp_path / "out")
    message = str(refused.value)
    assert "no place for: 2 (base_model.model.model.blocks.1.self_attn.q_proj.lora_A" in message
    assert "lacks: 2 (base_model.model.model.layers.1.self_attn.q_proj.lora_A" in message
    change(adapter, lambda tensors: {name: value for name, value in tensors.items() if "layers.2" not in name})
    with pytest.raises(UserError, match="lacks: 2 .*layers.2"):
        streamed_losses(model, adapter, tmp_path / "out")
    whole = save_adapter(model, tmp_path / "whole", lora(modules_to_save=["lm_head"]))
    change(whole, lambda tensors: {name: value for name, value in tensors.items() if "lm_head" not in name})
    with pytest.raises(UserError, match="lacks lm_head, which its modules_to_save names"):
        streamed_losses(model, whole, tmp_path / "out")
    ends = save_adapter(model, tmp_path / "ends", lora(target_modules=["embed_tokens"]))
    change(ends, lambda tensors: {n: v[:-1] if "base_layer" in n else v for n, v in tensors.items()})
    with pytest.raises(UserError, match=r"brings model.embed_tokens.weight as F32 \[344, 40\], the model has \[345, 40\]"):
        streamed_losses(model, ends, tmp_path / "out")


def test_where_an_adapter_may_be(model, tmp_path, monkeypatch):
    adapter = save_adapter(model, tmp_path / "home" / "adapter", lora())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find("~/adapter") == adapter
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(adapter))
    assert find("someone/adapter") == adapter
    assert find(tmp_path / "absent/adapter") == tmp_path / "absent/adapter"
    with pytest.raises(UserError, match=r"is not an adapter \(expected adapter_config\.json"):
        streamed_losses(model, tmp_path, tmp_path / "out")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"found adapter_model\.bin, which can run code"):
        streamed_losses(model, adapter, tmp_path / "out")


def test_another_base_model_is_said(model, tmp_path):
    adapter = save_adapter(model, tmp_path / "adapter", lora())
    config = json.loads((adapter / "adapter_config.json").read_text())
    said = {}
    for base in (str(model), "someone/other-7b", "/cache/models--someone--model/snapshots/0123abc"):
        words = config | {"base_model_name_or_path": base, "of_a_later_peft": 1}
        (adapter / "adapter_config.json").write_text(json.dumps(words))
        session = Session(find_result(make_config(model, tmp_path / "out"), adapter))
        said[base] = [note for note in session.notes if "adapter" in note]
        session.close()
    assert [len(notes) for notes in said.values()] == [0, 1, 0]
    assert "someone/other-7b" in said["someone/other-7b"][0]


def test_an_adapter_beside_a_whole_model_is_refused_unless_it_is_named(model, tmp_path):
    """Transformers' from_pretrained would use it, without a word."""
    both = tmp_path / "both"
    shutil.copytree(model, both)
    save_adapter(model, both, lora(**Q))
    with pytest.raises(UserError, match="holds an adapter .* beside a whole model"):
        Session(find_result(make_config(both, tmp_path / "run"), None))
    found = streamed_losses(both, both, tmp_path / "run")
    torch.testing.assert_close(found, plain_losses(model, both), rtol=1e-5, atol=1e-5)
