"""Runs over a compressed checkpoint have the bits of runs over the plain one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import assert_same_bits, assert_same_on_both_devices, make_config, streamed_run

import finetune.offload.weights.binding
import finetune.offload.weights.compress
import finetune.offload.weights.parts
from finetune.memory.errors import UserError
from finetune.offload.weights.compress import compress_checkpoint
from finetune.offload.weights.parts import cut
from finetune.trainer import Trainer

pytestmark = pytest.mark.every(3)


@pytest.fixture
def twice(checkpoint, tmp_path, monkeypatch) -> Callable[[str], tuple[Path, Path]]:
    """Of a tiny model in bf16: compressed, in chunks that rows begin within, and as it is."""
    for name, value in {"MIN_BYTES": 0, "SHARE": 2, "LAYER_CHUNK": 256, "TABLE_CHUNK": 64}.items():
        monkeypatch.setattr(finetune.offload.weights.compress, name, value)
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)

    def get(name: str) -> tuple[Path, Path]:
        model = checkpoint(name, torch.bfloat16)
        files = {path.relative_to(model): path for path in model.glob("*") if ".safetensors" not in path.name}
        found = compress_checkpoint(cut(model), tmp_path / "compressed", 1 << 20, files)
        assert found.weights > 4
        return tmp_path / "compressed", model

    return get


CASES = {
    "fp32": ("llama", "float32", {}),
    "bf16": ("llama-tied", "bfloat16", {}),
    "GPT-2": ("gpt2", "float32", {}),
    "DoRA": ("qwen3", "float32", {"use_dora": True}),
    "trained whole": ("llama", "float32", {"target_modules": ["q_proj"], "extra": {"modules_to_save": ["k_proj"]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters(case, twice, tokens, tmp_path):
    """On a CPU, and beside a device, with one block in each memory; against plain PEFT over the plain model."""
    name, dtype, lora = CASES[case]
    compressed, model = twice(name)
    assert_same_on_both_devices(compressed, model, tokens, tmp_path, lora, dtype)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_head_in_chunks_and_rows_of_embeddings(name, twice, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 0)
    engine = {"loss_tile_vocab": 33}
    assert_same_bits(*(streamed_run(make_config(m, tokens, tmp_path / f"o-{m.name}", engine=engine)) for m in twice(name)))


@pytest.mark.parametrize("parameters", ["lora", "prefix"])
def test_zeroth_order_on_an_adapter(parameters, twice, tokens, tmp_path):
    runs = []
    for model in twice("llama"):
        output = tmp_path / f"out-{model.name}"
        runs.append(streamed_run(make_config(model, tokens, output, method="zo", zo={"parameters": parameters})))
    assert_same_bits(*runs)


@pytest.mark.parametrize("method", ["full", "zo"])
def test_methods_that_would_change_the_weights_are_refused(method, twice, tokens, tmp_path):
    model, _ = twice("llama")
    with pytest.raises(UserError, match="is stored as lossless bf16, .* train an adapter"):
        Trainer(make_config(model, tokens, tmp_path / "out", method=method)).train()
