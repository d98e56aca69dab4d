"""A data set of tensors: for models that read pictures or features instead of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


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

    def collate(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The samples stacked: each tensor [B, ...]."""
        rows = [self._rows[index] for index in indices]
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
