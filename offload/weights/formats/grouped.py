"""What GPTQ and AWQ share: a matrix of small codes, with a zero point and a scale for every group of inputs.

[Note: grouped codes]
The number of output o and input i is (code[o, i] - zero[g, o]) * scale[g, o], where g is the group of input i: i // size, or
what the checkpoint says of each input (act order). The difference of integers is exact. Its product with the scale is rounded
once, to the dtype of the scales: 8 bits of difference times 11 of scale are exact in fp32, so all that compute it there have
these bits. Everything is stored with inputs first, that is transposed to what a linear layer has, and in words of 32 bits. So
rows are decoded from columns of what is stored.

Sources: Frantar et al. 2022 (GPTQ); Lin et al. 2023 (AWQ); GPTQModel, `TorchLinear.dequantize_weight`; AutoAWQ,
`dequantize_gemm`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.weights.formats import native_kernels
from finetune.offload.weights.formats.base import StoredWeight, kernels_for, pieces
from finetune.offload.weights.formats.plain import Extent, PlainTensor
from finetune.offload.weights.formats.stored_parts import check, check_tensor, gather

WORD_BITS = 32
_SUFFIXES = {"codes": ".qweight", "zeros": ".qzeros", "scales": ".scales", "groups": ".g_idx"}


@dataclass(frozen=True, slots=True)
class GroupedWeight(StoredWeight):
    """A matrix of grouped codes, or rows of one. See [Note: grouped codes]."""

    layers = (nn.Linear,)
    has_words_of_inputs: ClassVar[bool] = False
    """Whether a word of `codes` holds neighbouring inputs of one output."""
    zeros_form = "words"
    """Of zero points, as accelerators' decoder has it."""

    codes: PlainTensor
    """int32, with an input or a word of inputs a row."""
    zeros: PlainTensor
    """int32 [groups, words]"""
    scales: PlainTensor
    """fp16 or bf16 [groups, outputs]"""
    groups: PlainTensor | None
    """int32 [inputs]: the group of each input; None where that is input // group_size."""
    shape: tuple[int, ...]
    """[outputs, inputs]"""
    bits: int
    """Of a code: 2, 3, 4 or 8."""
    group_size: int
    """Inputs in a group; the last one may have fewer."""
    spans: tuple[tuple[int, int], ...]
    """Outputs [start, stop) that are here, among those whose words are here: of a whole matrix, all."""

    @abstractmethod
    def _code_columns(self, start: int, stop: int) -> tuple[int, int]:
        """The columns of `codes` that hold outputs [start, stop)."""

    @abstractmethod
    def _row_codes(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """Of outputs [start, stop) of those that are stored here: integers [stop - start, inputs]."""

    @abstractmethod
    def _zero_points(self, zeros: Tensor) -> Tensor:
        """Of all outputs that are stored here: integers of the same dtype [groups, outputs]."""

    def rows(self, ranges: Iterable[tuple[int, int]]) -> GroupedWeight:
        """Of a whole matrix: with what lies in the same words."""
        if self.spans != ((0, self.shape[0]),):
            raise ValueError(f"rows of {len(self.spans)} runs of rows, expected a whole matrix")
        ranges = list(ranges)
        if ranges == [(0, self.shape[0])]:
            return self
        unit = per_words(self.bits)
        units = [(start // unit, -(-stop // unit)) for start, stop in ranges]
        whole = [(low * unit, high * unit) for low, high in units]
        words = unit * self.bits // WORD_BITS
        spans, count = [], 0
        for (start, stop), (low, high) in zip(ranges, whole, strict=True):
            spans.append((count + start - low, count + stop - low))
            count += high - low
        return replace(
            self,
            codes=_columns(self.codes, [self._code_columns(*bounds) for bounds in whole]),
            zeros=_columns(self.zeros, [(low * words, high * words) for low, high in units]),
            scales=_columns(self.scales, whole),
            shape=(sum(stop - start for start, stop in spans), self.shape[1]),
            spans=tuple(spans),
        )

    def decode_into(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        kernels = kernels_for(numbers)
        if kernels == "triton":
            self._decode_on_accelerator(stored, numbers)
            return
        is_native = self.bits < 8 and self.groups is None  # differences are int8
        decode = self._decode_natively if is_native and kernels == "native" else self._decode_rows
        zeros, scales = self._zero_points(stored["zeros"]), stored["scales"]
        done = 0
        for first, end in self.spans:
            for rows in pieces(first, end, numbers.device):
                start, stop = rows.start, rows.stop
                of_groups = zeros[:, rows].t(), scales[:, rows].t()
                decode(stored, start, stop, *of_groups, numbers[done : done + stop - start])
                done += stop - start

    def _decode_on_accelerator(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        from finetune.offload.weights.formats import triton_scaled

        codes = triton_scaled.Codes(stored["codes"].t(), "columns" if self.has_words_of_inputs else "rows", self.bits)
        scales = triton_scaled.Scales(
            stored["scales"].t(), self.group_size, zeros=stored["zeros"].t(), zeros_form=self.zeros_form,
            groups=stored.get("groups"),
        )  # fmt: skip
        done = 0
        for start, stop in self.spans:
            out = numbers[done : done + stop - start]
            triton_scaled.decode(codes, scales, out, stored["scales"].dtype, first=start)
            done += stop - start

    def _decode_natively(self, stored, start: int, stop: int, zeros: Tensor, scales: Tensor, numbers: Tensor) -> None:
        """Outputs [start, stop) of those that are stored here. zeros, scales: [rows, groups]."""
        of_groups = native_kernels.Scales(scales.contiguous(), self.group_size)
        if self.bits == 4 and self.has_words_of_inputs:
            words = stored["codes"][:, start:stop].t().clone(memory_format=torch.contiguous_format)
            codes = native_kernels.Codes("four_bit_low", words.view(torch.uint8), tuple(range(16)))
            of_groups = of_groups._replace(zeros=zeros.float().contiguous())
        else:
            codes = native_kernels.Codes("int8", self._differences(self._row_codes(stored["codes"], start, stop), zeros))
        native_kernels.decode(codes, of_groups, numbers, rounded=scales.dtype)

    def _decode_rows(self, stored, start: int, stop: int, zeros: Tensor, scales: Tensor, numbers: Tensor) -> None:
        """The same by PyTorch's operations."""
        groups = stored["groups"].long() if self.groups else None
        numbers.copy_(self._numbers(self._row_codes(stored["codes"], start, stop), zeros, scales, groups))

    def _numbers(self, codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None) -> Tensor:
        """codes: integers [rows, inputs]; zeros, scales: [rows, groups] -> in the dtype of the scales."""
        inputs, size = self.shape[1], self.group_size
        if groups is not None:
            return codes.sub_(zeros[:, groups]) * scales[:, groups]
        codes = self._differences(codes, zeros)
        if inputs % size:
            return codes * scales.repeat_interleave(size, 1)[:, :inputs]
        return (codes.view(-1, inputs // size, size) * scales[:, :, None]).view(-1, inputs)

    def _differences(self, codes: Tensor, zeros: Tensor) -> Tensor:
        """codes [rows, inputs] with groups in order, which are changed and returned, less zeros [rows, groups]."""
        full = self.shape[1] // self.group_size
        inputs = full * self.group_size
        codes[:, :inputs].unflatten(1, (full, self.group_size)).sub_(zeros[:, :full, None])
        codes[:, inputs:].sub_(zeros[:, full:])
        return codes


def find_grouped(
    entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None, method: str
) -> dict[str, dict[str, TensorEntry]]:
    """The weights of a checkpoint by that `quant_method`. Raises CheckpointError for one whose config.json does not say how
    its weights are packed."""
    if quantization is None:
        packed = next((entry for name, entry in entries.items() if name.endswith(".qweight")), None)
        if packed is not None and packed.name.removesuffix("qweight") + "qzeros" in entries:
            raise CheckpointError(
                f"{packed.path}: tensor '{packed.name}' is packed, and config.json does not say how: add a quantization_config "
                'to it, with what quantize_config.json or quant_config.json beside it has, and "quant_method": "gptq" or "awq"'
            )
        return {}
    if quantization.get("quant_method") != method:
        return {}
    return gather(entries, _SUFFIXES, needed=("codes", "zeros", "scales"), weight=".weight")


def check_parts(
    shape: tuple[int, ...], parts: Mapping[str, TensorEntry], bits: int, groups: int, codes: tuple[int, ...]
) -> None:
    """Raises CheckpointError unless the parts of a matrix of this shape are those of so many groups. codes: their shape."""
    if "packed" in parts:
        check(parts["packed"], False, "no plain weight beside a packed one", "both")
    entry, (outputs, inputs) = parts["codes"], shape
    check_words(entry, outputs, bits, "outputs")
    check_tensor(entry, "I32", codes)
    check_tensor(parts["zeros"], "I32", (groups, outputs * bits // WORD_BITS))
    scales = parts["scales"]
    check(scales, scales.dtype in ("F16", "BF16"), "F16 or BF16", scales.dtype)
    check_tensor(scales, scales.dtype, (groups, outputs))
    if "groups" in parts:
        check_tensor(parts["groups"], "I32", (inputs,))


def check_words(entry: TensorEntry, count: int, bits: int, what: str) -> None:
    """Raises CheckpointError unless so many integers fill whole words."""
    check(entry, count % per_words(bits) == 0, f"a multiple of {per_words(bits)} {what}", count)


def per_words(bits: int) -> int:
    """Integers that fill the fewest whole words."""
    return WORD_BITS if bits == 3 else WORD_BITS // bits


def unpack(words: Tensor, bits: int) -> Tensor:
    """Integers of `bits` bits, the lowest bits of a word first: int32 [rows, words] -> int8 (int16 of 8 bits) [rows, n].
    Those of 3 bits go on in the next word."""
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # also of one row, whatever its strides
    if bits == 8:
        return data.to(torch.int16)
    if bits == 3:  # eight in three bytes
        wide = data.view(len(data), -1, 3).int()
        wide = wide[:, :, 0] | wide[:, :, 1] << 8 | wide[:, :, 2] << 16
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=words.device)
        return (wide[:, :, None] >> shifts).bitwise_and_(7).to(torch.int8).view(len(data), -1)
    mask = (1 << bits) - 1
    fields = [(data >> shift).bitwise_and_(mask) for shift in range(0, 8, bits)]
    return torch.stack(fields, 2).view(len(data), -1).view(torch.int8)


def _columns(matrix: PlainTensor, ranges: list[tuple[int, int]]) -> PlainTensor:
    """Columns [start, stop) of all ranges, one after the other: an extent of every row for each."""
    rows, columns = matrix.shape
    size, count = matrix.dtype.itemsize, sum(stop - start for start, stop in ranges)
    extents: list[Extent] = []
    for row in range(rows):
        done = row * count * size
        for start, stop in ranges:
            first = (row * columns + start) * size
            found = matrix.cut(first, first + (stop - start) * size)
            extents += [extent._replace(target_offset=extent.target_offset - first + done) for extent in found]
            done += (stop - start) * size
    return PlainTensor(matrix.dtype, (rows, count), tuple(extents))
