"""Runs whose blocks compute a few tokens of a text at a time: the numbers of runs over whole texts, but for rounding."""

from __future__ import annotations

import pytest
import torch
from test_perturbations import zo_config
from test_waiting_lanes import DISK, losses_of, rows_on_demand  # noqa: F401  fixture
from test_weight_training import weights_config
from tiny_models import make_config, streamed_run

from finetune import Trainer
from finetune.memory import tensor_file
from finetune.memory.errors import UserError

CHUNK = {"sequence_chunk": 7}  # rows have up to 23 tokens; some have fewer than this
IN_MEMORY = {"hidden_states": "host", "activations": "host"}
SHORT = {"max_steps": 1, "warmup_steps": 0}


def assert_close(found: list, expected: list) -> None:
    assert [float(x) for x in found] == pytest.approx([float(x) for x in expected], rel=2e-5)


def test_lora(checkpoint, tokens, tmp_path, monkeypatch):
    """Packed rows; lanes on disk between visits: the same bits as in memory."""
    monkeypatch.setattr(tensor_file, "MIN_BYTES", 1)
    in_file, runs = [], []
    check = tensor_file.TensorFile.check
    monkeypatch.setattr(tensor_file.TensorFile, "check", lambda file: in_file.append(file.used_bytes) or check(file))
    for engine in (DISK, DISK | CHUNK, IN_MEMORY | CHUNK):
        runs.append(
            streamed_run(
                make_config(
                    checkpoint("gemma3"), tokens, tmp_path / str(len(runs)), engine=engine,
                    dataset={"packing": True}, training=SHORT, lora={"dropout": 0.0},
                )  # fmt: skip
            )
        )
    whole, found, near = runs
    assert all(in_file) and in_file
    assert found.losses == near.losses and all(value.equal(near.adapter[key]) for key, value in found.adapter.items())
    assert_close(found.losses, whole.losses)
    for key, value in whole.adapter.items():
        torch.testing.assert_close(found.adapter[key], value, rtol=2e-2, atol=2e-4)


def test_all_weights(checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "MIN_BYTES", 1)
    losses = []
    for chunk in ({}, CHUNK | {"hidden_states": "disk"}):
        config = weights_config(checkpoint("qwen3"), tokens, tmp_path / str(len(chunk)), engine=chunk, training=SHORT)
        Trainer(config).train()
        losses.append(losses_of(config.output))
    assert_close(*losses)


def test_forward_passes(checkpoint, tokens, tmp_path):
    losses = []
    for chunk in ({}, CHUNK):
        config = zo_config(checkpoint("llama"), tokens, tmp_path / str(len(chunk)), {}, engine=chunk, training=SHORT)
        Trainer(config).train()
        losses.append(losses_of(config.output))
    assert_close(*losses)


def test_what_does_not_go_is_refused_before_anything_is_read(checkpoint, tokens, images, tmp_path, monkeypatch):
    def refusal(config) -> str:
        with pytest.raises(UserError, match="engine.sequence_chunk") as error:
            Trainer(config).plan()
        return str(error.value)

    def refused(name: str, data=tokens, **changes) -> str:
        return refusal(make_config(checkpoint(name), data, tmp_path / name, engine=CHUNK, **changes))

    assert "its attention is eager" in refused("gemma2")
    assert "its experts would be fetched again" in refused("mixtral")
    assert "rows of tensors" in refused("vit", images)
    assert "attention dropout" in refused("opt")
    prefix = zo_config(checkpoint("llama"), tokens, tmp_path / "zo", {"parameters": "prefix"}, engine=CHUNK)
    assert "its blocks are given keys and values" in refusal(prefix)
    whole = make_config(checkpoint("gemma2"), tokens, tmp_path / "whole", engine={"sequence_chunk": 24})
    assert Trainer(whole).plan().batch.chunk is None
