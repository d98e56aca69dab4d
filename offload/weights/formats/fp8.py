"""FP8 as DeepSeek and Qwen publish it, and Transformers' fine-grained FP8 saves it: E4M3 numbers with a scale for a block.

[Note: FP8 blocks]
A number of a matrix is its E4M3 value times the scale of its block (`weight_scale_inv`), of `weight_block_size` rows and
columns; the last blocks may be ragged. `weight_block_size: null` is one scale for the matrix, or one a row. Products are in
fp32 and then rounded to the dtype that computes: the bits of Transformers' `Fp8Dequantize`. (That takes the size of blocks from
the number of scales, which is wrong where the last block is ragged.) Scales may be powers of two in 8 bits (UE8M0).

Kernels for such layers also round their inputs to E4M3. Here the product is that of the dequantised weight with the inputs as
they are, and the scales of inputs (`activation_scale`) are not used.

Sources: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3; Transformers, `integrations/finegrained_fp8.py`.
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
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.formats.scaled import RowSpan, cut_scales, scale_columns, scales_here, scales_of_rows
from finetune.offload.weights.formats.stored_parts import check, check_tensor, gather, matrix_shape

_SCALES = {"scales": ".weight_scale_inv", "one scale": ".weight_scale"}
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class BlockFP8(StoredWeight):
    """A matrix of E4M3 numbers with a grid of scales, or rows of one. See [Note: FP8 blocks]."""

    word = "fp8 with scales"
    layers = (nn.Linear, nn.Embedding)
    note = "the weights are FP8: losses are those of the dequantised weights, for layers' inputs are not quantised here"

    packed: PlainTensor
    """float8_e4m3fn [rows, columns]"""
    scales: PlainTensor
    """fp32, bf16, fp16, float8_e8m0fnu, or uint8 as exponents [rows / block rows, columns / block columns], rounded up."""
    block: tuple[int, int]
    """Rows and columns under one scale."""
    spans: tuple[RowSpan, ...]
    """What is here of the matrix: of the whole, one."""

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        if quantization is None or quantization.get("quant_method") != "fp8":
            return {}
        inputs = {"scale of inputs": ".activation_scale", "one scale of inputs": ".input_scale"}
        return gather(entries, _SCALES | inputs, needed=("packed",), weight=".weight")

    @classmethod
    def matrix_shape(cls, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        return matrix_shape(parts["packed"])

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> BlockFP8:
        packed, scales = parts["packed"], [parts[part] for part in _SCALES if part in parts]
        check_tensor(packed, "F8_E4M3", shape)
        check(packed, len(scales) == 1, f"one of {' and '.join(_SCALES.values())} beside it", len(scales))
        block = _block(shape, scales[0], quantization or {}, packed)
        grid = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
        stored = replace(PlainTensor.of(scales[0]), shape=grid)
        return cls(PlainTensor.of(packed), stored, block, (RowSpan(0, shape[0]),))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape

    @property
    def scale_parts(self) -> tuple[str, ...]:
        return ("scales",) if self.scales.dtype == torch.float32 else ()

    def rows(self, ranges: Iterable[tuple[int, int]]) -> BlockFP8:
        """Of a whole matrix: with the scales of blocks that they begin or end within."""
        if self.spans != (RowSpan(0, self.shape[0]),):
            raise ValueError(f"rows of {len(self.spans)} runs of rows, expected a whole matrix")
        ranges = list(ranges)
        spans, of_scales = cut_scales(ranges, self.block[0])
        return replace(self, packed=self.packed.rows(ranges), scales=self.scales.rows(of_scales), spans=spans)

    def decode_into(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        scales, (height, width) = stored["scales"], self.block
        if scales.dtype.itemsize == 1:
            scales = _powers(scales) if scales.dtype == torch.uint8 else scales.float()
        kernels = kernels_for(numbers)
        if kernels is None:
            scales = scales_of_rows(scales.float(), self.spans, height)
            for rows in pieces(0, self.shape[0], numbers.device):
                numbers[rows] = scale_columns(stored["packed"][rows].float(), scales[rows], width)
            return
        scales, height = scales_here(scales, self.spans, height)
        if kernels == "native":
            codes = native_kernels.Codes("float8_e4m3fn", stored["packed"])
            native_kernels.decode(codes, native_kernels.Scales(scales, width, height), numbers)
        else:
            from finetune.offload.weights.formats import triton_scaled

            codes = triton_scaled.Codes(stored["packed"].view(torch.uint8), "e4m3")
            triton_scaled.decode(codes, triton_scaled.Scales(scales, width, height), numbers)


def _powers(exponents: Tensor) -> Tensor:
    """2^(byte - 127) of every byte, fp32; of 255 it is infinite."""
    return (exponents.int() << 23).clamp_(min=1 << 22).view(torch.float32)


def _block(
    shape: tuple[int, ...], scales: TensorEntry, quantization: Mapping[str, Any], packed: TensorEntry
) -> tuple[int, int]:
    """Rows and columns under one scale. Raises CheckpointError unless the scales are as many as that makes."""
    exponents = ("U8",) if quantization.get("scale_fmt") == "ue8m0" else ()
    allowed = _SCALE_DTYPES + exponents
    check(scales, scales.dtype in allowed, f"a dtype out of {', '.join(allowed)}", scales.dtype)
    block = quantization.get("weight_block_size", [128, 128])
    if block is not None and not (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise CheckpointError(
            f"{packed.path.parent / 'config.json'}: expected weight_block_size of quantization_config to be two sizes or null, "
            f"found {block!r:.60}"
        )
    is_one = scales.shape in ((), (1,), (1, 1))
    if is_one and (block is None or "weight_block_size" not in quantization):
        return shape[0], shape[1]
    if block is None:
        check(scales, scales.shape == (shape[0], 1), f"[] or {[shape[0], 1]}", list(scales.shape))
        return 1, shape[1]
    grid = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
    expected = f"{list(grid)}, scales of blocks of {list(block)} of {list(shape)}"
    check(scales, scales.shape == grid, expected, list(scales.shape))
    return block[0], block[1]
