"""Products with a weight that is made a strip at a time, so that it never exists whole.

Strips cut the result's columns, never the sum over the inner dimension, so every element is the same dot product as in one
large product: the same bits (held by tests), and the strip is still in cache when it is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STRIP = 768  # columns of the result per converted strip: some MiB, less than a level 3 cache


def strips(size: int) -> list[slice]:
    """How a weight with so many rows is cut where it is converted at each use: nearly equally, in whole vectors; sizes that are
    not go in one piece, for a ragged last strip of few rows is multiplied by another kernel, with other rounding."""
    if size % 64:
        return [slice(0, size)]
    count = -(-size // STRIP)
    step = -(-size // (64 * count)) * 64
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def multiply(x: Tensor, num_rows: int, rows: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """x [n, columns] times the weight [num_rows, columns] transposed, plus bias [num_rows]: [n, num_rows].

    rows: gives rows of the weight, in the dtype of `x`.
    """
    y = x.new_empty(x.shape[0], num_rows)
    for strip in strips(num_rows):
        weight = rows(strip).t()
        if bias is None:
            torch.mm(x, weight, out=y[:, strip])
        else:
            torch.addmm(bias[strip], x, weight, out=y[:, strip])
    return y


def multiply_back(grad: Tensor, num_columns: int, columns: Callable[[slice], Tensor]) -> Tensor:
    """grad [n, rows] times the weight [rows, num_columns]: [n, num_columns].

    columns: gives columns of the weight, in the dtype of `grad`.
    """
    dx = grad.new_empty(grad.shape[0], num_columns)
    for strip in strips(num_columns):
        torch.mm(grad, columns(strip), out=dx[:, strip])
    return dx
