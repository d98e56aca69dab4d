"""Experts that are perturbed when they are multiplied by: the bits of a plain MeZO loop over whole stacks."""

from __future__ import annotations

import pytest
import torch
from mixtures import MIXTURES
from test_perturbations import PlainMezo, assert_exported, zo_config, zo_run
from tiny_models import CONFIGS, aligned_copies

PLACES = {
    "one slot": {"expert_slots": 1, "resident_blocks": 0, "lookahead": 0},
    "a few": {"expert_slots": 3, "resident_blocks": 1},
    "all": {},
}


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "name, device, dtype, noise",
    [
        ("qwen3-moe", "cpu", "float32", "rademacher"), ("gpt-oss", "cpu", "bfloat16", "gaussian"),
        ("gpt-oss", "simulated", "bfloat16", "rademacher"), ("qwen3-moe", "simulated", "float32", "low_rank"),
    ],
)  # fmt: skip
def test_steps_are_those_of_the_plain_loop(name, device, dtype, noise, checkpoint, tokens, tmp_path, monkeypatch):
    """Over folds, which are wider than the model's own weights, with decay."""
    aligned_copies(monkeypatch)
    monkeypatch.setitem(CONFIGS, name, MIXTURES[name])
    zo = {"noise": noise, "perturbations": 2, "fold_steps": 2} | ({"rank": 3} if noise == "low_rank" else {})

    def config(place: str):
        return zo_config(
            checkpoint(name, getattr(torch, dtype)), tokens, tmp_path / place, zo, device=device,
            training={"max_steps": 5, "weight_decay": 0.1}, engine={"dtype": dtype} | PLACES[place],
        )  # fmt: skip

    plain = PlainMezo(config("all")).run()
    for place in PLACES:
        assert zo_run(config(place)) == plain.losses
        assert_exported(config(place), plain, tmp_path / f"{place} exported")
