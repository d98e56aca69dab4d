"""Adafactor: second moments as rows times columns (Shazeer & Stern 2018, algorithm 4), of whole matrices.

For a gradient g of shape [..., n, m] at step t, with b = 1 - t^-0.8:
    row = b row + (1 - b) mean_j(g^2 + 1e-30)        column = b column + (1 - b) mean_i(g^2 + 1e-30)
    u = g / sqrt(row column / mean(row))              theta = (1 - lr wd) theta - lr u / max(1, rms(u))
Parameters of one dimension keep all of their second moments. This is `transformers.optimization.Adafactor` with
scale_parameter and relative_step off, as its Trainer uses it; sums are taken in chunks, so results agree to rounding.
The state of a matrix is n + m numbers: nothing of it is worth streaming, and an update moves weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from finetune.offload.update.matrices import TEMPORARY_BYTES, Elements, Rows, chunks, parts, scaled, sum_of_squares
from finetune.offload.update.rules.rule import Direction, DirectionRule

if TYPE_CHECKING:
    import torch

    from finetune.offload.update.units import UpdateUnit

DECAY = -0.8
EPSILON = 1e-30


@dataclass(frozen=True, kw_only=True)
class Adafactor(DirectionRule):
    def factor_bytes(self, unit: UpdateUnit) -> int:
        return sum(4 * (rows + columns + 1) for rows, columns in _sizes(unit).values())

    def temporary_bytes(self, unit: UpdateUnit) -> int:
        return TEMPORARY_BYTES

    def directions(
        self, unit: UpdateUnit, factors: torch.Tensor, gradients: Mapping[str, torch.Tensor], grad_scale: float, seed: int
    ) -> dict[str, Direction]:
        return {
            name: observe(gradients[name], grad_scale, of_parameter)
            for name, of_parameter in factor_views(unit, factors).items()
            if name in gradients
        }


class Factors(NamedTuple):
    """Of one parameter, fp32. Of one dimension, rows are [1, n] and columns [1, 0]."""

    rows: torch.Tensor  # [matrices, n]
    columns: torch.Tensor  # [matrices, m]
    count: torch.Tensor  # [1], of gradients


def factor_views(unit: UpdateUnit, factors: torch.Tensor) -> dict[str, Factors]:
    """factors: fp32 [factor_bytes / 4], of all parameters by local name."""
    start, views = 0, {}
    for name, (rows, columns) in _sizes(unit).items():
        matrices = prod(unit.layout.views[name].shape[:-2])
        middle = start + rows
        end = middle + columns
        views[name] = Factors(
            factors[start:middle].view(matrices, -1),
            factors[middle:end].view(matrices, columns // matrices),
            factors[end : end + 1],
        )
        start = end + 1
    return views


def _sizes(unit: UpdateUnit) -> dict[str, tuple[int, int]]:
    shapes = {name: unit.layout.views[name].shape for name in unit.fqns}
    return {
        name: (prod(shape[:-1]), prod(shape[:-2]) * shape[-1]) if len(shape) > 1 else (prod(shape), 0)
        for name, shape in shapes.items()
    }


def observe(gradient: torch.Tensor, gradient_scale: float, factors: Factors) -> Direction:
    """Takes a gradient, contiguous, fp32 or bf16, into its factors, in place."""
    factors.count.add_(1)
    weight = float(factors.count) ** DECAY
    of_one_dimension = not factors.columns.shape[1]
    return (_observe_elements if of_one_dimension else _observe_matrices)(gradient, gradient_scale, factors, weight)


def _observe_elements(gradient: torch.Tensor, gradient_scale: float, factors: Factors, weight: float) -> Elements:
    values = scaled(gradient.view(1, -1), gradient_scale)
    factors.rows.mul_(1 - weight).add_(values.square().add_(EPSILON), alpha=weight)
    values.mul_(factors.rows.rsqrt())
    return Elements(values.div_(_divisor(sum_of_squares(values.clone()), values.numel())).view(-1))


def _observe_matrices(gradient: torch.Tensor, gradient_scale: float, factors: Factors, weight: float) -> Rows:
    rows, columns, _ = factors
    (matrices, height), width = rows.shape, columns.shape[1]
    row_means, column_sums = rows.new_empty(rows.shape), columns.new_zeros(columns.shape).double()
    for matrix, values in enumerate(gradient.view(matrices, height, width)):
        for start, stop in chunks(height, width):
            squares = scaled(values[start:stop], gradient_scale).square_().add_(EPSILON)
            row_means[matrix, start:stop] = squares.mean(dim=-1)
            column_sums[matrix] += squares.sum(dim=0)
    rows.mul_(1 - weight).add_(row_means, alpha=weight)
    columns.mul_(1 - weight).add_(column_sums.div_(height).float(), alpha=weight)
    row_factors, column_factors = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().view(-1), columns.rsqrt()

    def undivided(start: int, stop: int) -> torch.Tensor:
        values = scaled(gradient.view(-1, width)[start:stop], gradient_scale)
        for matrix, _, here in parts(start, stop, height):
            values[here] *= column_factors[matrix]
        return values.mul_(row_factors[start:stop, None])

    squares = sum(sum_of_squares(undivided(start, stop)) for start, stop in chunks(matrices * height, width))
    divisor = _divisor(squares, gradient.numel())
    return Rows(lambda start, stop: undivided(start, stop).div_(divisor), width)


def _divisor(squares: float, count: int) -> float:
    """Steps whose root mean square is above 1 are made shorter."""
    return max(1.0, (squares / count) ** 0.5)
