"""What formats share whose numbers are multiplied by scales, one scale for a block of a matrix.

[Note: a grid of scales]
Scale [i, j] belongs to rows [i * height, (i + 1) * height) and columns [j * width, (j + 1) * width): one for the whole matrix,
one a row, one a group of columns of a row, one a block. The last ones of a row or column may have fewer numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowSpan(NamedTuple):
    """Rows [start, stop) of a whole matrix that are here."""

    start: int
    stop: int
    shift: int = 0
    """What is added to the index of a row of scales in the whole grid to have its index among those that are here."""


def cut_scales(ranges: Iterable[tuple[int, int]], height: int) -> tuple[tuple[RowSpan, ...], list[tuple[int, int]]]:
    """The spans of these rows of a whole matrix, and the rows of its scales that they need."""
    spans, scale_ranges, count = [], [], 0
    for start, stop in ranges:
        low, high = start // height, -(-stop // height)
        spans.append(RowSpan(start, stop, count - low))
        scale_ranges.append((low, high))
        count += high - low
    return tuple(spans), scale_ranges


def scales_of_rows(scales: Tensor, spans: Sequence[RowSpan], height: int) -> Tensor:
    """Of a grid [rows of scales, columns of scales]: of every row that is here its own, [rows, columns of scales]."""
    runs = [torch.arange(start, stop, device=scales.device) // height + shift for start, stop, shift in spans]
    return scales[torch.cat(runs)]


def are_first(spans: Sequence[RowSpan]) -> bool:
    """Whether the rows are the matrix's first ones, or all."""
    return len(spans) == 1 and spans[0].start == spans[0].shift == 0


def scales_here(scales: Tensor, spans: Sequence[RowSpan], height: int) -> tuple[Tensor, int]:
    """A grid of the rows that are here, and how many of them have one of its rows."""
    return (scales, height) if are_first(spans) else (scales_of_rows(scales, spans, height), 1)


def scale_columns(
    numbers: Tensor, scales: Tensor, width: int, apply: Callable[[Tensor, Tensor], Tensor] = Tensor.mul_
) -> Tensor:
    """numbers [rows, columns], which are changed and returned, times scales [rows, columns of scales]. apply: something else
    than a product, in place."""
    full = numbers.shape[1] // width
    apply(numbers[:, : full * width].unflatten(1, (full, width)), scales[:, :full, None])
    apply(numbers[:, full * width :], scales[:, full:])
    return numbers
