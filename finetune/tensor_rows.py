"""A data set of tensors: for models that read pictures or features instead of text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

SAMPLED_ROWS = 1024


class TensorRows:
    """A sequence of dicts of tensors, each one sample without its batch dimension; `labels` is the target."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows

    @staticmethod
    def fits(source: Any) -> bool:
        """Whether `source` is such a sequence: its first row holds a tensor or array that is not token ids."""
        if isinstance(source, (str, bytes)) or not hasattr(source, "__getitem__") or not len(source):
            return False
        row = source[0]
        return (
            isinstance(row, Mapping)
            and "input_ids" not in row
            and any(isinstance(value, (torch.Tensor, np.ndarray)) for value in row.values())
        )

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self._rows), np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def digest(self) -> str:
        """Of the samples and their order, 128 bits in hexadecimal. Of a list or tuple all of it; of a sequence that makes its
        rows when they are asked for, their number and 1024 of them, and no values where they are others each time."""
        indices: Sequence[int] = range(len(self._rows))
        in_memory = isinstance(self._rows, (list, tuple))
        if not in_memory:
            indices = indices[:: -(-len(indices) // SAMPLED_ROWS)]
        with_values = in_memory or _digest([self._rows[0]], True) == _digest([self._rows[0]], True)
        return _digest((self._rows[index] for index in indices), with_values, len(self._rows))

    def collate(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The samples stacked: each tensor [B, ...]."""
        rows = [self._rows[index] for index in indices]
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def _digest(rows: Iterable[Mapping[str, Any]], with_values: bool, count: int = 1) -> str:
    digest = hashlib.blake2b(str(count).encode(), digest_size=16)
    for row in rows:
        for key in sorted(row):
            value = torch.as_tensor(row[key]).cpu()
            digest.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\n".encode())
            if with_values:
                digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
