"""What a weight format is: how the numbers of a weight lie in the user's files, and how they are computed with.

A weight of the model is stored as one or more *stored tensors* (`PlainTensor`: dtype, shape, extents). What moves bytes
(layouts, reads, slots) knows stored tensors only. What computes (a binding, a table of embeddings, the head) asks the weight.

[Note: a new format]
A format is a class: a frozen dataclass whose fields of type `PlainTensor` are the stored tensors of one weight (packed numbers,
scales, zero points) and whose other fields say how to read them. `find` recognises the format, `rows` cuts a matrix,
`decode_into` makes its numbers. Everything else has a default here. One line in `FORMATS` makes it known.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from finetune.memory.device_kinds import DEVICE_KINDS
from finetune.offload.files.checkpoint import TensorEntry

if TYPE_CHECKING:
    from finetune.offload.weights.formats.plain import PlainTensor

Stored = Tensor | dict[str, Tensor]
"""Bytes of a weight in memory: its stored tensors by name; of a plain one, the tensor."""


def stored_name(name: str, part: str) -> str:
    """The name of a weight's stored tensor in a layout: `q_proj.weight` is stored as `q_proj.weight.scale` and others."""
    return f"{name}.{part}" if part else name


def kernels_for(tensor: Tensor) -> str | None:
    """What kernels the tensor's device runs, as in `finetune.memory.device_kinds`; None on meta, and where Triton is not
    installed."""
    traits = DEVICE_KINDS.get(tensor.device.type)
    if traits is None or traits.kernels == "triton" and not _has_triton():
        return None
    return traits.kernels


@cache  # it is asked for at every product, and looks through folders
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


ROWS_AT_ONCE = 128


def pieces(first: int, end: int, device: torch.device) -> Iterator[slice]:
    """Rows [first, end) in parts that are decoded one after the other, so that what stands between stored numbers and decoded
    ones stays small. On meta only the first part, which takes as much as any."""
    for start in range(first, end, ROWS_AT_ONCE):
        yield slice(start, min(start + ROWS_AT_ONCE, end))
        if device.type == "meta":
            return


class StoredWeight(ABC):
    """One weight (or persistent buffer) of the model as its files have it. Equal ones are the same bytes."""

    __slots__ = ()

    word: ClassVar[str]
    """The format, in messages: "stored as ..."."""
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)
    """The modules whose weights it stores as they are, neither transposed nor put together."""
    note: ClassVar[str] = ""
    """What the user of such a model should know of its numbers."""
    needs_host: ClassVar[bool] = False
    """Whether only a CPU decodes it."""
    shape: tuple[int, ...]
    """Of the numbers: the module's. A field or a property."""

    @classmethod
    @abstractmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        """The weights of a checkpoint that are in this format: the name that the weight would have if it were plain -> field of
        this class -> the tensor that is stored for it.

        entries: tensors that no format before has found, by name. quantization: `quantization_config` of config.json.
        """

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> StoredWeight:
        """The weight of these parts, as `find` named them. shape: what the model expects, for formats that do not store it.

        Raises CheckpointError for parts that do not fit each other.
        """
        from finetune.offload.weights.formats.plain import PlainTensor

        return cls(**{name: PlainTensor.of(entry) for name, entry in parts.items()})

    @classmethod
    def matrix_shape(cls, parts: Mapping[str, TensorEntry]) -> tuple[int, int] | None:
        """[rows, columns] of the matrix of these parts, as they have it without the model: it is put together with others to a
        parameter. `make` proves it. None: they do not tell.

        Raises CheckpointError for parts that cannot be those of a matrix.
        """
        return None

    @classmethod
    def dense_dtype(cls, quantization: Mapping[str, Any] | None) -> str | None:
        """Which dtype most bytes of the weights had before they were packed, as safetensors has it, if the files say so."""
        return None

    @property
    def tensors(self) -> dict[str, PlainTensor]:
        """The stored tensors by field; a plain weight's only one is "". """
        from finetune.offload.weights.formats.plain import PlainTensor

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, PlainTensor)}

    @property
    def num_bytes(self) -> int:
        """Of all stored tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def can_be_updated(self) -> bool:
        """Whether kernels can change the numbers where they are stored, by an optimizer's step or by noise."""
        return False

    @property
    def scale_parts(self) -> tuple[str, ...]:
        """Fields of the stored tensors that are the numbers' scales, where these are positive, in fp32, and one for some of the
        numbers each: they can be tuned while the rest stays (`finetune.offload.perturb.scales`)."""
        return ()

    def moved(self, move: Callable[[PlainTensor], PlainTensor]) -> StoredWeight:
        """The same numbers with every stored tensor where `move` says."""
        return replace(self, **{name: move(tensor) for name, tensor in self.tensors.items()})

    @abstractmethod
    def rows(self, ranges: Iterable[tuple[int, int]]) -> Self:
        """Of a matrix, the rows [start, stop) of all ranges, one after the other: those bytes and no others."""

    @property
    def has_rows(self) -> bool:
        """Whether `rows` gives some of it."""
        return len(self.shape) > 1

    def row_bytes(self, count: int) -> int:
        """Of so many rows by `rows`, at most, wherever they are."""
        return count * (self.num_bytes // self.shape[0])

    def load(self, read: Callable[[PlainTensor], Tensor]) -> Stored:
        """What `read` makes of every stored tensor."""
        return {name: read(tensor) for name, tensor in self.tensors.items()}

    def take(self, views: Mapping[str, Tensor], name: str) -> Stored:
        """This weight's stored tensors out of a slot's. name: what the weight is called in the slot's layout."""
        return {part: views[stored_name(name, part)] for part in self.tensors}

    def is_stored_as(self, dtype: torch.dtype) -> bool:
        """Whether the stored bytes are the numbers in `dtype`, and need no decoding."""
        return False

    def decode(self, stored: Stored, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The numbers, dense: [*shape] in `dtype`, on the device of `stored`; also on meta. out: such a tensor, contiguous,
        that is filled unless `stored` is already them; None: a new one."""
        if out is None:
            device = next(iter(stored.values())).device
            out = torch.empty(self.shape, dtype=dtype, device=device)
        self.decode_into(stored, out)
        return out

    @abstractmethod
    def decode_into(self, stored: Stored, numbers: Tensor) -> None:
        """Fills `numbers`, dense and contiguous [*shape], on the device of `stored`; also on meta."""
