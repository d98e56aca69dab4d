"""PiSSA and OLoRA over a base that stays in its files: plain PEFT's losses, and its own conversion of the trained adapter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from text_models import StopAfter
from tiny_models import make_config, reference_run, save_tiny, streamed_run

from finetune import Trainer
from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.offload.weights import binding

QV = {"target_modules": ["q_proj", "down_proj"], "r": 4, "alpha": 6}


def by_peft(config: Config, folder: Path) -> tuple[list[float], dict[str, torch.Tensor], dict[str, Any]]:
    """Losses, the converted adapter and its configuration."""

    def begin(model: Any) -> None:
        model.save_pretrained(folder / "initial")

    def end(model: Any, step: int) -> None:
        if step == config.training.max_steps - 1:
            model.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=str(folder / "initial"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = reference_run(config, prepare=begin, after_update=end)
    place = folder / "converted"
    return run.losses, load_file(place / "adapter_model.safetensors"), json.loads((place / "adapter_config.json").read_text())


@pytest.mark.parametrize("init, dtype, options", [
    ("pissa", "float32", {}), ("pissa_niter_3", "bfloat16", {"use_rslora": True}), ("olora", "bfloat16", {"dropout": 0.2}),
])  # fmt: skip
def test_gives_plain_pefts_bits(init, dtype, options, tokens, tmp_path, monkeypatch):
    """Decoded at products too; resumed after two of three steps."""
    if init != "pissa":
        monkeypatch.setattr(binding, "LAZY_MIN_BYTES", 1)
    model = save_tiny("llama", tmp_path / "model", getattr(torch, dtype))
    lora = QV | {"init_lora_weights": init} | options
    training = {"max_steps": 3, "batch_size": 4, "micro_batch_size": 2}
    engine = {"dtype": dtype, "resident_blocks": 1}
    config = make_config(model, tokens, tmp_path / "out", lora=lora, training=training, engine=engine)
    losses, adapter, about = by_peft(config, tmp_path / "peft")
    if init == "olora":
        Trainer(config, [StopAfter(2)]).train()
        config = config.model_copy(update={"resume": True})
    found = streamed_run(config)
    assert found.losses == losses
    assert found.adapter.keys() == adapter.keys()
    for name, value in adapter.items():
        assert found.adapter[name].equal(value), name
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora"):
        assert saved[key] == about[key]


@pytest.mark.parametrize("changes, words", [
    ({"lora": {"use_dora": True}}, "PEFT's conversion to an adapter of the base knows no use_dora"),
    ({"lora": {"target_modules": ["lm_head"]}}, "is tied to another weight"),
])  # fmt: skip
def test_what_cannot_begin_so_is_refused(changes, words, tokens, tmp_path):
    model = save_tiny("llama-tied", tmp_path / "model")
    config = make_config(model, tokens, tmp_path / "out", lora=QV | {"init_lora_weights": "pissa"} | changes["lora"])
    with pytest.raises(UserError, match=words):
        Trainer(config).train()


def test_an_adapter_of_a_changed_base_is_not_loaded(tokens, tmp_path):
    """One that PEFT has saved without converting it."""
    model = save_tiny("llama", tmp_path / "model")
    config = make_config(model, tokens, tmp_path / "out", lora=QV | {"init_lora_weights": "pissa"})
    from tiny_models import load_plain

    load_plain(config).save_pretrained(tmp_path / "adapter")
    from finetune.evaluate import evaluate

    with pytest.raises(UserError, match="init_lora_weights='pissa', which cannot be used"):
        evaluate(config.model_copy(update={"eval_data": tokens}), tmp_path / "adapter")
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path / "adapter"), peft.LoraConfig)
