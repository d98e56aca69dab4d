"""Zeroth-order runs over packed bases: the bits of the same run over the plain weights that these stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grouped_checkpoints import Awq, Gptq, write_grouped
from packed_checkpoints import CODES, edit, write_packed, write_twice
from safetensors.torch import load_file
from test_perturbations import PLACEMENTS, PlainMezo, zo_config, zo_run
from test_quantised_bases import BASES

import finetune.offload.weights.binding
import finetune.offload.weights.parts
from finetune.export import export
from finetune.methods.zeroth_order_options import ZerothOrderOptions
from finetune.offload.weights.formats.bitsandbytes import Packed4Bit

pytestmark = pytest.mark.every(4)

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
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
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


def test_variants_share_what_stays_decoded(checkpoint, tokens, tmp_path, monkeypatch):
    """Noise in products leaves the weight as it is: it is decoded once for all of them. Losses are those over plain weights."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    decoded: list[int] = []
    decode_into = Packed4Bit.decode_into

    def counted(self, stored, numbers):
        if numbers.device.type != "meta":
            decoded.append(numbers.numel())
        decode_into(self, stored, numbers)

    monkeypatch.setattr(Packed4Bit, "decode_into", counted)
    packed, plain = write_packed(checkpoint("llama"), tmp_path, "nf4")
    runs = [
        zo_run(zo_config(model, tokens, tmp_path / f"out-{model.name}", PRODUCTS, training={"max_steps": 3}))
        for model in (plain, packed)
    ]
    assert runs[0] == runs[1]
    steps, blocks, weights = 3, 5, 7
    assert len(decoded) == steps * blocks * weights


FORMATS = {
    "gptq": lambda model, folder: write_grouped(model, folder, Gptq(act_order=True)),
    "awq": lambda model, folder: write_grouped(model, folder, Awq()),
    "fp8": lambda model, folder: write_twice(model, folder, lambda _, w: BASES["fp8"].pack(w), BASES["fp8"].section),
    "int4": lambda model, folder: write_twice(model, folder, lambda _, w: BASES["int4"].pack(w), BASES["int4"].section),
}


@pytest.mark.parametrize("form", FORMATS)
def test_products_over_other_formats(form, checkpoint, tokens, tmp_path, monkeypatch):
    """And what is exported: every weight as the plain one."""
    monkeypatch.setattr(ZerothOrderOptions, "steps_between_folds", property(lambda self: 100))
    losses, tuned = [], []
    for model in FORMATS[form](checkpoint("llama"), tmp_path):
        config = zo_config(model, tokens, tmp_path / f"out-{model.name}", PRODUCTS, training={"max_steps": 3})
        losses.append(zo_run(config))
        export(config, tmp_path / f"tuned-{model.name}")
        shards = (tmp_path / f"tuned-{model.name}").glob("*.safetensors")
        tuned.append({name: value for shard in shards for name, value in load_file(shard).items()})
    assert losses[0] == losses[1]
    found, expected = tuned
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # numbers that were rounded to 16 bits are written in these
        assert found[name].to(value.dtype).equal(value), name


