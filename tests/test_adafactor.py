"""Adafactor's factors and directions, a run of elements at a time, against Transformers' own on whole matrices."""

from __future__ import annotations

import pytest
import torch
from transformers.optimization import Adafactor

import finetune.offload.update.matrices
from finetune.memory.units import round_up
from finetune.offload.update.rules.adafactor import Adafactor as Rule
from finetune.offload.update.rules.adafactor import factor_views, observe
from finetune.offload.update.units import make_unit
from finetune.offload.weights.layout import BlockLayout, View

SHAPES = [(37,), (1, 50), (50, 1), (23, 41), (3, 17, 11)]


def unit_of(shapes):
    views, start = {}, 0
    for index, shape in enumerate(shapes):
        views[f"p{index}"] = View(start, torch.float32, shape)
        start += round_up(4 * torch.Size(shape).numel(), 64)
    return make_unit("unit", BlockLayout(round_up(start), (), views), {name: name for name in views})


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_directions_are_those_of_transformers(scale, dtype, chunk, monkeypatch):
    monkeypatch.setattr(finetune.offload.update.matrices, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(3)
    unit = unit_of(SHAPES)
    factors = factor_views(unit, torch.zeros(Rule().factor_bytes(unit) // 4))
    assert sum(r.numel() + c.numel() for r, c, _ in factors.values()) == 37 + 51 + 51 + 64 + 3 * 28
    for name, shape in zip(unit.fqns, SHAPES, strict=True):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        optimizer = Adafactor([parameter], lr=1.0, scale_parameter=False, relative_step=False)
        for step in range(1, 6):
            gradient = (torch.randn(shape) * 10 ** torch.randn(shape)).to(dtype)
            before = parameter.detach().clone()
            parameter.grad = (gradient * scale if scale != 1 else gradient).float()
            optimizer.step()
            expected = (before - parameter.detach()).view(-1)
            direction = observe(gradient, scale, factors[name])
            assert factors[name][2].item() == step
            cuts = [0, *sorted(torch.randint(0, gradient.numel() + 1, (3,)).tolist()), gradient.numel()]
            found = torch.cat([direction.of(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)])
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6 * float(expected.abs().max()))


def test_a_gradient_of_zeros_moves_nothing():
    unit = unit_of([(4, 6)])
    factors = factor_views(unit, torch.zeros(Rule().factor_bytes(unit) // 4))["p0"]
    direction = observe(torch.zeros(4, 6), 1.0, factors)
    assert direction.of(3, 9).equal(torch.zeros(9))
