"""The formats of GPTQ, as AutoGPTQ and GPTQModel save them: 2, 3, 4 and 8 bits, with act order or without.

[Note: GPTQ's zero points]
Checkpoints of the first format ("gptq") hold zero points less one, those of the second ("gptq_v2") as they are. One is added as
GPTQModel does: to words of 2, 4 and 8 bits, where a field that overflows carries into the next, as it had borrowed when the
model was saved; and to each field of 3 bits, which wraps. That is where a zero point was 0; AutoGPTQ, which read such fields
otherwise, could not store it.

Codes are packed along the inputs, zero points along the outputs. See [Note: grouped codes].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.weights.formats.grouped import (
    WORD_BITS,
    GroupedWeight,
    check_parts,
    check_words,
    find_grouped,
    unpack,
)
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.formats.stored_parts import check, matrix_shape, read_bytes

_BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": True, "gptq_v2": False}
"""Name -> whether zero points are stored less one."""
_ONES = {bits: sum(1 << shift for shift in range(0, WORD_BITS, bits)) for bits in (2, 4, 8)}
"""A word with 1 in every field."""


@dataclass(frozen=True, slots=True)
class PackedGptq(GroupedWeight):
    """A matrix that GPTQ has packed, or rows of one; `codes` are [words of inputs, outputs]."""

    word = "GPTQ"
    has_words_of_inputs = True

    zeros_less_one: bool
    """See [Note: GPTQ's zero points]."""

    @property
    def zeros_form(self) -> str:
        return "less one" if self.zeros_less_one else "words"

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        return find_grouped(entries, quantization, "gptq")

    @classmethod
    def matrix_shape(cls, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        (words, outputs), (_, zero_words) = matrix_shape(parts["codes"]), matrix_shape(parts["zeros"])
        return outputs, words * outputs // zero_words  # as many zero points in a word as codes

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> PackedGptq:
        codes, inputs = parts["codes"], shape[1]
        zeros_less_one = _FORMATS[_format(codes, quantization)]
        bits, group_size = _sizes(shape, parts, quantization)
        num_groups = -(-inputs // group_size)
        check_words(codes, inputs, bits, "inputs")
        check_parts(shape, parts, bits, num_groups, (inputs * bits // WORD_BITS, shape[0]))
        groups = parts.get("groups")
        if groups is not None and _are_in_order(groups, inputs, group_size, num_groups):
            groups = None
        return cls(
            *(PlainTensor.of(parts[part]) for part in ("codes", "zeros", "scales")),
            groups and PlainTensor.of(groups), shape, bits, group_size, ((0, shape[0]),), zeros_less_one,
        )  # fmt: skip

    def _code_columns(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def _row_codes(self, codes: Tensor, start: int, stop: int) -> Tensor:
        return unpack(codes[:, start:stop].t(), self.bits)

    def _zero_points(self, zeros: Tensor) -> Tensor:
        if not self.zeros_less_one:
            return unpack(zeros, self.bits)
        if self.bits == 3:
            return unpack(zeros, 3).add_(1).bitwise_and_(7)
        return unpack(zeros + _ONES[self.bits], self.bits)


def _format(entry: TensorEntry, quantization: Mapping[str, Any]) -> str:
    """Raises CheckpointError for another than `_FORMATS`."""
    keys = ("checkpoint_format", "format")
    names = {str(quantization[key]).lower() for key in keys if quantization.get(key) is not None} or {"gptq"}
    if quantization.get("is_marlin_format"):
        names = {"marlin"}
    if quantization.get("rotation"):
        names = {f"{quantization['rotation']} rotation"}
    if len(names) > 1 or not names <= _FORMATS.keys():
        raise CheckpointError(
            f"{entry.path}: the weights are packed by GPTQ in the format {' and '.join(sorted(names)):.60} (quantization_config"
            f" in config.json), expected {' or '.join(_FORMATS)}: use a checkpoint in one of these, or the original weights"
        )
    return names.pop()


def _sizes(
    shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any]
) -> tuple[int, int]:
    """Bits of a code and inputs in a group. With `dynamic`, layers differ: what is stored says it, with `g_idx` or where groups
    are even."""
    codes, scales, inputs = parts["codes"], parts["scales"], shape[1]
    bits, group_size = (quantization.get(key) for key in ("bits", "group_size"))
    check(codes, type(bits) is int and bits in _BITS, f"bits to be {', '.join(map(str, _BITS))} (quantization_config)", bits)
    is_right = type(group_size) is int and (group_size > 0 or group_size == -1)
    check(codes, is_right, "group_size to be -1 or more than 0 (quantization_config)", group_size)
    if quantization.get("dynamic"):
        is_matrix = len(codes.shape) == len(scales.shape) == 2 and scales.shape[0] > 0
        check(codes, is_matrix, "matrices of codes and scales", f"{list(codes.shape)} and {list(scales.shape)}")
        found = codes.shape[0] * WORD_BITS / inputs
        check(codes, found in _BITS, f"codes of {', '.join(map(str, _BITS))} bits for {inputs} inputs", f"{found:g} bits")
        return int(found), -(-inputs // scales.shape[0])
    return bits, inputs if group_size == -1 else group_size


def _are_in_order(entry: TensorEntry, inputs: int, group_size: int, num_groups: int) -> bool:
    """Whether the group of every input is input // group_size. Raises CheckpointError for groups that are not there, and for
    some that no input is in."""
    groups = torch.frombuffer(bytearray(read_bytes(entry, 4 * inputs)), dtype=torch.int32)
    low, high = int(groups.min()), int(groups.max())
    check(entry, 0 <= low and high < num_groups, f"groups from 0 to {num_groups - 1}", low if low < 0 else high)
    used = len(groups.unique())
    check(entry, used == num_groups, f"an input in each of {num_groups} groups", f"inputs in {used}")
    return groups.equal((torch.arange(inputs) // group_size).int())
