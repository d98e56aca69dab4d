"""The formats of bitsandbytes, as Transformers saves them: 4 bits (NF4 and FP4), and the 8 bits of LLM.int8().

[Note: 4-bit blocks]
The numbers of a matrix, row after row, are cut into blocks of `block_size`, whatever its rows are. A number is one of 16 codes
times the largest magnitude of its block (`absmax`). Two lie in a byte, the first in its high half. `absmax` may itself be
stored in 8 bits (nested): it is then nested_map[code] * nested_absmax + offset, with one nested absmax for 256 blocks. Sums
and products are in fp32, and the result is rounded to the dtype that the model had when it was packed: bitsandbytes' own
bits. (Its AVX-512 kernel, as of 0.50, takes a wrong absmax where a block goes on in the next row; its others do not.)

[Note: LLM.int8]
A number of row i is int8 * SCB[i] / 127. bitsandbytes multiplies in int8, for which it rounds the inputs, less the columns with
outliers. Here the product is that of the dequantised weight with the inputs as they are.

Sources: Dettmers et al. 2023 (QLoRA), section 3; Dettmers et al. 2022 (LLM.int8()); bitsandbytes, `QuantState`,
`dequantize_4bit` and `int8_vectorwise_dequant`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.weights.formats import native_kernels
from finetune.offload.weights.formats.base import StoredWeight, kernels_for, pieces
from finetune.offload.weights.formats.bitsandbytes_files import (
    CODES,
    STATES,
    State4Bit,
    is_bitsandbytes,
    read_shape,
    read_state,
)
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.formats.stored_parts import check, check_tensor, gather, matrix_shape, read_bytes

_PER_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes rounds it


class Span(NamedTuple):
    """Numbers [start, stop) of a matrix. The shifts are what is added to the index of a byte, a block or a nested absmax in the
    whole matrix to have its index among those that are here."""

    start: int
    stop: int
    byte_shift: int = 0
    block_shift: int = 0
    nested_shift: int = 0


@dataclass(frozen=True, slots=True)
class Packed4Bit(StoredWeight):
    """A matrix in NF4 or FP4, or rows of one. See [Note: 4-bit blocks]."""

    word = "bitsandbytes 4-bit"
    layers = (nn.Linear,)

    packed: PlainTensor
    """uint8 [bytes]"""
    absmax: PlainTensor
    """fp32 [blocks]; uint8 where it is nested."""
    nested_absmax: PlainTensor | None
    """fp32 [blocks / nested_block_size]"""
    nested_map: PlainTensor | None
    """fp32 [256]"""
    shape: tuple[int, ...]
    """[rows, columns]"""
    state: State4Bit
    """How it was packed."""
    spans: tuple[Span, ...]
    """What is here of the matrix that was packed: of the whole, one."""

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        if not is_bitsandbytes(quantization):
            return {}
        suffixes = {
            "absmax": ".absmax", "quant_map": ".quant_map", "nested_absmax": ".nested_absmax",
            "nested_map": ".nested_quant_map",
        }  # fmt: skip
        return gather(entries, suffixes | STATES, needed=("packed", "absmax", "quant_map"))

    @classmethod
    def matrix_shape(cls, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        return read_shape(parts)

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> Packed4Bit:
        state = read_state(shape, parts)
        packed = PlainTensor.of(parts["packed"])  # bytes, whatever dtype they were said to have for training in shards
        absmax, nested_absmax, nested_map = (
            PlainTensor.of(parts[part]) if part in parts else None for part in ("absmax", "nested_absmax", "nested_map")
        )
        packed = PlainTensor(torch.uint8, (packed.num_bytes,), packed.extents)
        return cls(packed, absmax, nested_absmax, nested_map, shape, state, (Span(0, prod(shape)),))

    @property
    def scale_parts(self) -> tuple[str, ...]:
        return ("absmax",) if self.state.nested_offset is None else ()

    def rows(self, ranges: Iterable[tuple[int, int]]) -> Packed4Bit:
        """Of a whole matrix: with blocks and bytes that they begin or end within."""
        if self.spans != (Span(0, prod(self.shape)),):
            raise ValueError(f"rows of {len(self.spans)} runs of rows, expected a whole matrix")
        columns, (size, nested_size) = self.shape[1], (self.state.block_size, self.state.nested_block_size)
        spans: list[Span] = []
        places: tuple[list, list, list] = [], [], []
        counts = [0, 0, 0]
        for start, stop in ranges:
            first, last = start * columns, stop * columns
            found = [(first // unit, -(-last // unit)) for unit in (2, size, size * nested_size)]
            spans.append(Span(first, last, *(count - low for count, (low, _) in zip(counts, found, strict=True))))
            for place, bounds in zip(places, found, strict=True):
                place.append(bounds)
            counts = [count + high - low for count, (low, high) in zip(counts, found, strict=True)]
        return replace(
            self,
            packed=self.packed.rows(places[0]),
            absmax=self.absmax.rows(places[1]),
            nested_absmax=self.nested_absmax and self.nested_absmax.rows(places[2]),
            shape=(sum(span.stop - span.start for span in spans) // columns, columns),
            spans=tuple(spans),
        )

    def decode_into(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        numbers = numbers.view(-1)
        if kernels := kernels_for(numbers):
            by = self._decode_natively if kernels == "native" else self._decode_on_accelerator
            by(stored, numbers)
            return
        columns, done = self.shape[1], 0
        for span in self.spans:
            for rows in pieces(span.start // columns, span.stop // columns, numbers.device):
                start, stop = rows.start * columns, rows.stop * columns
                numbers[done : done + stop - start] = self._numbers(stored, span, start, stop)
                done += stop - start

    def _decode_natively(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        state, nested, done = self.state, None, 0
        for span in self.spans:
            block, into_block = divmod(span.start, state.block_size)
            if state.nested_offset is not None:
                outer, into_outer = divmod(block, state.nested_block_size)
                nested_absmax = stored["nested_absmax"][outer + span.nested_shift :]
                nested = native_kernels.Nested(
                    stored["nested_map"], nested_absmax, state.nested_block_size, state.nested_offset, into_outer
                )
            packed = stored["packed"][span.start // 2 + span.byte_shift :]
            absmax = stored["absmax"][block + span.block_shift :]
            out = numbers[done : done + span.stop - span.start]
            native_kernels.decode(
                native_kernels.Codes("four_bit", packed, CODES[state.quant_type], odd=span.start % 2 == 1),
                native_kernels.Scales(absmax, state.block_size, into_group=into_block, nested=nested),
                out, rounded=state.dtype,
            )  # fmt: skip
            done += out.numel()

    def _decode_on_accelerator(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        from finetune.offload.weights.formats import triton_pairs

        state, nested, done = self.state, None, 0
        if state.nested_offset is not None:
            nested = (stored["nested_absmax"], stored["nested_map"], state.nested_block_size, state.nested_offset)
        for span in self.spans:
            out = numbers[done : done + span.stop - span.start]
            triton_pairs.decode(
                stored["packed"], _codes(state.quant_type, numbers.device), (stored["absmax"], state.block_size), nested,
                out, span, state.dtype,
            )  # fmt: skip
            done += out.numel()

    def _numbers(self, stored: dict[str, Tensor], span: Span, start: int, stop: int) -> Tensor:
        """Numbers [start, stop) of the matrix, whole rows of `span`, as they were rounded."""
        low, high = start // 2, -(-stop // 2)
        packed = stored["packed"][low + span.byte_shift : high + span.byte_shift]
        run = gcd(self.state.block_size, start, stop)
        starts = torch.arange(start, stop, run, device=packed.device)
        numbers = _pairs(packed, self.state.quant_type)[start - 2 * low :][: stop - start].view(-1, run)
        numbers.mul_(self._absmax(stored, span, starts // self.state.block_size)[:, None])
        return numbers.view(-1).to(self.state.dtype)

    def _absmax(self, stored: dict[str, Tensor], span: Span, blocks: Tensor) -> Tensor:
        """Of these blocks of the matrix, fp32."""
        absmax = stored["absmax"][blocks + span.block_shift]
        if self.state.nested_offset is None:
            return absmax
        nested = stored["nested_absmax"][blocks // self.state.nested_block_size + span.nested_shift]
        return stored["nested_map"][absmax.int()].mul_(nested).add_(self.state.nested_offset)


def _pairs(packed: Tensor, quant_type: str) -> Tensor:
    """uint8 [..., bytes] -> the codes' numbers, fp32 [..., 2 bytes]."""
    return _table(quant_type, packed.device)[packed.int()].view(torch.float32)


