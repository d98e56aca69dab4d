"""Weights as a GGUF file has them: rows in blocks, or plain numbers, and what llama.cpp's converter did to them.

[Note: what llama.cpp changes]
Of Llama and Mistral it takes the rows of the query and key projections in another order: in each head the rows 0, d/2, 1,
d/2 + 1, ... of d. Of Gemma it stores norms as w + 1. Both are undone when a weight is decoded, as Transformers does when it
loads the file: blocks lie along rows, so the rows of packed bytes are put back in order before they are decoded.

Source: `convert_hf_to_gguf.py` of llama.cpp; `TensorProcessor` in Transformers' `modeling_gguf_pytorch_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from finetune.offload.files.checkpoint import TensorEntry, is_gguf
from finetune.offload.files.gguf_file import BLOCKS
from finetune.offload.weights.formats import native_kernels
from finetune.offload.weights.formats.base import StoredWeight, kernels_for, pieces
from finetune.offload.weights.formats.gguf_blocks import DECODERS
from finetune.offload.weights.formats.plain import TORCH_DTYPES, Extent, PlainTensor
from finetune.offload.weights.formats.stored_parts import check

METHOD = "gguf"
"""`quant_method` of the configuration that is made of a GGUF file's metadata."""


@dataclass(frozen=True, slots=True)
class GgufTensor(StoredWeight):
    """A tensor of a GGUF file, or rows of one."""

    word = "GGUF"
    note = (
        "the weights are those of a GGUF file, rounded to the dtype that is computed in: bfloat16 where they are packed "
        "(engine.dtype: float32 keeps every bit of them)"
    )

    stored: PlainTensor
    """uint8 [rows, bytes] where it is packed, otherwise the numbers."""
    shape: tuple[int, ...]
    block_type: str
    """ggml's word: a key of `DECODERS`, or F32, F16, BF16."""
    interleaved_heads: int = 0
    """Heads whose rows llama.cpp has put in another order; 0: of none."""
    shift: float = 0.0
    """What is added to the numbers, in fp32."""

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        """All of a GGUF file, by its own names."""
        if quantization is None or quantization.get("quant_method") != METHOD:
            return {}
        return {name: {"stored": entry} for name, entry in entries.items() if is_gguf(entry.path)}

    @classmethod
    def matrix_shape(cls, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        """Of stacked experts, their matrices one below the other."""
        *sizes, columns = parts["stored"].shape
        return prod(sizes), columns

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> GgufTensor:
        entry = parts["stored"]
        own = entry.shape if len(entry.shape) < 3 else cls.matrix_shape(parts)
        if entry.dtype in DECODERS:
            check(entry, len(own) == 2, f"{entry.dtype} for matrices only", f"a shape of {list(entry.shape)}")
            row_bytes = entry.num_bytes // own[0]
            extents = (Extent(entry.path, entry.offset, entry.num_bytes, 0),)
            stored = PlainTensor(torch.uint8, (own[0], row_bytes), extents)
        else:
            stored = replace(PlainTensor.of(entry), shape=own)
        heads = next((count for part, count in quantization["interleaved_heads"].items() if part in entry.name), 0)
        if heads:
            is_right = entry.shape[0] % (2 * heads) == 0
            check(entry, is_right, f"an even number of rows for each of {heads} heads", f"a shape of {list(entry.shape)}")
        shift = quantization["norm_shift"] if "norm.weight" in entry.name else 0.0
        if shift:
            check(entry, entry.dtype not in DECODERS, "a norm that is not packed", entry.dtype)
        return cls(stored, own, entry.dtype, heads, shift)

    @property
    def has_rows(self) -> bool:
        return len(self.shape) > 1 and not self.interleaved_heads

    def rows(self, ranges: Iterable[tuple[int, int]]) -> GgufTensor:
        if self.interleaved_heads:
            raise ValueError("rows of a matrix in llama.cpp's order, expected another")
        stored = self.stored.rows(ranges)
        return replace(self, stored=stored, shape=(stored.shape[0], *self.shape[1:]))

    def is_stored_as(self, dtype: torch.dtype) -> bool:
        return TORCH_DTYPES.get(self.block_type) == dtype and not self.interleaved_heads and not self.shift

    def decode(self, stored: dict[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return stored["stored"] if self.is_stored_as(dtype) else StoredWeight.decode(self, stored, dtype, out)

    def decode_into(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        rows = self._in_order(stored["stored"])
        if self.block_type not in DECODERS:
            numbers.copy_(rows.float() + self.shift if self.shift else rows)
            return
        decode, columns = DECODERS[self.block_type], self.shape[1]
        kernels = kernels_for(numbers)
        if kernels == "native":
            native_kernels.decode_blocks(self.block_type, rows, numbers)
            return
        if kernels == "triton":
            from finetune.offload.weights.formats import triton_gguf

            triton_gguf.decode(self.block_type, rows, numbers)
            return
        blocks = columns // BLOCKS[self.block_type].elements
        for some in pieces(0, self.shape[0], numbers.device):
            numbers[some] = decode(rows[some].view((some.stop - some.start) * blocks, -1)).view(-1, columns)

    def _in_order(self, rows: Tensor) -> Tensor:
        """The rows of the tensor, as they are stored, in the order that the model has them in."""
        if not self.interleaved_heads:
            return rows
        heads = rows.view(self.interleaved_heads, -1, 2, prod(rows.shape[1:]))
        return heads.transpose(1, 2).reshape(rows.shape)


def dtype_to_compute_in(entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """bf16 where a matrix is packed; otherwise the dtype that most bytes of the matrices have. Vectors say nothing: llama.cpp
    stores them in fp32, whatever the model had."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        if len(entry.shape) > 1:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_bytes
    if not sizes or any(word in DECODERS for word in sizes):
        return torch.bfloat16
    return TORCH_DTYPES[max(sizes, key=lambda word: sizes[word])]
