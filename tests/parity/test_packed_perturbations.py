"""Zeroth-order runs over packed bases: the bits of the same run over the plain weights that these stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packed_checkpoints import write_packed
from test_perturbations import PLACEMENTS, zo_config, zo_run

import offload.weights.parts
from finetune.methods.zeroth_order_options import ZerothOrderOptions

PRODUCTS = {"noise": "low_rank", "rank": 3, "perturb": "products", "perturbations": 2, "fold_steps": 2}
CASES = {
    "nf4 nested": ("llama", "nf4", True, "cpu", PLACEMENTS[0]),
    "nf4 beside a device": ("llama-tied", "nf4", False, "simulated", PLACEMENTS[1]),
    "fp4": ("qwen3", "fp4", False, "cpu", PLACEMENTS[1]),
    "int8": ("llama", "int8", False, "cpu", PLACEMENTS[2]),
}


def journal(output: Path) -> bytes:
    """Without the header, which says of which model it is."""
    return (output / "journal.zo").read_bytes().split(b"\n", 1)[1]


@pytest.mark.parametrize("case", CASES)
def test_products(case, checkpoint, tokens, tmp_path, monkeypatch):
    """Plain weights fold nothing in so many steps; packed ones never do."""
    monkeypatch.setattr(offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    monkeypatch.setattr(ZerothOrderOptions, "steps_between_folds", property(lambda self: 100))
    name, kind, nested, device, engine = CASES[case]
    losses = []
    for model in write_packed(checkpoint(name), tmp_path, kind, nested):
        output = tmp_path / f"out-{model.name}"
        training: dict[str, Any] = {"max_steps": 7, "weight_decay": 0.1}
        config = zo_config(model, tokens, output, PRODUCTS, device=device, engine=engine, training=training)
        losses.append(zo_run(config))
    assert losses[0] == losses[1]
    assert journal(tmp_path / "out-packed") == journal(tmp_path / "out-decoded")
