"""The plain format: one tensor of a dtype, as PyTorch and safetensors have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.offload.files.checkpoint import DTYPE_BITS, CheckpointError, TensorEntry
from finetune.offload.weights.formats import native_kernels
from finetune.offload.weights.formats.base import StoredWeight, kernels_for

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_WIDENED_NATIVELY = 1 << 20
"""Elements from which on our kernel is faster than PyTorch's `to`: fp32 is written past the caches."""


class Extent(NamedTuple):
    """`num_bytes` bytes at `file_offset` of `path` go to byte `target_offset` of the tensor (contiguous, row-major)."""

    path: Path
    file_offset: int
    num_bytes: int
    target_offset: int


@dataclass(frozen=True, slots=True)
class PlainTensor(StoredWeight):
    """A weight in the plain format, and what weights of other formats are stored in."""

    dtype: torch.dtype
    """The checkpoint's; the module's may differ."""
    shape: tuple[int, ...]
    """The module's."""
    extents: tuple[Extent, ...]
    """In the order of the tensor's row-major bytes, which they cover without holes or overlap."""

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        """Everything that is left."""
        return {name: {"": entry} for name, entry in entries.items()}

    @classmethod
    def of(cls, entry: TensorEntry) -> PlainTensor:
        """The whole of a checkpoint tensor. Raises CheckpointError for a dtype that PyTorch has not."""
        dtype = torch_dtype(entry.dtype, f"{entry.path}: tensor '{entry.name}'")
        return cls(dtype, entry.shape, (Extent(entry.path, entry.offset, entry.num_bytes, 0),))

    @property
    def word(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def tensors(self) -> dict[str, PlainTensor]:
        return {"": self}

    @property
    def num_bytes(self) -> int:
        return dense_bytes(self.shape, self.dtype)

    @property
    def can_be_updated(self) -> bool:
        return self.dtype in (torch.float32, torch.bfloat16, torch.float16)

    def moved(self, move: Callable[[PlainTensor], PlainTensor]) -> PlainTensor:
        return move(self)

    def rows(self, ranges: Iterable[tuple[int, int]]) -> PlainTensor:
        """Of a tensor of any dimension, along its first."""
        row_bytes = dense_bytes(self.shape[1:], self.dtype)
        extents: list[Extent] = []
        count = 0
        for start, stop in ranges:
            shift = (count - start) * row_bytes
            found = self.cut(start * row_bytes, stop * row_bytes)
            extents += [extent._replace(target_offset=extent.target_offset + shift) for extent in found]
            count += stop - start
        return PlainTensor(self.dtype, (count, *self.shape[1:]), tuple(extents))

    def cut(self, start: int, stop: int) -> Iterator[Extent]:
        """The extents of bytes [start, stop) of the tensor, at their target offsets in the whole."""
        for extent in self.extents:
            low, high = max(start, extent.target_offset), min(stop, extent.target_offset + extent.num_bytes)
            if low < high:
                yield Extent(extent.path, extent.file_offset + low - extent.target_offset, high - low, low)

    def load(self, read: Callable[[PlainTensor], Tensor]) -> Tensor:
        return read(self)

    def take(self, views: Mapping[str, Tensor], name: str) -> Tensor:
        return views[name]

    def is_stored_as(self, dtype: torch.dtype) -> bool:
        return self.dtype == dtype

    def decode(self, stored: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """`stored` itself where it has that dtype. It need not have this tensor's: folded weights are wider than the
        checkpoint's."""
        if stored.dtype == dtype:
            return stored
        if out is None:
            out = torch.empty(stored.shape, dtype=dtype, device=stored.device)
        self.decode_into(stored, out)
        return out

    def decode_into(self, stored: Tensor, numbers: Tensor) -> None:
        if stored.numel() >= _WIDENED_NATIVELY and kernels_for(stored) == "native" and stored.is_contiguous():
            if numbers.dtype == torch.float32 and stored.dtype in (torch.bfloat16, torch.float16):
                native_kernels.decode(native_kernels.Codes(str(stored.dtype).removeprefix("torch."), stored), None, numbers)
                return
        numbers.copy_(stored)


def torch_dtype(dtype: str, subject: str) -> torch.dtype:
    """Of a dtype of safetensors. subject: what has it, for the message. Raises CheckpointError where PyTorch has none."""
    if dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{subject} has dtype {dtype} ({DTYPE_BITS[dtype]} bits), which can't be fine-tuned: use the original weights"
        )
    return TORCH_DTYPES[dtype]


def dense_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of a tensor of that shape and dtype, in memory or in a file."""
    return prod(shape) * dtype.itemsize

