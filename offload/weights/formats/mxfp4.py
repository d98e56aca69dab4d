"""MXFP4, in which gpt-oss is published: stacked experts of 4-bit floats, 32 of them under a power of two.

[Note: MXFP4 blocks]
A number is one of 16 E2M1 values times 2^(s - 127), where s is the byte of its block of 32 numbers of a row. Two lie in a byte,
the first in its low half. The product is in fp32 and then rounded to the dtype that computes: the bits of Transformers'
`convert_moe_packed_tensors`. The files have the rows of an expert's matrix as it is multiplied from the left, Transformers'
modules have it transposed.

Sources: OCP Microscaling Formats (MX) Specification v1.0, section 5; Transformers, `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.weights.formats import native_kernels
from finetune.offload.weights.formats.base import StoredWeight, kernels_for, pieces
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.formats.stored_parts import check, check_tensor, gather

_VALUES = tuple(sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
_BLOCK = 32


@dataclass(frozen=True, slots=True)
class MXFP4Experts(StoredWeight):
    """Matrices of experts, or of some of them. See [Note: MXFP4 blocks]."""

    word = "mxfp4"

    blocks: PlainTensor
    """uint8 [experts, rows, columns / 32, 16]"""
    scales: PlainTensor
    """uint8 [experts, rows, columns / 32]: exponents."""

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        if quantization is None or quantization.get("quant_method") != "mxfp4":
            return {}
        return gather(entries, {"blocks": "_blocks", "scales": "_scales"}, needed=("blocks", "scales"))

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> MXFP4Experts:
        blocks = parts["blocks"]
        check(blocks, "packed" not in parts, "no tensor of that name without _blocks", "one")
        is_stack = len(shape) == 3 and shape[1] % _BLOCK == 0
        check(blocks, is_stack, f"stacked experts with rows of a multiple of {_BLOCK} numbers", f"a parameter {list(shape)}")
        experts, columns, rows = shape
        check_tensor(blocks, "U8", (experts, rows, columns // _BLOCK, _BLOCK // 2))
        check_tensor(parts["scales"], "U8", (experts, rows, columns // _BLOCK))
        return cls(PlainTensor.of(blocks), PlainTensor.of(parts["scales"]))

    @property
    def shape(self) -> tuple[int, ...]:
        """[experts, columns, rows], as modules have it."""
        experts, rows, blocks, _ = self.blocks.shape
        return experts, blocks * _BLOCK, rows

    def rows(self, ranges: Iterable[tuple[int, int]]) -> MXFP4Experts:
        """The matrices of some experts."""
        ranges = list(ranges)
        return MXFP4Experts(self.blocks.rows(ranges), self.scales.rows(ranges))

    def decode_into(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        blocks, scales = stored["blocks"], stored["scales"]
        if kernels_for(numbers) == "triton":
            from finetune.offload.weights.formats import triton_scaled

            for words, exponents, target in zip(blocks.flatten(2).view(torch.int32), scales, numbers, strict=True):
                of_blocks = triton_scaled.Scales(exponents, _BLOCK)
                triton_scaled.decode(triton_scaled.Codes(words, "e2m1", 4), of_blocks, target.t())
            return
        matrix = torch.empty(self.shape[:0:-1], dtype=numbers.dtype, device=blocks.device)
        for expert, target in enumerate(numbers):
            powers = _powers(blocks.device)[scales[expert].int()]
            _decode_rows(blocks[expert], powers, matrix)
            target.copy_(matrix.t())


def _decode_rows(blocks: Tensor, powers: Tensor, matrix: Tensor) -> None:
    """Fills `matrix` [rows, columns] from blocks [rows, columns / 32, 16] and halves of their powers [rows, columns / 32]."""
    if kernels_for(matrix) == "native":
        codes = native_kernels.Codes("four_bit_low", blocks, tuple(2 * value for value in _VALUES))
        native_kernels.decode(codes, native_kernels.Scales(powers, _BLOCK), matrix)
        return
    for rows in pieces(0, len(matrix), matrix.device):
        some = _pairs(blocks.device)[blocks[rows].int()].view(torch.float32)
        matrix[rows] = some.mul_(powers[rows][..., None]).flatten(1)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Twice the two numbers of every byte, fp32, as one of 8 bytes: they are looked up together."""
    values = 2 * torch.tensor(_VALUES, device="cpu")
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], 1).view(torch.int64).view(-1).to(device)


@cache
def _powers(device: torch.device) -> Tensor:
    """Half of 2^(s - 127) of every byte s, fp32: of 255 too it is finite, so that zeros stay zeros."""
    return torch.tensor([2.0 ** (byte - 128) for byte in range(256)], device="cpu").to(device)
