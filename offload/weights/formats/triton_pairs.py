"""The decoder on accelerators, in Triton, of bitsandbytes' 4 bits: the single fp32 operations of the portable one, its bits.

Nothing may be fused (`enable_fp_fusion=False`). A program decodes `TILE` numbers. The results' dtypes are fp32, bf16 and fp16.
Imported only where there is an accelerator: PyTorch for CUDA, ROCm and Intel GPUs brings Triton along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.devices.triton_rounding import ROUNDED_TO, put, rounded

TILE = 1024


# Kernels take pointers and numbers, no structures: hence the many arguments, which `decode` puts together.
@triton.jit
def _decode(
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
    put(out + (first - start) + place, numbers, mask)


def decode(
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
    _decode[(triton.cdiv(stop - start // 2 * 2, TILE),)](
        packed, table, scales, nested_absmax, nested_map, offset, out, start, stop, *shifts,
        BLOCK=block, NESTED_BLOCK=nested_block, ROUNDED_TO=ROUNDED_TO[rounded_to], TILE=TILE, enable_fp_fusion=False,
    )  # fmt: skip
