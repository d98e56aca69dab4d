"""Mixtures of experts of many architectures, with the losses of their routers: the streamed run against the plain loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch
from mixtures import MIXTURES, MORE, WITHOUT_ROUTER_LOSS
from tiny_models import CONFIGS, aligned_copies, assert_same_bits, make_config, reference_run, streamed_run

PLACEMENTS = [
    ("cpu", {"resident_blocks": 0, "lookahead": 1, "activations": "disk"}),
    ("cpu", {"resident_blocks": 2, "kept_graphs": 1}),
    ("simulated", {"resident_blocks": 0, "lookahead": 1}),
    ("simulated", {"resident_blocks": 2, "activations": "disk"}),
]
ATTENTION = ["q_proj", "v_proj", "o_proj", "q_b_proj", "kv_b_proj", "in_proj_qkvz", "in_proj_qkv", "out_proj"]


@pytest.fixture(autouse=True)
def same_sums(monkeypatch, spill_everything) -> None:
    aligned_copies(monkeypatch)


@pytest.mark.every(5)
@pytest.mark.parametrize("name, dtype", zip(MIXTURES, cycle(["float32", "bfloat16"])))
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
    for index, (device, engine) in enumerate(PLACEMENTS[list(MIXTURES).index(name) % 2 :: 2]):  # two, by turns
        assert_same_bits(streamed_run(config(str(index), device, **engine)), expected)


@pytest.fixture
def mixture(checkpoint, monkeypatch) -> Callable[..., Path]:
    """The tiny checkpoint of a name and stored dtype."""

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        monkeypatch.setitem(CONFIGS, name, MIXTURES[name])
        return checkpoint(name, dtype)

    return get


STACKS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.every(5)
@pytest.mark.parametrize("name, dtype", zip(MIXTURES, cycle(["bfloat16", "float32"])))
def test_adapters_of_stacked_experts(name, dtype, mixture, tokens, tmp_path):
    model, lora = mixture(name, getattr(torch, dtype)), {"dropout": 0.0, "target_modules": [], "target_parameters": STACKS}

    def config(folder, device="cpu"):
        engine = {"dtype": dtype, "resident_blocks": 1}
        return make_config(
            model, tokens, tmp_path / folder, device=device, engine=engine, training={"max_steps": 2}, lora=lora
        )

    expected = reference_run(config("plain"))
    stacks = {name.partition(".experts.")[2] for name in expected.adapter}
    assert stacks == {f"{layer}lora_{end}.weight" for layer in ("base_layer.", "") for end in "AB"}
    for device in ("cpu", "simulated"):
        assert_same_bits(streamed_run(config(device, device)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_architectures(name, checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, name, MORE[name])
    stacks = [stack.replace("gate_up", "up") for stack in STACKS] if name == "nemotron-h" else STACKS
    modules = ["q_proj", "v_proj", "o_proj", "q_b_proj", "kv_b_proj"]
    lora = {"dropout": 0.0, "target_modules": modules, "target_parameters": stacks}

    def config(folder, device="cpu"):
        engine = {"resident_blocks": 1}
        return make_config(
            checkpoint(name), tokens, tmp_path / folder, device=device, engine=engine, training={"max_steps": 2}, lora=lora
        )

    expected = reference_run(config("plain"))
    for device in ("cpu", "simulated"):
        assert_same_bits(streamed_run(config(device, device)), expected)


ROUTERS = {
    "beside attention and experts": (
        "qwen3-moe", {"dropout": 0.0, "target_modules": ["q_proj"], "target_parameters": [*STACKS, "mlp.gate.weight"]}
    ),
    "a parameter of a linear layer": ("llama4", {"dropout": 0.0, "target_modules": [], "target_parameters": ["router.weight"]}),
    "PEFT's word": ("olmoe", {"dropout": 0.0, "target_modules": "all-linear"}),
    "whole": ("mixtral", {"target_modules": ["q_proj"], "extra": {"modules_to_save": ["mlp.gate"]}}),
    "whole, with a bias": ("gpt-oss", {"target_modules": ["q_proj"], "extra": {"modules_to_save": ["router"]}}),
    "whole, with a correction": ("deepseek-v3", {"target_modules": ["o_proj"], "extra": {"modules_to_save": ["mlp.gate"]}}),
    "whole, returning several tensors": ("llama4", {"target_modules": ["q_proj"], "extra": {"modules_to_save": ["router"]}}),
}  # fmt: skip


@pytest.mark.parametrize("case", ROUTERS)
def test_routers_are_trained(case, mixture, tokens, tmp_path):
    name, lora = ROUTERS[case]
    config = make_config(mixture(name), tokens, tmp_path / "out", lora=lora, training={"max_steps": 3})
    expected = reference_run(config)
    assert any("gate." in name or "router." in name for name in expected.adapter)
    assert_same_bits(streamed_run(config), expected)


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
