"""Products under low-rank noise: their precision, what pending groups keep in memory, and what a plan counts for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from extents import plain_weights
from test_resume import models  # noqa: F401  fixture
from torch import nn

from finetune import Config
from finetune.config import ConfigError
from finetune.memory.errors import UserError
from finetune.methods.perturbation_needs import FACTORS, perturbed_sizes
from finetune.methods.zeroth_order_options import ZerothOrderOptions
from finetune.offload.noise import noise
from finetune.offload.perturb.products import Factors, MatrixNoise, perturbed_product
from finetune.offload.sizing.needs import HEAD_VARIANTS, VARIANTS
from finetune.offload.weights.binding import Binding
from finetune.offload.weights.parts import cut

KIND = noise.Noise("low_rank", 3)
ROWS, COLUMNS = 70, 48


def moved(group_steps: list[noise.Group], target: noise.Target | None = None) -> torch.Tensor:
    """The matrix 0 after these groups, and with the target's noise, by the pass over weights: fp32 [ROWS, COLUMNS]."""
    result = torch.zeros(ROWS, COLUMNS)
    target = noise.Target(result) if target is None else target._replace(tensor=result)
    noise.move(KIND, noise.Parameter(5, COLUMNS), torch.zeros(ROWS, COLUMNS), group_steps, [target])
    return result


def some_groups() -> tuple[noise.Group, ...]:
    updates = tuple(noise.Update(seed, 0.25 * (seed - 11)) for seed in range(10, 15))
    return (
        noise.Group(0.75, updates[:2], shared_seed=101),
        noise.Group(0.5, updates[2:], shared_seed=102),
        noise.Group(1.0, (), shared_seed=103),
    )


def test_factors_are_the_matrix_that_the_pass_over_weights_makes():
    groups = some_groups()
    matrix = MatrixNoise(KIND, 5, (ROWS, COLUMNS), torch.float32, torch.device("cpu"), len(groups))
    scale, down, up = matrix.factors(groups, 7, -0.5, 103)
    assert scale == 0.375
    expected = moved(list(groups), noise.Target(torch.empty(0), 7, -0.5, 103))
    torch.testing.assert_close(up @ down, expected, rtol=1e-5, atol=1e-6)
    part = MatrixNoise(KIND, 5, (9, COLUMNS), torch.float32, torch.device("cpu"), len(groups), first_row=33)
    _, down, up = part.factors(groups, 7, -0.5, 103)
    torch.testing.assert_close(up @ down, expected[33:42], rtol=1e-5, atol=1e-6)


def test_updates_that_come_one_by_one_make_the_same_bits():
    """What is kept between steps is what a process that has just begun makes of the journal."""
    groups = some_groups()
    grown = MatrixNoise(KIND, 5, (ROWS, COLUMNS), torch.float32, torch.device("cpu"), len(groups))
    for count in range(1, len(groups) + 1):
        for updates in range(len(groups[count - 1].updates) + 1):
            last = groups[count - 1]
            pending = (*groups[: count - 1], last._replace(updates=last.updates[:updates]))
            found = grown.factors(pending, 7, 0.5, 102)
            grown.forget()
            fresh = MatrixNoise(KIND, 5, (ROWS, COLUMNS), torch.float32, torch.device("cpu"), len(groups))
            expected = fresh.factors(pending, 7, 0.5, 102)
            assert found.scale == expected.scale and found.up.equal(expected.up) and found.down.equal(expected.down)
    # After a fold, groups stand where others stood.
    found = grown.factors(groups[1:], 8, 0.5, 103)
    fresh = MatrixNoise(KIND, 5, (ROWS, COLUMNS), torch.float32, torch.device("cpu"), len(groups))
    assert found.up.equal(fresh.factors(groups[1:], 8, 0.5, 103).up)