@cache
def _codes(quant_type: str, device: torch.device) -> Tensor:
    """The 16 numbers, fp32."""
    return torch.tensor(CODES[quant_type], device=device)


@cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    """The two numbers of every byte, fp32, as one of 8 bytes: they are looked up together."""
    codes = torch.tensor(CODES[quant_type], device="cpu")
    return torch.stack([codes.repeat_interleave(16), codes.repeat(16)], 1).view(torch.int64).view(-1).to(device)


@dataclass(frozen=True, slots=True)
class Packed8Bit(StoredWeight):
    """A matrix of LLM.int8(), or rows of one. See [Note: LLM.int8]."""

    word = "bitsandbytes int8"
    layers = (nn.Linear,)
    note = (
        "the weights are those of LLM.int8(): losses are those of the dequantised weights (int8 * SCB / 127), for layers' "
        "inputs are not quantised here"
    )

    packed: PlainTensor
    """int8 [rows, columns]"""
    scales: PlainTensor
    """fp32 [rows]: the largest magnitude of a row, `SCB` in the files."""

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        if not is_bitsandbytes(quantization):
            return {}
        return gather(
            entries, {"scales": ".SCB", "order": ".weight_format"}, needed=("packed", "scales"), weight=".weight"
        )

    @classmethod
    def matrix_shape(cls, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        return matrix_shape(parts["packed"])

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> Packed8Bit:
        check_tensor(parts["packed"], "I8", shape)
        check_tensor(parts["scales"], "F32", shape[:1])
        if "order" in parts:
            order = read_bytes(parts["order"], 8)
            check(parts["order"], not any(order), "0, a matrix row after row", int.from_bytes(order, "little"))
        return cls(PlainTensor.of(parts["packed"]), PlainTensor.of(parts["scales"]))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape

    @property
    def scale_parts(self) -> tuple[str, ...]:
        return ("scales",)

    def rows(self, ranges: Iterable[tuple[int, int]]) -> Packed8Bit:
        ranges = list(ranges)
        return Packed8Bit(self.packed.rows(ranges), self.scales.rows(ranges))

    def decode_into(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        kernels = kernels_for(numbers)
        if kernels == "triton":
            from finetune.offload.weights.formats import triton_scaled

            scales = triton_scaled.Scales(stored["scales"][:, None], self.shape[1])
            triton_scaled.decode(triton_scaled.Codes(stored["packed"], "int8"), scales, numbers, factor=_PER_STEP)
        elif kernels == "native":
            codes = native_kernels.Codes("int8", stored["packed"])
            scales = native_kernels.Scales(stored["scales"], columns=self.shape[1])
            native_kernels.decode(codes, scales, numbers, factor=_PER_STEP)
        else:
            for rows in pieces(0, self.shape[0], numbers.device):
                numbers[rows] = _dequantised(stored["packed"][rows], stored["scales"][rows])


def _dequantised(packed: Tensor, scales: Tensor) -> Tensor:
    """fp32; the order of the products is bitsandbytes'."""
    return (packed * scales[:, None]).mul_(_PER_STEP)
