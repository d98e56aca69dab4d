"""Runs that tune a prefix: what they hold in memory, what they begin with, and what they refuse."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers as tf
from test_resume import data, data_prepared_here, models  # noqa: F401  fixtures
from test_zeroth_order import journal_bytes, zo_config
from text_models import CONFIGS, StopAfter, write_model

from finetune import Trainer
from finetune.adapters import prefix
from finetune.config import ConfigError
from finetune.memory.errors import UserError
from finetune.methods.base import make_method
from finetune.offload.perturb.journal import Journal
from finetune.offload.sizing.needs import STEP
from finetune.planned_run import BatchShape
from finetune.session import Session

ZO = {"parameters": "prefix", "epsilon": 0.1, "prefix_tokens": 3}


def test_caches_do_not_outlive_their_lanes(models, data, tmp_path, monkeypatch):  # noqa: F811
    """Without the help of the garbage collector, which may come too late."""
    alive, make = [], prefix._passing_cache

    def recorded(*arguments):
        cache = make(*arguments)
        alive.extend(map(weakref.ref, cache.layers))
        return cache

    monkeypatch.setattr(prefix, "_passing_cache", recorded)
    gc.disable()
    try:
        Trainer(zo_config(models["float32"], data, tmp_path, 3, ZO)).train()
        assert len(alive) >= 3 * 2 * 2 * 3 and not any(ref() for ref in alive)  # steps, versions, micro-batches, layers
    finally:
        gc.enable()


def test_layers_forget_what_they_are_updated_with(models):  # noqa: F811
    model = prefix.attach(tf.AutoModelForCausalLM.from_pretrained(models["float32"]), 3, seed=0)
    with torch.no_grad():
        cache = prefix._passing_cache(model, 2, [])
    before = [layer.keys.clone() for layer in cache.layers]
    new = torch.randn(2, 2, 5, 12)
    keys, values = cache.update(new, -new, 1)
    assert keys.equal(torch.cat([before[1], new], dim=2)) and values[:, :, 3:].equal(-new)
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, before, strict=True))
    assert cache.get_seq_length() == 3


def test_a_plan_counts_the_prefix_of_every_lane(models, data, tmp_path):  # noqa: F811
    config = CONFIGS["llama"]
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # of a position
    steps = []
    for tokens in (1, 101):
        session = Session(make_method(zo_config(models["bfloat16"], data, tmp_path, 3, ZO | {"prefix_tokens": tokens})))
        steps.append(session.plan(BatchShape.of_text(2, 30, 8, train=False)).needs.bytes_of(STEP))
        session.close()
    assert steps[1] - steps[0] == pytest.approx(8 * 100 * numbers * 2, rel=0.01)


def test_the_disk_has_room_for_both_ends(models, data, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"MiB  adapter\n +\S+ MiB  the prefix that it begins as"):
        Trainer(zo_config(models["float32"], data, tmp_path, 3, ZO, disk="3KiB")).train()


def test_a_run_goes_on_from_its_own_prefix_only(models, data, tmp_path, monkeypatch, capfd):  # noqa: F811
    config = zo_config(models["float32"], data, tmp_path / "out", 5, ZO)
    Trainer(config, callbacks=[StopAfter(2)]).train()
    path = config.output / "initial-adapter" / "adapter_model.safetensors"
    kept = path.read_bytes()

    whole = zo_config(models["float32"], data, tmp_path / "whole", 5, ZO)
    Trainer(whole).train()
    again = config.model_copy(update={"resume": True})
    with monkeypatch.context() as patch:
        # As on a machine that rounds otherwise, where the seed does not give the same prefix.
        patch.setattr(prefix.Prefix, "begin", lambda *_: None)
        for damage in (lambda: path.write_bytes(kept[:-5]), lambda: path.write_bytes(kept[:-1] + b"?"), path.unlink):
            damage()
            with pytest.raises(UserError, match="is not the prefix that this run began with"):
                Trainer(again).train()
    assert Trainer(again).train().global_step == 5
    assert path.read_bytes() == kept and journal_bytes(config) == journal_bytes(whole)
    assert "was damaged or lost; it is made again from the seed" in capfd.readouterr().err


def test_a_run_that_died_before_its_prefix_was_saved_goes_on(models, data, tmp_path, monkeypatch):  # noqa: F811
    whole, parts = (zo_config(models["float32"], data, tmp_path / name, 4, ZO) for name in ("whole", "parts"))
    Trainer(whole).train()

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("finetune.adapters.peft_files.save", dies)
        Trainer(parts).train()
    assert Journal.read(parts.output / "journal.zo").steps == 0
    assert Trainer(parts.model_copy(update={"resume": True})).train().global_step == 4
    assert journal_bytes(parts) == journal_bytes(whole)


def test_refusals(data, tmp_path):  # noqa: F811
    gpt2 = write_model("gpt2", tmp_path / "float32")
    with pytest.raises(UserError, match="a prefix of 3 and texts of .* more than the model's 64 positions"):
        Session(make_method(zo_config(gpt2, data, tmp_path / "a", 3, ZO))).plan(BatchShape.of_text(1, 62, 1, train=False))
    with pytest.raises(ConfigError, match="dataset.packing off with zo.parameters prefix"):
        zo_config(gpt2, data, tmp_path / "b", 3, ZO, dataset={"packing": True})
    mamba = tf.FalconH1ForCausalLM(
        tf.FalconH1Config(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, pad_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="a model whose layers all attend, found FalconH1ForCausalLM"):
        prefix.attach(mamba, 3, seed=0)
    vit = tf.ViTForImageClassification(tf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(UserError, match="expected a language model, found ViTForImageClassification"):
        prefix.attach(vit, 3, seed=0)
