"""Mixtures of experts of many architectures, with the losses of their routers: the streamed run against the plain loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from mixtures import MIXTURES, WITHOUT_ROUTER_LOSS
from tiny_models import CONFIGS, aligned_copies, assert_same_bits, make_config, reference_run, streamed_run

PLACEMENTS = [
    ("cpu", {"resident_blocks": 0, "lookahead": 1, "activations": "disk"}),
    ("cpu", {"resident_blocks": 2}),
    ("simulated", {"resident_blocks": 0, "lookahead": 1}),
    ("simulated", {"resident_blocks": 2, "activations": "disk"}),
]
ATTENTION = ["q_proj", "v_proj", "o_proj", "q_b_proj", "kv_b_proj", "in_proj_qkvz", "in_proj_qkv", "out_proj"]


@pytest.fixture(autouse=True)
def same_sums(monkeypatch, spill_everything) -> None:
    aligned_copies(monkeypatch)


@pytest.mark.every(5)
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architectures(name, dtype, checkpoint, tokens, tmp_path, monkeypatch):
    kind = f"{name}, with losses of its router"
    options = {} if name in WITHOUT_ROUTER_LOSS else {"router_aux_loss_coef": 0.3}
    monkeypatch.setitem(CONFIGS, kind, partial(MIXTURES[name], output_router_logits=True, **options))
    model = checkpoint(kind, getattr(torch, dtype))

    def config(folder, device="cpu", **engine):
        return make_config(
            model, tokens, tmp_path / folder, device=device, engine={"dtype": dtype, **engine}, training={"max_steps": 2},
            lora={"target_modules": ATTENTION},
        )  # fmt: skip

    expected = reference_run(config("plain"))
    for index, (device, engine) in enumerate(PLACEMENTS):
        assert_same_bits(streamed_run(config(str(index), device, **engine)), expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_losses_of_routers(name, checkpoint, tokens, tmp_path, monkeypatch):
    """Hooks collect what routers say inside of blocks; the model adds a loss of it to its own."""
    lora = {"dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    runs = []
    for coefficient in (0.0, 0.4):
        kind = f"{name}-{coefficient}"
        make = partial(MIXTURES[name], output_router_logits=True, router_aux_loss_coef=coefficient)
        monkeypatch.setitem(CONFIGS, kind, make)
        config = make_config(checkpoint(kind), tokens, tmp_path / kind, lora=lora, training={"max_steps": 2})
        runs.append(streamed_run(config))
    assert_same_bits(runs[1], reference_run(config))
    assert all(b - a > 0.3 for a, b in zip(runs[0].losses, runs[1].losses, strict=True))
    assert any(not value.equal(runs[0].adapter[key]) for key, value in runs[1].adapter.items())
