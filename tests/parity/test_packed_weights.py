"""Runs over a base that bitsandbytes has packed: the bits of plain PEFT over the numbers that it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_checkpoints import write_packed
from tiny_models import assert_same_bits, assert_same_on_both_devices, make_config, reference_run, streamed_run

import finetune.offload.sizing.needs
import finetune.offload.weights.binding
import finetune.trainer
from finetune.memory.errors import UserError
from finetune.offload.sizing.calibration import Rates
from finetune.offload.weights.formats.bitsandbytes import Packed4Bit
from finetune.trainer import Trainer

CASES = {
    "nf4 nested": ("llama", "nf4", True, {}),
    "nf4, rsLoRA": ("qwen3", "nf4", False, {"use_rslora": True}),
    "fp4, DoRA": ("llama", "fp4", False, {"use_dora": True}),
    "nf4, trained whole": ("llama", "nf4", True, {"target_modules": ["q_proj"], "extra": {"modules_to_save": ["k_proj"]}}),
    "int8": ("llama-tied", "int8", False, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters(case, checkpoint, tokens, tmp_path, monkeypatch):
    """On a CPU, where weights stay packed, and beside a device, with one block in each memory."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    name, kind, nested, lora = CASES[case]
    packed, decoded = write_packed(checkpoint(name), tmp_path, kind, nested)
    assert_same_on_both_devices(packed, decoded, tokens, tmp_path, lora)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_weights_that_stay_decoded_for_a_visit(device, checkpoint, tokens, tmp_path, monkeypatch):
    """All of them, the two largest of a block, or none: the same bits, in fewer decodings."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    decoded: list[torch.dtype] = []
    decode_into = Packed4Bit.decode_into

    def counted(self, stored, numbers):
        if numbers.device.type != "meta":
            decoded.append(numbers.dtype)
        decode_into(self, stored, numbers)

    monkeypatch.setattr(Packed4Bit, "decode_into", counted)
    # Visits that are timed for a prediction decode too.
    monkeypatch.setattr(finetune.trainer, "with_prediction", lambda _, planned, **__: replace(planned, rates=Rates(1e9, 1e9)))
    packed, plain = write_packed(checkpoint("llama"), tmp_path, "nf4", nested=True)
    expected = reference_run(make_config(plain, tokens, tmp_path / "plain"))
    counts = []
    for rooms in (16, 2, 0):
        monkeypatch.setattr(finetune.offload.sizing.needs, "DECODED_WEIGHTS", rooms)
        decoded.clear()
        config = make_config(packed, tokens, tmp_path / f"{rooms}", device=device, engine={"kept_graphs": 0})
        assert_same_bits(streamed_run(config), expected)
        counts.append(len(decoded))
    steps, blocks, weights, micro_batches = 4, 5, 7, 3
    assert counts[0] == 2 * steps * blocks * weights  # forward and backward
    # Forward, and backward for the gradient. Backward alone also recomputes, less what it can do without.
    least = 2 * steps * blocks * weights * micro_batches
    assert least < counts[2] < 1.5 * least and counts[0] < counts[1] < counts[2]


def test_a_packed_head_in_chunks(checkpoint, tokens, tmp_path):
    """Of rows that begin within a block. Layers beside it are not packed, as `llm_int8_skip_modules` can have it."""
    packed = write_packed(checkpoint("llama"), tmp_path, "nf4", nested=True, ends=("lm_head.weight", "up_proj.weight"))
    engine = {"loss_tile_vocab": 33}
    assert_same_bits(*(streamed_run(make_config(m, tokens, tmp_path / f"out-{m.name}", engine=engine)) for m in packed))


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_zeroth_order_on_an_adapter(kind, checkpoint, tokens, tmp_path):
    runs = []
    for model in write_packed(checkpoint("llama"), tmp_path, "nf4", nested=True):
        output = tmp_path / f"out-{model.name}"
        runs.append(streamed_run(make_config(model, tokens, output, method="zo", zo={"parameters": kind})))
    assert_same_bits(*runs)


@pytest.mark.parametrize("kind, word", [("nf4", "4-bit"), ("int8", "int8")])
@pytest.mark.parametrize("method", ["full", "zo", "badam"])
def test_methods_that_would_change_packed_weights_are_refused(method, kind, word, checkpoint, tokens, tmp_path):
    model, _ = write_packed(checkpoint("llama"), tmp_path, kind)
    with pytest.raises(UserError, match=rf"proj.weight is stored as bitsandbytes {word}, .* train an adapter"):
        Trainer(make_config(model, tokens, tmp_path / "out", method=method)).train()


def test_bfloat16_computes_with_the_numbers_as_rounded(checkpoint, tokens, tmp_path):
    """In the dtype that bitsandbytes rounds to."""
    model = checkpoint("llama", torch.bfloat16)
    runs = [
        streamed_run(make_config(model, tokens, tmp_path / f"out-{model.name}", engine={"dtype": "bfloat16"}))
        for model in write_packed(model, tmp_path, "nf4")
    ]
    assert_same_bits(*runs)
