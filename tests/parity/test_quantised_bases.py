"""Runs over bases as people publish them quantised: the bits of plain PEFT over the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_bases import BASES, Base, write
from packed_checkpoints import pack_mxfp4
from tiny_models import (
    CONFIGS,
    HEADS,
    IDS,
    TEXT,
    aligned_copies,
    assert_same_bits,
    assert_same_on_both_devices,
    make_config,
    streamed_run,
)
from transformers import GptOssConfig

import finetune.offload.weights.binding
import finetune.offload.weights.parts
from finetune.memory.errors import UserError
from finetune.trainer import Trainer

pytestmark = pytest.mark.every(4)


CASES = {
    "fp8": ("llama", "fp8", {}),
    "fp8, rsLoRA": ("qwen3", "fp8, bf16 scales", {"use_rslora": True}),
    "fp8, DoRA": ("llama", "fp8", {"use_dora": True}),
    "int4": ("llama", "int4", {}),
    "int4, DoRA": ("qwen3", "int4", {"use_dora": True}),
    "int8, trained whole": ("llama", "int8", {"target_modules": ["q_proj"], "extra": {"modules_to_save": ["k_proj"]}}),
    "fp8, trained whole": ("llama-tied", "fp8", {"target_modules": ["q_proj"], "extra": {"modules_to_save": ["k_proj"]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters(case, checkpoint, tokens, tmp_path, monkeypatch):
    """On a CPU, where weights stay packed, and beside a device, with one block in each memory."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    name, kind, lora = CASES[case]
    packed, decoded = write(BASES[kind], checkpoint(name), tmp_path)
    assert_same_on_both_devices(packed, decoded, tokens, tmp_path, lora)


MXFP4 = Base(pack_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4")


@pytest.fixture
def gpt_oss(checkpoint, tmp_path, monkeypatch) -> Callable[..., tuple[Path, Path]]:
    """A tiny gpt-oss with its experts in MXFP4, and one of the numbers that these are."""

    def get(dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 5, "num_experts_per_tok": 2}
        monkeypatch.setitem(CONFIGS, "gpt-oss", lambda: GptOssConfig(**TEXT | sizes, **HEADS, **IDS))
        return write(MXFP4, checkpoint("gpt-oss", dtype), tmp_path, ("experts.gate_up_proj", "experts.down_proj"))

    aligned_copies(monkeypatch)
    return get


EXPERTS = {"dropout": 0.0, "target_modules": ["q_proj"]}
EXPERT_CASES = {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "attention, DoRA": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "experts": EXPERTS | {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_adapters_of_a_model_with_packed_experts(case, gpt_oss, tokens, tmp_path):
    lora = EXPERT_CASES[case]
    packed, decoded = gpt_oss()
    expected = assert_same_on_both_devices(packed, decoded, tokens, tmp_path, lora)
    assert len(set(expected.losses)) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"method": "zo", "zo": {"parameters": "lora"}}], ids=["lora", "zo"])
def test_packed_experts_are_as_decoded_ones(changes, dtype, gpt_oss, tokens, tmp_path):
    """In the dtype of the files, and in fp32 from bf16."""
    runs = []
    for model in gpt_oss(torch.bfloat16):
        engine, lora = {"dtype": dtype}, {"target_modules": ["q_proj"]}
        config = make_config(model, tokens, tmp_path / f"out-{model.name}", engine=engine, lora=lora, **changes)
        runs.append(streamed_run(config))
    assert_same_bits(*runs)


@pytest.mark.parametrize("method", ["full", "zo", "badam"])
def test_methods_that_would_change_packed_experts_are_refused(method, gpt_oss, tokens, tmp_path):
    with pytest.raises(UserError, match=r"experts\.\w+_proj is stored as mxfp4, .* train an adapter"):
        Trainer(make_config(gpt_oss()[0], tokens, tmp_path / "out", method=method)).train()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_head_in_chunks_and_rows_of_embeddings(name, kind, checkpoint, tokens, tmp_path, monkeypatch):
    """Rows that begin within a block, of two matrices and of one that is both; layers beside them are not quantised."""
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 0)
    ends = ("lm_head.weight", "embed_tokens.weight", "up_proj.weight")
    models = write(BASES[kind], checkpoint(name), tmp_path, ends)
    engine = {"loss_tile_vocab": 33}
    assert_same_bits(*(streamed_run(make_config(m, tokens, tmp_path / f"out-{m.name}", engine=engine)) for m in models))


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("parameters", ["lora", "prefix"])
def test_zeroth_order_on_an_adapter(parameters, kind, checkpoint, tokens, tmp_path):
    runs = []
    for model in write(BASES[kind], checkpoint("llama"), tmp_path):
        output = tmp_path / f"out-{model.name}"
        runs.append(streamed_run(make_config(model, tokens, output, method="zo", zo={"parameters": parameters})))
    assert_same_bits(*runs)


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("method", ["full", "zo", "badam"])
def test_methods_that_would_change_quantised_weights_are_refused(method, kind, checkpoint, tokens, tmp_path):
    model, _ = write(BASES[kind], checkpoint("llama"), tmp_path)
    with pytest.raises(UserError, match=rf"proj.weight is stored as {BASES[kind].word}, .* train an adapter"):
        Trainer(make_config(model, tokens, tmp_path / "out", method=method)).train()


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_bfloat16_computes_with_rounded_numbers(kind, checkpoint, tokens, tmp_path):
    models = write(BASES[kind], checkpoint("llama", torch.bfloat16), tmp_path)
    engine = {"dtype": "bfloat16"}
    assert_same_bits(*(streamed_run(make_config(m, tokens, tmp_path / f"out-{m.name}", engine=engine)) for m in models))
