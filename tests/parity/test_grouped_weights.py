"""Runs over a base that GPTQ or AWQ has packed: the bits of plain PEFT over the numbers that it stands for."""

from __future__ import annotations

import pytest
import torch
from grouped_checkpoints import Awq, Gptq, write_grouped
from tiny_models import (
    CONFIGS,
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

# Inputs are 40, 48 and 56 numbers: in groups of 16, some have a short one at their end.
CASES = {
    "4 bits": ("llama", Gptq(), {}),
    "act order, DoRA": ("llama", Gptq(act_order=True), {"use_dora": True}),
    "8 bits, second format, rsLoRA": ("qwen3", Gptq(bits=8, format="gptq_v2", has_groups=False), {"use_rslora": True}),
    "biases, bf16 scales": ("llama-tied", Gptq(group_size=-1, dtype=torch.bfloat16), {}),
    "awq": ("llama", Awq(), {}),
    "awq, DoRA": ("llama-tied", Awq(group_size=-1, dtype=torch.bfloat16), {"use_dora": True}),
    "trained whole": ("llama", Gptq(), {"target_modules": ["q_proj"], "extra": {"modules_to_save": ["k_proj"]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters(case, checkpoint, tokens, tmp_path, monkeypatch):
    """On a CPU, where weights stay packed, and beside a device, with one block in each memory."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    name, how, lora = CASES[case]
    packed, decoded = write_grouped(checkpoint(name), tmp_path, how)
    assert_same_on_both_devices(packed, decoded, tokens, tmp_path, lora)


@pytest.mark.parametrize("how", [Gptq(act_order=True), Awq()])
def test_a_packed_head_in_chunks(how, tokens, tmp_path, monkeypatch):
    """Of rows that begin within a word. Layers beside it are not packed."""
    config = CONFIGS["llama"]()
    config.vocab_size = 104
    monkeypatch.setitem(CONFIGS, "llama", lambda: config)
    model = save_tiny("llama", tmp_path / "model")
    runs = [
        streamed_run(make_config(m, tokens, tmp_path / f"out-{m.name}", engine={"loss_tile_vocab": 33}))
        for m in write_grouped(model, tmp_path, how, ends=("lm_head.weight", "up_proj.weight"))
    ]
    assert_same_bits(*runs)


@pytest.mark.parametrize("kind, how", [("lora", Gptq(act_order=True)), ("prefix", Gptq()), ("lora", Awq())])
def test_zeroth_order_on_an_adapter(kind, how, checkpoint, tokens, tmp_path):
    runs = []
    for model in write_grouped(checkpoint("llama"), tmp_path, how):
        output = tmp_path / f"out-{model.name}"
        runs.append(streamed_run(make_config(model, tokens, output, method="zo", zo={"parameters": kind})))
    assert_same_bits(*runs)


@pytest.mark.parametrize("how, word", [(Gptq(), "GPTQ"), (Awq(), "AWQ")])
@pytest.mark.parametrize("method", ["full", "zo", "badam"])
def test_methods_that_would_change_packed_weights_are_refused(method, how, word, checkpoint, tokens, tmp_path):
    model, _ = write_grouped(checkpoint("llama"), tmp_path, how)
    with pytest.raises(UserError, match=rf"proj.weight is stored as {word}, .* train an adapter"):
        Trainer(make_config(model, tokens, tmp_path / "out", method=method)).train()


def test_bfloat16_computes_with_the_numbers_as_rounded(checkpoint, tokens, tmp_path):
    """To fp16, as those that are published mostly are."""
    model = checkpoint("llama", torch.float16)
    runs = [
        streamed_run(make_config(m, tokens, tmp_path / f"out-{m.name}", engine={"dtype": "bfloat16"}))
        for m in write_grouped(model, tmp_path, Gptq())
    ]
    assert_same_bits(*runs)
