"""Weights as the compressed-tensors library stores them: FP8 and integers of 2 to 8 bits, with scales and zero points.

[Note: compressed-tensors]
A number of a matrix is (q - zero point) * scale of its block ([Note: a grid of scales] in `scaled.py`). All of it is computed
in the dtype of the scales, and only then taken to the dtype that computes: the library's own bits. q is an E4M3 or an int8 by
itself (`weight`), or one of several unsigned integers in a word of 32 bits, lowest bits first, less half their range
(`weight_packed`). Zero points of rows and groups are packed in the same way, along the rows. With `weight_g_idx` column j
belongs to group g_idx[j]; a -1 in it says that it is not used.

Schemes may quantise a layer's inputs too. Here the product is that of the dequantised weight with the inputs as they are.

Source: the compressed-tensors library, `compressors/` and `quantization/lifecycle/forward_helpers.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.weights.formats import native_kernels
from finetune.offload.weights.formats.base import StoredWeight, kernels_for, pieces
from finetune.offload.weights.formats.compressed_tensors_config import (
    Scheme,
    check_section,
    is_compressed_tensors,
    schemes_of,
)
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.formats.scaled import (
    RowSpan,
    are_first,
    cut_scales,
    scale_columns,
    scales_here,
    scales_of_rows,
)
from finetune.offload.weights.formats.stored_parts import check, check_tensor, gather, matrix_shape, read_bytes

_PARTS = {
    "words": ".weight_packed", "scales": ".weight_scale", "zero_points": ".weight_zero_point", "groups": ".weight_g_idx",
    "size": ".weight_shape",
}  # fmt: skip
_NOT_USED = {f"{kind} of {of}": f".{of}_{kind}" for of in ("input", "output") for kind in ("scale", "zero_point")}

_FLOATS = ("F32", "BF16", "F16")
_WORD_BITS = 32
_MAX_SIZE = 1 << 31


@dataclass(frozen=True, slots=True)
class CompressedTensor(StoredWeight):
    """A matrix, or rows of one. See [Note: compressed-tensors]."""

    word = "compressed-tensors"
    layers = (nn.Linear, nn.Embedding)

    packed: PlainTensor
    """float8_e4m3fn or int8 [rows, columns]; packed, int32 [rows, columns * bits / 32], rounded up."""
    scales: PlainTensor
    """fp32, bf16 or fp16 [rows / block rows, columns / block columns], rounded up."""
    zero_points: PlainTensor | None
    """Integers or E4M3 of the shape of the scales; packed, int32 with rows * bits / 32 rows, rounded up."""
    groups: PlainTensor | None
    """int32 [columns]: of each, which column of scales is its own."""
    shape: tuple[int, ...]
    """[rows, columns]"""
    scheme: Scheme
    """How it was quantised."""
    block: tuple[int, int]
    """Rows and columns under one scale."""
    spans: tuple[RowSpan, ...]
    """What is here of the matrix: of the whole, one. Shifts are of rows of scales."""
    zero_spans: tuple[RowSpan, ...]
    """The same rows. Shifts are of rows of zero points as they are stored."""

    @property
    def note(self) -> str:
        if not self.scheme.quantises_inputs:
            return ""
        return (
            "the weights are those of compressed-tensors: losses are those of the dequantised weights, for layers' inputs are "
            "not quantised here"
        )

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        if not is_compressed_tensors(quantization) or not entries:
            return {}
        check_section(quantization, next(iter(entries.values())).path.parent)
        found = gather(entries, _PARTS | _NOT_USED, needed=(), weight=".weight")
        return {name: parts for name, parts in found.items() if "words" in parts or "scales" in parts}

    @classmethod
    def matrix_shape(cls, parts: Mapping[str, TensorEntry]) -> tuple[int, int] | None:
        if "words" not in parts:
            return matrix_shape(parts["packed"]) if "packed" in parts else None
        return _size(parts["size"]) if "size" in parts else None

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> CompressedTensor:
        first = next(iter(parts.values()))
        schemes = schemes_of(first.name.rpartition(".")[0], quantization or {}, first.path.parent)
        errors = []
        for scheme in schemes:
            try:
                return cls._make(shape, parts, scheme)
            except CheckpointError as error:
                errors.append(error)
        raise errors[0]

    @classmethod
    def _make(cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], scheme: Scheme) -> CompressedTensor:
        first = next(iter(parts.values()))
        part = "words" if scheme.is_packed else "packed"
        for name in (part, "scales", *([] if scheme.is_symmetric else ["zero_points"])):
            suffix = ".weight" if name == "packed" else _PARTS[name]
            check(first, name in parts, f"a tensor '*{suffix}' beside it", ", ".join(e.name for e in parts.values()))
        if scheme.is_packed:
            check_tensor(parts["words"], "I32", (shape[0], -(-shape[1] * scheme.num_bits // _WORD_BITS)))
            _check_size(shape, parts)
        else:
            check_tensor(parts["packed"], "F8_E4M3" if scheme.is_float else "I8", shape)
        block = _block(shape, parts["scales"], scheme)
        grid = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
        zero_points, zero_height = _zero_points(shape, parts, scheme, block)
        return cls(
            PlainTensor.of(parts[part]), replace(PlainTensor.of(parts["scales"]), shape=grid), zero_points,
            _groups(grid, shape, parts, scheme), shape, scheme, block, (RowSpan(0, shape[0]),),
            cut_scales([(0, shape[0])], zero_height)[0],
        )  # fmt: skip

    def rows(self, ranges: Iterable[tuple[int, int]]) -> CompressedTensor:
        """Of a whole matrix: with the scales and zero points of blocks and words that they begin or end within."""
        if self.spans != (RowSpan(0, self.shape[0]),):
            raise ValueError(f"rows of {len(self.spans)} runs of rows, expected a whole matrix")
        ranges = list(ranges)
        spans, of_scales = cut_scales(ranges, self.block[0])
        zero_spans, of_zeros = cut_scales(ranges, self._zero_height)
        return replace(
            self,
            packed=self.packed.rows(ranges),
            scales=self.scales.rows(of_scales),
            zero_points=self.zero_points and self.zero_points.rows(of_zeros),
            shape=(sum(stop - start for start, stop in ranges), self.shape[1]),
            spans=spans,
            zero_spans=zero_spans,
        )

    def decode_into(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        kernels = kernels_for(numbers)
        codes = self._native_codes(stored["packed"]) if kernels == "native" else None
        if codes is not None:
            self._decode_natively(codes, stored, numbers)
        elif kernels == "triton":
            self._decode_on_accelerator(stored, numbers)
        else:
            self._decode_rows(stored, numbers)

    def _decode_natively(self, codes: native_kernels.Codes, stored: dict[str, Tensor], numbers: Tensor) -> None:
        if self.zero_points:
            of_rows = scales_of_rows(stored["scales"], self.spans, self.block[0])
            zeros = self._zeros(stored["zero_points"]).float().contiguous()
            scales = native_kernels.Scales(of_rows, self.block[1], zeros=zeros)
        else:
            of_rows, height = scales_here(stored["scales"], self.spans, self.block[0])
            scales = native_kernels.Scales(of_rows, self.block[1], height)
        native_kernels.decode(codes, scales, numbers, rounded=of_rows.dtype)

    def _decode_on_accelerator(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        from finetune.offload.weights.formats import triton_scaled

        packed, bits, zeros, form = stored["packed"], self.scheme.num_bits, stored.get("zero_points"), "none"
        if self.scheme.is_packed:
            codes = triton_scaled.Codes(packed, "columns", bits, less=1 << bits - 1)
        elif self.scheme.is_float:
            codes = triton_scaled.Codes(packed.view(torch.uint8), "e4m3")
        else:
            codes = triton_scaled.Codes(packed, "int8")
        of_rows, height = scales_here(stored["scales"], self.spans, self.block[0])
        if zeros is not None:
            form = "words" if _are_packed(self.scheme) and are_first(self.spans) else "plain"
            zeros = zeros if are_first(self.spans) else self._zeros(zeros)
            zeros = zeros if form == "words" else zeros.to(of_rows.dtype)
        scales = triton_scaled.Scales(of_rows, self.block[1], height, zeros, form, stored.get("groups"))
        triton_scaled.decode(codes, scales, numbers, of_rows.dtype)

    def _decode_rows(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        """The same by PyTorch's operations."""
        scales = scales_of_rows(stored["scales"], self.spans, self.block[0])
        zeros = self._zeros(stored["zero_points"]).to(scales.dtype) if self.zero_points else None
        width = self.block[1]
        if self.groups:
            columns, width = stored["groups"].long(), 1
        for rows in pieces(0, self.shape[0], numbers.device):
            some = self._integers(stored["packed"][rows]).to(scales.dtype)
            if zeros is not None:
                scale_columns(some, zeros[rows][:, columns] if self.groups else zeros[rows], width, Tensor.sub_)
            numbers[rows] = scale_columns(some, scales[rows][:, columns] if self.groups else scales[rows], width)

    def _native_codes(self, packed: Tensor) -> native_kernels.Codes | None:
        """What a native decoder knows: numbers of 8 bits by themselves, and 4 in whole words."""
        if self.groups:
            return None
        if not self.scheme.is_packed:
            if self.zero_points:
                return None
            return native_kernels.Codes("float8_e4m3fn" if self.scheme.is_float else "int8", packed)
        if self.scheme.num_bits != 4 or self.shape[1] % 8:
            return None
        return native_kernels.Codes("four_bit_low", packed.view(torch.uint8), tuple(range(-8, 8)))

    def _integers(self, packed: Tensor) -> Tensor:
        """int8 or E4M3 [rows, columns] of rows as they are stored."""
        if not self.scheme.is_packed:
            return packed
        bits, mask = self.scheme.num_bits, (1 << self.scheme.num_bits) - 1
        packed = packed.view(torch.uint8)
        fields = [packed >> shift & mask for shift in range(0, 8, bits)]
        return torch.stack(fields, -1).flatten(1)[:, : self.shape[1]].sub_(1 << bits - 1).view(torch.int8)

    @property
    def _zero_height(self) -> int:
        """Rows of the matrix under one row of zero points as they are stored."""
        are_packed = self.zero_points is not None and _are_packed(self.scheme)
        return _WORD_BITS // self.scheme.num_bits if are_packed else self.block[0]

    def _zeros(self, zero_points: Tensor) -> Tensor:
        """Of every row, [rows, columns of scales]."""
        height, bits = self._zero_height, self.scheme.num_bits
        zeros = scales_of_rows(zero_points, self.zero_spans, height)
        if not _are_packed(self.scheme):
            return zeros
        runs = [torch.arange(span.start, span.stop, device=zeros.device) % height for span in self.zero_spans]
        shifts = (torch.cat(runs) * bits).int()[:, None]
        return (zeros >> shifts & (1 << bits) - 1) - (1 << bits - 1)


