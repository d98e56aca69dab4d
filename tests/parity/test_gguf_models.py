"""Runs over GGUF files: the bits of plain PEFT over the numbers that gguf makes of them."""

from __future__ import annotations

import json

import pytest
from gguf_files import CONFIGS, MIXED, write_gguf
from tiny_models import assert_same_bits, assert_same_on_both_devices, make_config, reference_run, streamed_run

import finetune.offload.weights.binding
from finetune.memory.errors import UserError
from finetune.trainer import Trainer

pytestmark = pytest.mark.every(4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters(kind, tokens, tmp_path, monkeypatch):
    """Of every architecture, on a CPU and beside a device; tensors of all kinds of types."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    model, dense = write_gguf(kind, tmp_path, MIXED)
    lora = {"target_modules": "all-linear"} | ({"dropout": 0.0} if kind == "qwen3moe" else {})  # experts have none
    assert_same_on_both_devices(model, dense, tokens, tmp_path, lora)


@pytest.mark.parametrize("word", ["F32", "F16", "BF16"])
def test_files_that_are_not_packed(word, tokens, tmp_path):
    model, dense = write_gguf("llama", tmp_path, word)
    expected = reference_run(make_config(dense, tokens, tmp_path / "plain"))
    assert_same_bits(streamed_run(make_config(model, tokens, tmp_path / "out")), expected)


@pytest.mark.parametrize("down", ["Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_a_head_in_chunks_dora_and_more_types(down, tokens, tmp_path):
    model, dense = write_gguf("llama", tmp_path, {"output": "Q4_1", "ffn_down": down})
    changes = {"engine": {"loss_tile_vocab": 33}, "lora": {"use_dora": True}}
    assert_same_bits(*(streamed_run(make_config(m, tokens, tmp_path / f"out-{m.name}", **changes)) for m in (model, dense)))


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_zeroth_order_on_an_adapter(kind, tokens, tmp_path):
    runs = []
    for model in write_gguf("llama", tmp_path, MIXED):
        output = tmp_path / f"out-{model.name}"
        runs.append(streamed_run(make_config(model, tokens, output, method="zo", zo={"parameters": kind})))
    assert_same_bits(*runs)


def test_bfloat16_is_what_packed_weights_are_rounded_to(tokens, tmp_path):
    model, dense = write_gguf("gemma3", tmp_path, MIXED)
    dtypes = (("auto", model), ("bfloat16", dense))
    runs = [streamed_run(make_config(m, tokens, tmp_path / word, engine={"dtype": word})) for word, m in dtypes]
    assert_same_bits(*runs)


@pytest.mark.parametrize("types", ["Q8_0", "F32"])
@pytest.mark.parametrize("method", ["full", "zo", "badam"])
def test_methods_that_would_change_weights_are_refused(method, types, tokens, tmp_path):
    model, _ = write_gguf("llama", tmp_path, types)
    with pytest.raises(UserError, match=r"is stored as GGUF, .* train an adapter"):
        Trainer(make_config(model, tokens, tmp_path / "out", method=method)).train()


def test_quantising_once_more_is_refused(tokens, tmp_path):
    model, _ = write_gguf("llama", tmp_path, "F16")
    with pytest.raises(UserError, match="leave --quantize out"):
        Trainer(make_config(model, tokens, tmp_path / "out", quantize="nf4")).train()


def test_resume_and_base(tokens, tmp_path):
    """A run goes on over the same file under another name, and over no other one."""
    model, _ = write_gguf("qwen2", tmp_path, MIXED)
    constant = {"lr_scheduler": "constant"}
    whole = streamed_run(make_config(model, tokens, tmp_path / "whole", training=constant))
    streamed_run(make_config(model, tokens, tmp_path / "out", training=constant | {"max_steps": 2}))
    again = make_config(model.rename(tmp_path / "moved.gguf"), tokens, tmp_path / "out", training=constant, resume=True)
    assert_same_bits(streamed_run(again), whole)
    base = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "moved.gguf")
    (tmp_path / "other").mkdir()
    other, _ = write_gguf("qwen2", tmp_path / "other", "Q4_0")
    with pytest.raises(UserError, match=r"started with other settings \(model: .*moved.gguf"):
        Trainer(make_config(other, tokens, tmp_path / "out", training=constant | {"max_steps": 6}, resume=True)).train()