def test_products_keep_small_noise_that_weights_in_bf16_lose():
    """An epsilon below the last bit of the weights vanishes where it is rounded into them, and is whole in a product."""
    torch.manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS).bfloat16()
    x = torch.randn(5, COLUMNS).bfloat16()
    epsilon = 1e-5
    z = moved([], noise.Target(torch.empty(0), 7, 1.0, 9))
    in_weights = torch.empty_like(weight)
    noise.move(KIND, noise.Parameter(5, COLUMNS), weight, (), [noise.Target(in_weights, 7, epsilon, 9)])
    kept = (in_weights.float() - weight.float()).norm() / (epsilon * z.norm())
    factors = MatrixNoise(KIND, 5, (ROWS, COLUMNS), torch.bfloat16, torch.device("cpu"), 1).factors((), 7, epsilon, 9)
    added = perturbed_product(x, torch.zeros_like(weight), factors, None).double()
    expected = epsilon * (x.double() @ z.double().t())
    assert (added - expected).norm() < 0.01 * expected.norm()  # three roundings to 8 bits
    assert not 0.5 < kept < 1.5


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_scale_bias_and_stored_dtype(stored, scale):
    torch.manual_seed(2)
    weight, bias, x = torch.randn(ROWS, COLUMNS).to(stored), torch.randn(ROWS), torch.randn(2, 3, COLUMNS)
    expected = scale * (x @ weight.float().t()) + bias
    torch.testing.assert_close(perturbed_product(x, weight, Factors(scale, None, None), bias), expected)
    down, up = torch.randn(4, COLUMNS), torch.randn(ROWS, 4)
    expected = x @ (scale * weight.float() + up @ down).t() + bias
    torch.testing.assert_close(
        perturbed_product(x, weight, Factors(scale, down, up), bias), expected, rtol=1e-4, atol=1e-4
    )


def test_slots_need_no_room_for_matrices(models):  # noqa: F811
    parts = cut(Path(models["bfloat16"]))
    options = {"noise": "low_rank", "rank": 3, "fold_steps": 5}
    products = perturbed_sizes(parts, ZerothOrderOptions(**options, perturb="products"), 8).needs
    weights = perturbed_sizes(parts, ZerothOrderOptions(**options), 8).needs
    layout, binding = parts.layouts[0], parts.bindings[0]
    matrices = {name: layout.views[name].shape for name in binding.linear_weights}
    assert len(matrices) == 7  # of a Llama's block
    small = [view for name, view in layout.views.items() if name not in matrices]
    slots, large = ({pool.name: pool.slot_bytes for pool in needs.pools} for needs in (products, weights))
    assert slots[VARIANTS] == 4096 and 2 * 64 * len(small) <= 4096 < large[VARIANTS]
    assert slots[HEAD_VARIANTS] == 0 < large[HEAD_VARIANTS]
    # two groups of 8 steps: their sums, fp32 [rows, 3] each
    rows = sum(shape[0] for shape in matrices.values()) * len(parts.layouts) + parts.head.module.weight.shape[0]
    assert products.bytes_of(FACTORS) == rows * 3 * 4 * 2 and not weights.bytes_of(FACTORS)


def test_no_rows_and_a_weight_that_is_not_there():
    weight = torch.randn(ROWS, COLUMNS)
    assert perturbed_product(torch.empty(0, COLUMNS), weight, Factors(1.0, None, None), None).shape == (0, ROWS)
    module = nn.Module()
    module.inner = nn.Linear(3, 4)
    binding = Binding(module, {"inner.weight": torch.float32}, plain_weights({"inner.weight": module.inner.weight}))
    binding.multiply_by({"inner.weight": lambda x: x})
    assert (module.inner.weight.shape, module.inner.weight.dtype) == ((4, 3), torch.float32)
    with pytest.raises(UserError, match="use zo.perturb weights"):
        module.inner.weight @ torch.ones(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "noise low_rank and parameters all with perturb products, found rademacher and all"),
        ({"noise": "low_rank", "parameters": "lora"}, "found low_rank and lora"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        Config(model="m", data="d", output="o", method="zo", zo={"perturb": "products"} | options)