def _are_packed(scheme: Scheme) -> bool:
    """Whether zero points lie in words."""
    return scheme.is_packed and not scheme.is_symmetric and scheme.strategy in ("channel", "group")


def _check_size(shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> None:
    entry = parts.get("size")
    if entry is None:
        return
    check(entry, _size(entry) == shape, f"{list(shape)}", list(_size(entry)))


def _size(entry: TensorEntry) -> tuple[int, int]:
    check(entry, entry.dtype in ("I64", "I32") and entry.shape == (2,), "I64 [2]", f"{entry.dtype} {list(entry.shape)}")
    rows, columns = _integers_of(entry)
    check(entry, 0 < rows < _MAX_SIZE and 0 < columns < _MAX_SIZE, "two sizes", [rows, columns])
    return rows, columns


def _integers_of(entry: TensorEntry) -> list[int]:
    data = bytearray(read_bytes(entry, entry.num_bytes))
    return torch.frombuffer(data, dtype=torch.int64 if entry.dtype == "I64" else torch.int32).tolist()


def _block(shape: tuple[int, ...], scales: TensorEntry, scheme: Scheme) -> tuple[int, int]:
    """Rows and columns under one scale. Raises CheckpointError unless the scales are as many as that makes."""
    check(scales, scales.dtype in _FLOATS, f"a dtype out of {', '.join(_FLOATS)}", scales.dtype)
    if scheme.strategy == "tensor":
        check(scales, scales.shape in ((), (1,), (1, 1)), "one number, a scale for the tensor", list(scales.shape))
        return shape[0], shape[1]
    if scheme.strategy == "channel":
        check(scales, scales.shape in ((shape[0], 1), (shape[0],)), f"{[shape[0], 1]}", list(scales.shape))
        return 1, shape[1]
    block = scheme.block
    is_whole = scheme.strategy == "block" or shape[1] % block[1] == 0
    check(scales, is_whole, f"{shape[1]} columns in groups of a size that divides them", block[1])
    grid = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
    check(scales, scales.shape == grid, f"{list(grid)}, scales of blocks of {list(block)}", list(scales.shape))
    return block


def _zero_points(
    shape: tuple[int, ...], parts: Mapping[str, TensorEntry], scheme: Scheme, block: tuple[int, int]
) -> tuple[PlainTensor | None, int]:
    """And the rows of the matrix under one row of them."""
    entry = parts.get("zero_points")
    if entry is None:
        return None, block[0]
    if _are_packed(scheme):
        height = _WORD_BITS // scheme.num_bits
        check_tensor(entry, "I32", (-(-shape[0] // height), -(-shape[1] // block[1])))
        return PlainTensor.of(entry), height
    allowed = ("I8", "I16", "I32", "I64", "F8_E4M3")
    check(entry, entry.dtype in allowed, f"a dtype out of {', '.join(allowed)}", entry.dtype)
    expected = parts["scales"].shape
    check(entry, entry.shape == expected, f"{list(expected)} like its scales", list(entry.shape))
    grid = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
    return replace(PlainTensor.of(entry), shape=grid), block[0]


def _groups(
    grid: tuple[int, ...], shape: tuple[int, ...], parts: Mapping[str, TensorEntry], scheme: Scheme
) -> PlainTensor | None:
    """None where columns are in order."""
    entry = parts.get("groups")
    if entry is None:
        return None
    check_tensor(entry, "I32", shape[1:])
    values = set(_integers_of(entry))
    if -1 in values:
        return None
    is_right = scheme.strategy == "group" and values == set(range(grid[1]))
    check(entry, is_right, f"each of {grid[1]} groups of columns", sorted(values)[:4])
    return PlainTensor.of(entry)