class PlainScales(PlainMezo):
    """As `PlainMezo`, but what is tuned is the scales of packed weights, which are decoded anew under every variant."""

    def __init__(self, config: Any, packed: Path, kind: str) -> None:
        """config: names the decoded weights."""
        super().__init__(config)
        self.kind = kind
        self.most = 100.0 if config.zo.clip is None else config.zo.clip
        suffix, field = FIELDS.get(kind, (".weight.absmax", ".absmax"))
        stored: dict[str, torch.Tensor] = {}
        for shard in packed.glob("*.safetensors"):
            stored |= load_file(shard)
        self.scaled = {key.removesuffix(suffix) + ".weight": value for key, value in stored.items() if key.endswith(suffix)}
        self.codes = {name: stored[name] for name in self.scaled}
        self.weights = {name: p for name, p in self.model.named_parameters() if name in self.scaled}
        self.values = {name + field: value.flatten() for name, value in self.scaled.items()}
        self.named = {name + field: value for name, value in self.scaled.items()}
        self.field = field

    def up_to_date(self, name: str) -> torch.Tensor:
        return super().up_to_date(name).clamp(min=1e-7) if self.group else self.values[name]

    def set(self, seed: int, coefficient: float) -> None:
        for name, weight in self.weights.items():
            scales = self.up_to_date(name + self.field)
            if coefficient:
                z = torch.from_numpy(self.noise(name + self.field, seed, scales.numel()))
                scales = scales + torch.tensor(coefficient, dtype=torch.float32) * z
            if self.kind == "int8":
                numbers = self.codes[name].float() * scales[:, None] * (1 / 127)
            elif self.kind == "fp8":
                grid = scales.view(self.scaled[name].shape).repeat_interleave(16, 0).repeat_interleave(24, 1)
                numbers = self.codes[name].float() * grid[: weight.shape[0], : weight.shape[1]]
            else:
                pairs = self.codes[name].flatten().numpy()
                numbers = CODES[self.kind][np.stack([pairs >> 4, pairs & 15], 1).reshape(-1)][: weight.numel()]
                numbers = (torch.from_numpy(numbers) * scales[torch.arange(weight.numel()) // 64]).bfloat16()
            weight.data = numbers.view(weight.shape).to(weight.dtype)


FIELDS = {"int8": (".SCB", ".scales"), "fp8": (".weight_scale_inv", ".scales")}
SCALES = {
    "fp8": ("llama", "fp8", {"fold_steps": 2, "noise": "gaussian"}, "cpu", PLACEMENTS[1]),
    "nf4, gaussian": ("llama", "nf4", {"noise": "gaussian", "fold_steps": 1}, "cpu", PLACEMENTS[0]),
    "fp4, folds, beside a device": ("qwen3", "fp4", {"fold_steps": 2, "perturbations": 2}, "simulated", PLACEMENTS[1]),
    "int8, clipped": ("llama-tied", "int8", {"fold_steps": 4, "clip": 0.5}, "cpu", PLACEMENTS[2]),
    "nf4, the head in chunks": ("llama", "nf4", {"fold_steps": 2}, "cpu", {"loss_tile_vocab": 33}),
}


@pytest.mark.parametrize("case", SCALES)
def test_scales(case, checkpoint, tokens, tmp_path, monkeypatch):
    """Against a plain loop; and what is exported holds its scales, beside all other bytes as they were. Some layers are decoded
    when they are bound, the larger ones when they multiply."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 700)
    name, kind, zo, device, engine = SCALES[case]
    ends = ("proj.weight", "lm_head.weight") if "head" in case else ("proj.weight",)
    if kind == "fp8":
        packed, decoded = FORMATS["fp8"](checkpoint(name), tmp_path)
    else:
        packed, decoded = write_packed(checkpoint(name), tmp_path, kind, ends=ends)
    small = {  # some scales that one step makes negative
        key: torch.where(torch.arange(value.numel()).view_as(value) % 5 == 0, 1e-6, value)
        for shard in packed.glob("*.safetensors")
        for key, value in load_file(shard).items()
        if key.endswith((".absmax", ".SCB", "_scale_inv"))
    }
    edit(packed, small)
    change = {"device": device, "engine": engine, "training": {"max_steps": 7, "weight_decay": 0.0}}
    config = zo_config(packed, tokens, tmp_path / "out", {"parameters": "scales"} | zo, **change)
    plain = PlainScales(config.model_copy(update={"model": str(decoded)}), packed, kind).run()
    if "chunks" in case:
        assert zo_run(config) == pytest.approx(plain.losses, rel=1e-6)
        return
    assert zo_run(config) == plain.losses
    export(config, tmp_path / "tuned")
    for shard in packed.glob("*.safetensors"):
        found, before = load_file(tmp_path / "tuned" / shard.name), load_file(shard)
        assert found.keys() == before.keys()
        for key, value in before.items():
            stem = key.replace(".SCB", ".weight.scales").replace(".weight_scale_inv", ".weight.scales")
            expected = plain.up_to_date(stem).view_as(value) if stem in plain.values else value
            assert found[key].view(torch.uint8).equal(expected.view(torch.uint8)), key
            assert stem not in plain.values or not expected.equal(value)
    assert min(float(plain.up_to_date(name).min()) for name in plain.values) == np.float32(1e-7)
