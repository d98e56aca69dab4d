"""Whole matrices, a run of elements or rows at a time: what rules with directions share. Imports no torch before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 20  # of a gradient in fp32 at a time
TEMPORARY_BYTES = 6 * 4 * CHUNK_ELEMENTS
"""What looking at a matrix in `chunks` and making a piece's part of a direction allocate, if rows are shorter than a chunk."""


@dataclass(frozen=True, slots=True)
class Elements:
    """A direction that is there as a whole: fp32 [elements]."""

    values: torch.Tensor  # of all elements

    def of(self, first: int, count: int) -> torch.Tensor:
        return self.values[first : first + count]


@dataclass(frozen=True, slots=True)
class Rows:
    """A direction that is made a few rows at a time: make(start, stop) gives fp32 [stop - start, width]."""

    make: Callable[[int, int], torch.Tensor]
    width: int

    def of(self, first: int, count: int) -> torch.Tensor:
        """fp32 [count], from element `first` on."""
        start, stop = first // self.width, -(-(first + count) // self.width)
        return self.make(start, stop).view(-1)[first - start * self.width :][:count]


def scaled(gradient: torch.Tensor, scale: float) -> torch.Tensor:
    """A copy in fp32 of the gradient times `scale`, rounded to its dtype: what clipping leaves in `.grad`."""
    import torch

    return (gradient if scale == 1 else gradient * scale).to(torch.float32, copy=True)


def sum_of_squares(values: torch.Tensor) -> float:
    """Of fp32 values, added in fp64. The values are used up."""
    import torch

    return float(values.square_().sum(dtype=torch.float64))


def chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of rows, CHUNK_ELEMENTS at a time."""
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def parts(start: int, stop: int, height: int) -> Iterator[tuple[int, slice, slice]]:
    """Rows [start, stop) of a stack of matrices of `height` rows: (matrix, its rows, where these are among the given)."""
    for matrix in range(start // height, -(-stop // height)):
        top = matrix * height
        low, high = max(start, top), min(stop, top + height)
        yield matrix, slice(low - top, high - top), slice(low - start, high - start)
