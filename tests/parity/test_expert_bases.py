"""Runs over models whose experts are packed one by one: the bits of plain PEFT over the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from expert_checkpoints import KINDS, MODELS
from tiny_models import (
    CONFIGS,
    aligned_copies,
    assert_same_bits,
    assert_same_on_both_devices,
    make_config,
    save_tiny,
    streamed_run,
)

import finetune.offload.weights.binding
from finetune.memory.errors import UserError
from finetune.trainer import Trainer

pytestmark = pytest.mark.every(4)


@pytest.fixture
def moe(tmp_path, monkeypatch) -> Callable[..., tuple[Path, Path]]:
    """A model that is packed in that way, and that of the numbers which it stands for."""

    def get(name: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        monkeypatch.setitem(CONFIGS, name, MODELS[name])
        return KINDS[kind](save_tiny(name, tmp_path / "model", dtype), tmp_path)

    aligned_copies(monkeypatch)
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    return get


ATTENTION = {"target_modules": ["o_proj"]}
EXPERTS = {
    "dropout": 0.0,
    "target_modules": ["o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
CASES = [
    *(("qwen3-moe", kind, EXPERTS if kind in ("nf4", "int4") else ATTENTION) for kind in KINDS),
    *(("mixtral", kind, EXPERTS if kind == "awq" else ATTENTION) for kind in ("gptq", "awq")),
    *(("deepseek-v3", kind, EXPERTS if kind == "fp8" else ATTENTION) for kind in ("llm.int8", "fp8")),
]


@pytest.mark.parametrize("name, kind, lora", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_adapters(name, kind, lora, moe, tokens, tmp_path):
    """On a CPU and beside a device, with one block in each memory."""
    assert_same_on_both_devices(*moe(name, kind), tokens, tmp_path, lora)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_experts_are_as_decoded_ones(dtype, moe, tokens, tmp_path):
    """Of files in bf16, in the dtype of the files and in fp32."""
    runs = []
    for model in moe("qwen3-moe", "nf4", torch.bfloat16):
        config = make_config(model, tokens, tmp_path / f"out-{model.name}", engine={"dtype": dtype}, lora=EXPERTS)
        runs.append(streamed_run(config))
    assert_same_bits(*runs)


@pytest.mark.parametrize("method", ["full", "zo", "badam"])
def test_methods_that_would_change_packed_experts_are_refused(method, moe, tokens, tmp_path):
    model, _ = moe("qwen3-moe", "fp8")
    with pytest.raises(UserError, match=r"proj.* is stored as fp8 with scales, .* train an adapter"):
        Trainer(make_config(model, tokens, tmp_path / "out", method=method)).train()
