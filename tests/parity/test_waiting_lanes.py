"""Micro-batches that wait on disk between visits: the numbers of plain loops, whatever a step trains and where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES
from test_perturbations import zo_config
from test_weight_training import (  # noqa: F401  fixtures
    assert_same,
    reference,
    roots_that_kernels_have,
    small_pieces,
    streamed,
    weights_config,
)
from tiny_models import CONFIGS, aligned_copies, assert_same_bits, make_config, reference_run, streamed_run

import finetune.offload.weights.parts
from finetune import Trainer
from finetune.offload.sizing.needs import HIDDEN_STATES

DISK = {"hidden_states": "disk", "resident_blocks": 0, "lookahead": 1}
MANY = {"batch_size": 6, "micro_batch_size": 1}


@pytest.fixture(autouse=True)
def rows_on_demand(monkeypatch, spill_everything) -> None:
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "name, device, changes",
    [
        ("llama", "cpu", {}), ("llama", "simulated", {"kept_graphs": 2}), ("llama-tied", "cpu", {"loss_tile_tokens": 16}),
        ("llama-tied", "simulated", {"io_backend": "threads"}), ("gemma2", "cpu", {}), ("gpt2", "cpu", {"kept_graphs": 1}),
        ("opt", "cpu", {}), ("opt-layerdrop", "simulated", {}),
    ],
)  # fmt: skip
def test_lora(name, device, changes, checkpoint, tokens, tmp_path):
    """With dropout. Masks, rotary tables and windows; lanes that leave out different blocks."""
    training = MANY | ({"batch_size": 7, "micro_batch_size": 2} if name == "gemma2" else {})
    config = make_config(
        checkpoint(name), tokens, tmp_path / "out", device=device, engine=DISK | changes, training=training,
        lora={"dropout": 0.1},
    )  # fmt: skip
    assert_same_bits(streamed_run(config), reference_run(config))
    assert Trainer(config.model_copy(update={"output": tmp_path / "plan"})).plan().plan.count(HIDDEN_STATES)


def test_whole_logits(checkpoint, images, tmp_path):
    config = make_config(checkpoint("vit"), images, tmp_path / "out", engine=DISK, training=MANY, lora={"dropout": 0.1})
    assert_same_bits(streamed_run(config), reference_run(config))


def test_a_head_in_chunks(checkpoint, tokens, tmp_path):
    """Which is read again for every micro-batch."""
    runs = []
    for place in ("host", "disk"):
        engine = DISK | {"hidden_states": place, "loss_tile_vocab": 40, "loss_tile_tokens": 16}
        runs.append(streamed_run(make_config(checkpoint("gemma2"), tokens, tmp_path / place, engine=engine, training=MANY)))
    assert_same_bits(*runs)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "name, device, training",
    [
        ("llama", "simulated", {}),
        ("qwen3-moe", "cpu", {"router_loss": "micro_batch", "router_loss_coefficient": 0.3}),
    ],
)  # fmt: skip
def test_all_weights(name, device, training, checkpoint, tokens, tmp_path, monkeypatch):
    aligned_copies(monkeypatch)
    if name in MIXTURES:
        monkeypatch.setitem(CONFIGS, name, MIXTURES[name])
    config = weights_config(
        checkpoint(name), tokens, tmp_path / "out", engine=DISK, training=MANY | training, device=device
    )  # fmt: skip
    assert_same(streamed(config, tmp_path / "exported"), reference(config))


def test_all_weights_with_a_head_in_chunks(checkpoint, tokens, tmp_path):
    """Its gradient is a sum over all micro-batches."""
    found = []
    for place in ("host", "disk"):
        engine = DISK | {"hidden_states": place, "loss_tile_vocab": 40, "loss_tile_tokens": 16}
        config = weights_config(checkpoint("llama"), tokens, tmp_path / place, engine=engine, training=MANY)
        found.append(streamed(config, tmp_path / f"{place} exported"))
    assert_same(*found)


ZEROTH_ORDER = {
    "weights": ("llama-tied", {}, {}),
    "a head in chunks": ("gemma2", {}, {"loss_tile_vocab": 40, "loss_tile_tokens": 16}),
    "a prefix": ("llama", {"parameters": "prefix"}, {}),
    "experts": ("mixtral", {"parameters": "lora"}, {}),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("kind", ZEROTH_ORDER)
def test_forward_passes(kind, device, checkpoint, tokens, tmp_path):
    name, zo, tiles = ZEROTH_ORDER[kind]

    def run(place: str) -> Any:
        engine = DISK | tiles | {"hidden_states": place}
        training = MANY | {"max_steps": 3}
        config = zo_config(checkpoint(name), tokens, tmp_path / place, zo, device=device, engine=engine, training=training)
        Trainer(config).train()
        return losses_of(config.output)

    assert run("host") == run("disk")


def losses_of(output: Path) -> list[str]:
    return [line.partition('"loss":')[2].partition(",")[0] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("word", ["micro_batch", "global_batch"])
def test_router_losses(word, checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "olmoe", MIXTURES["olmoe"])
    runs = []
    for place in ("host", "disk"):
        config = make_config(
            checkpoint("olmoe", torch.bfloat16), tokens, tmp_path / place, engine=DISK | {"hidden_states": place},
            training=MANY | {"router_loss": word, "router_loss_coefficient": 0.3},
            lora={"dropout": 0.0, "target_modules": "all-linear"},
        )  # fmt: skip
        runs.append(streamed_run(config))
    assert_same_bits(*runs)
