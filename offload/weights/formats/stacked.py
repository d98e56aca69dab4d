"""Weights that are put together from others of any format: a matrix from rows of several, and experts from a matrix each.

Transformers keeps the experts of a block in stacked parameters [experts, rows, columns], published checkpoints have them as
linear layers of their own, each packed by itself. Every part is decoded as its own format does it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.weights.formats.base import Stored, StoredWeight, stored_name
from finetune.offload.weights.formats.plain import PlainTensor


@dataclass(frozen=True, slots=True)
class _Assembled(StoredWeight):
    """Weights along the first dimension. Part i of these is called "i" in the names of stored tensors."""

    parts: tuple[StoredWeight, ...]
    shape: tuple[int, ...]

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        """None: `finetune.offload.weights.assembly` puts them together."""
        return {}

    @property
    def word(self) -> str:
        return " and ".join(sorted({word for part in self.parts for word in part.word.split(" and ")}))

    @property
    def note(self) -> str:
        return next((part.note for part in self.parts if part.note), "")

    @property
    def needs_host(self) -> bool:
        return any(part.needs_host for part in self.parts)

    @property
    def tensors(self) -> dict[str, PlainTensor]:
        return {
            stored_name(str(index), name): tensor
            for index, part in enumerate(self.parts)
            for name, tensor in part.tensors.items()
        }

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def moved(self, move: Callable[[PlainTensor], PlainTensor]) -> StoredWeight:
        return replace(self, parts=tuple(part.moved(move) for part in self.parts))

    def decode_into(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        for (part, own), target in zip(self._stored_parts(stored), self._targets(numbers), strict=True):
            part.decode_into(own, target)

    def _stored_parts(self, stored: dict[str, Tensor]) -> Iterator[tuple[StoredWeight, Stored]]:
        for index, part in enumerate(self.parts):
            yield part, part.take(stored, str(index))

    @abstractmethod
    def _targets(self, numbers: Tensor) -> Iterable[Tensor]:
        """Where the numbers of each part go."""


@dataclass(frozen=True, slots=True)
class JoinedRows(_Assembled):
    """A matrix [rows, columns]: the rows of its parts, one part below the other."""

    def rows(self, ranges: Iterable[tuple[int, int]]) -> JoinedRows:
        found = []
        for start, stop in ranges:
            first = 0
            for part in self.parts:
                low, high = max(start - first, 0), min(stop - first, part.shape[0])
                if low < high:
                    found.append(part if high - low == part.shape[0] else part.rows([(low, high)]))
                first += part.shape[0]
        return JoinedRows(tuple(found), (sum(part.shape[0] for part in found), self.shape[1]))

    def row_bytes(self, count: int) -> int:
        return count * max(part.row_bytes(1) for part in self.parts)

    def _targets(self, numbers: Tensor) -> Iterable[Tensor]:
        return numbers.split([part.shape[0] for part in self.parts])


@dataclass(frozen=True, slots=True)
class StackedWeights(_Assembled):
    """Experts [experts, rows, columns]: part i is the matrix of one."""

    def rows(self, ranges: Iterable[tuple[int, int]]) -> StackedWeights:
        """The matrices of some experts. Cheap: nothing of the others is looked at."""
        parts = tuple(part for start, stop in ranges for part in self.parts[start:stop])
        return StackedWeights(parts, (len(parts), *self.shape[1:]))

    def row_bytes(self, count: int) -> int:
        return count * max(part.num_bytes for part in self.parts)

    def _targets(self, numbers: Tensor) -> Iterable[Tensor]:
        return numbers
