"""Adafactor: second moments as rows times columns (Shazeer & Stern 2018, algorithm 4), of whole matrices.

For a gradient g of shape [..., n, m] at step t, with b = 1 - t^-0.8:
    row = b row + (1 - b) mean_j(g^2 + 1e-30)        column = b column + (1 - b) mean_i(g^2 + 1e-30)
    u = g / sqrt(row column / mean(row))              theta = (1 - lr wd) theta - lr u / max(1, rms(u))
Parameters of one dimension keep all of their second moments. This is `transformers.optimization.Adafactor` with
scale_parameter and relative_step off, as its Trainer uses it; sums are taken in chunks, so results agree to rounding.
The state of a matrix is n + m numbers: nothing of it is worth streaming, and an update moves weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from memory.units import round_up
from offload.update.rules import Rule
from offload.update.units import UpdateUnit

DECAY = -0.8
EPSILON = 1e-30
CHUNK_ELEMENTS = 1 << 20  # of a gradient in fp32 at a time
TEMPORARY_BYTES = 6 * 4 * CHUNK_ELEMENTS
"""What `observe` and `Direction.of` allocate at most for matrices whose rows are shorter than a chunk; pieces are too."""


def factor_bytes(unit: UpdateUnit, rule: Rule) -> int:
    """Of the factors of all its trained parameters."""
    return round_up(sum(4 * (rows + columns + 1) for rows, columns in _sizes(unit).values()))


def temporary_bytes(unit: UpdateUnit, rule: Rule) -> int:
    """What the directions of a unit allocate while they are made and used."""
    return TEMPORARY_BYTES


def factor_views(unit: UpdateUnit, memory: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """memory: uint8 [factor_bytes]. Local name -> (rows fp32 [matrices, n], columns fp32 [matrices, m], count of gradients fp32
    [1]); of one dimension rows are [1, n] and columns [1, 0]."""
    values, start, views = memory.view(torch.float32), 0, {}
    for name, (rows, columns) in _sizes(unit).items():
        matrices = prod(unit.layout.views[name].shape[:-2])
        middle = start + rows
        end = middle + columns
        views[name] = (
            values[start:middle].view(matrices, -1),
            values[middle:end].view(matrices, columns // matrices),
            values[end : end + 1],
        )
        start = end + 1
    return views


def _sizes(unit: UpdateUnit) -> dict[str, tuple[int, int]]:
    shapes = {name: unit.layout.views[name].shape for name in unit.fqns}
    return {
        name: (prod(shape[:-1]), prod(shape[:-2]) * shape[-1]) if len(shape) > 1 else (prod(shape), 0)
        for name, shape in shapes.items()
    }


def directions(
    unit: UpdateUnit, rule: Rule, memory: torch.Tensor, gradients: Mapping[str, torch.Tensor], grad_scale: float, seed: int
) -> dict[str, Direction]:
    """Takes gradients into the factors in `memory` and says where each moves its parameter."""
    return {
        name: observe(gradients[name], grad_scale, *factors)
        for name, factors in factor_views(unit, memory).items()
        if name in gradients
    }


@dataclass(frozen=True, slots=True)
class Direction:
    """What a step moves a parameter along, made from its gradient a run of elements at a time."""

    gradient: torch.Tensor
    gradient_scale: float
    rows: torch.Tensor  # fp32 [matrices * n]: 1 / sqrt(row / mean(row)); of one dimension 1 / sqrt(row)
    columns: torch.Tensor  # fp32 [matrices, m]: 1 / sqrt(column)
    divisor: float

    def of(self, first: int, count: int) -> torch.Tensor:
        """fp32 [count], from element `first` on."""
        if not self.columns.numel():
            part = slice(first, first + count)
            return (scaled(self.gradient.view(-1)[part], self.gradient_scale) * self.rows[part]).div_(self.divisor)
        return from_rows(self._rows, first, count, self.columns.shape[1]).div_(self.divisor)

    def rms(self) -> float:
        """Of all elements, before the division."""
        total = 0.0
        if self.columns.numel():
            for start, stop in chunks(len(self.rows), self.columns.shape[1]):
                total += float(self._rows(start, stop).square_().sum(dtype=torch.float64))
        else:
            values = scaled(self.gradient.view(-1), self.gradient_scale) * self.rows
            total = float(values.square_().sum(dtype=torch.float64))
        return (total / self.gradient.numel()) ** 0.5

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """fp32 [rows, m] of whole rows, of all matrices one after the other."""
        matrices, width = self.columns.shape
        values = scaled(self.gradient.view(-1, width)[start:stop], self.gradient_scale)
        height = len(self.rows) // matrices
        for matrix in range(start // height, -(-stop // height)):
            low, high = max(start, matrix * height), min(stop, (matrix + 1) * height)
            values[low - start : high - start] *= self.columns[matrix]
        return values.mul_(self.rows[start:stop, None])


def observe(
    gradient: torch.Tensor, gradient_scale: float, rows: torch.Tensor, columns: torch.Tensor, count: torch.Tensor
) -> Direction:
    """Takes a gradient, contiguous, fp32 or bf16, into the factors of `factor_views`, in place."""
    count += 1
    weight = float(count) ** DECAY
    matrices, width = columns.shape
    if not width:
        squares = scaled(gradient.view(1, -1), gradient_scale).square_().add_(EPSILON)
        rows.mul_(1 - weight).add_(squares, alpha=weight)
        direction = Direction(gradient, gradient_scale, rows.rsqrt().view(-1), columns.clone(), 1.0)
    else:
        height = rows.shape[1]
        row_means, column_sums = torch.empty_like(rows), torch.zeros(matrices, width, dtype=torch.float64)
        for matrix, values in enumerate(gradient.view(matrices, height, width)):
            for start, stop in chunks(height, width):
                squares = scaled(values[start:stop], gradient_scale).square_().add_(EPSILON)
                row_means[matrix, start:stop] = squares.mean(dim=-1)
                column_sums[matrix] += squares.sum(dim=0)
        rows.mul_(1 - weight).add_(row_means, alpha=weight)
        columns.mul_(1 - weight).add_(column_sums.div_(height).float(), alpha=weight)
        row_factors = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().view(-1)
        direction = Direction(gradient, gradient_scale, row_factors, columns.rsqrt(), 1.0)
    return replace(direction, divisor=max(1.0, direction.rms()))


def scaled(gradient: torch.Tensor, scale: float) -> torch.Tensor:
    """A copy in fp32 of the gradient times `scale`, rounded to its dtype: what clipping leaves in `.grad`."""
    return (gradient if scale == 1 else gradient * scale).to(torch.float32, copy=True)


def from_rows(rows: Callable[[int, int], torch.Tensor], first: int, count: int, width: int) -> torch.Tensor:
    """[count] elements from `first` on, where rows(start, stop) makes whole rows [stop - start, width]."""
    start, stop = first // width, -(-(first + count) // width)
    return rows(start, stop).view(-1)[first - start * width :][:count]


def chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of rows, CHUNK_ELEMENTS at a time."""
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
