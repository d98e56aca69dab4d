"""Decoders of packed weights on accelerators, in Triton: the same single fp32 operations as the portable ones, the same bits.

Nothing may be fused (`enable_fp_fusion=False`). A program decodes `TILE` numbers. The results' dtypes are fp32, bf16 and fp16.
Imported only where there is an accelerator: PyTorch for CUDA, ROCm and Intel GPUs brings Triton along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.devices.triton_rounding import rounded

TILE = 1024
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def _put(out, mask, numbers):
    if out.dtype.element_ty == tl.bfloat16:
        numbers = rounded(numbers, 1)
    tl.store(out, numbers.to(out.dtype.element_ty), mask)


# Kernels take pointers and numbers, no structures: hence the many arguments, which `codes_4bit` puts together.
@triton.jit
def _codes_4bit(
    packed, table, absmax, nested_absmax, nested_map, nested_offset,
    out, start: tl.int64, stop: tl.int64, byte_shift: tl.int64, block_shift: tl.int64, nested_shift: tl.int64,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUNDED_TO: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """NESTED_BLOCK: blocks under one nested absmax, 0 where absmax is not nested."""
    first = start // 2 * 2 + tl.program_id(0).to(tl.int64) * TILE
    low, high = (start - first).to(tl.int32), tl.minimum(stop - first, TILE).to(tl.int32)
    byte = tl.arange(0, TILE // 2)
    pair = tl.load(packed + (first // 2 + byte_shift) + byte, byte * 2 < high, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(pair >> 4, pair & 15), [TILE])
    place = tl.arange(0, TILE)
    mask = (place >= low) & (place < high)
    first_block = first // BLOCK
    block = ((first % BLOCK).to(tl.int32) + place) // BLOCK
    scale = tl.load(absmax + (first_block + block_shift) + block, mask, other=0)
    if NESTED_BLOCK:
        nested_block = ((first_block % NESTED_BLOCK).to(tl.int32) + block) // NESTED_BLOCK
        of_nested = tl.load(nested_absmax + (first_block // NESTED_BLOCK + nested_shift) + nested_block, mask, other=0.0)
        scale = tl.load(nested_map + scale.to(tl.int32), mask, other=0.0) * of_nested + nested_offset
    numbers = rounded(tl.load(table + codes) * scale, ROUNDED_TO)
    _put(out + (first - start) + place, mask, numbers)


@triton.jit
def _rows_int8(packed, scales, factor, out, columns, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = place < columns
    numbers = tl.load(packed + row * columns + place, mask, other=0).to(tl.float32) * tl.load(scales + row)
    _put(out + row * columns + place, mask, numbers * factor)


@triton.jit
def _rows_e4m3(packed, scales, out, columns, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The bits of a number, moved to where fp32 has them, are its value by 2^120."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = place < columns
    code = tl.load(packed + row * columns + place, mask, other=0).to(tl.uint32)
    value = ((code & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    value = tl.where((code & 127) == 127, float("nan"), value)
    value = tl.where(code >= 128, -value, value)
    scale = tl.load(scales + row * tl.cdiv(columns, WIDTH) + place // WIDTH, mask, other=0.0)
    _put(out + row * columns + place, mask, value * scale)


def codes_4bit(
    packed: Tensor,
    table: Tensor,
    absmax: tuple[Tensor, int],
    nested: tuple[Tensor, Tensor, int, float] | None,
    out: Tensor,
    span: tuple[int, int, int, int, int],
    rounded_to: torch.dtype,
) -> None:
    """See [Note: 4-bit blocks] and `Span` in `offload/weights/formats/bitsandbytes.py`.

    packed: uint8 [bytes]. table: fp32 [16]. absmax: fp32, or uint8 where it is nested, and numbers under each. nested: absmax
    fp32, its map fp32 [256], blocks under each, and the offset. out: the span's numbers.
    """
    start, stop, *shifts = span
    if start == stop:
        return
    scales, block = absmax
    nested_absmax, nested_map, nested_block, offset = nested or (scales, scales, 0, 0.0)
    _codes_4bit[(triton.cdiv(stop - start // 2 * 2, TILE),)](
        packed, table, scales, nested_absmax, nested_map, offset, out, start, stop, *shifts,
        BLOCK=block, NESTED_BLOCK=nested_block, ROUNDED_TO=_DTYPES[rounded_to], TILE=TILE, enable_fp_fusion=False,
    )  # fmt: skip


def rows_int8(packed: Tensor, scales: Tensor, factor: float, out: Tensor) -> None:
    """packed: int8 [rows, columns]. scales: fp32 [rows]. out: [rows, columns], packed * scales * factor."""
    if out.numel():
        rows, columns = packed.shape
        _rows_int8[(rows, triton.cdiv(columns, TILE))](
            packed, scales, factor, out, columns, TILE=TILE, enable_fp_fusion=False
        )


def rows_e4m3(packed: Tensor, scales: Tensor, width: int, out: Tensor) -> None:
    """packed: float8_e4m3fn [rows, columns]. scales: fp32 [rows, columns / width], rounded up, contiguous.
    out: [rows, columns], packed * scales."""
    if out.numel():
        rows, columns = packed.shape
        _rows_e4m3[(rows, triton.cdiv(columns, TILE))](
            packed.view(torch.uint8), scales, out, columns, WIDTH=width, TILE=TILE, enable_fp_fusion=False
        )
