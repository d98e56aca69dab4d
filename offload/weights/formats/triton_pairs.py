"""The decoder on accelerators, in Triton, of bitsandbytes' 4 bits: the single fp32 operations of the portable one, its bits.

Nothing may be fused (`enable_fp_fusion=False`). A program decodes `TILE` numbers. The results' dtypes are fp32, bf16 and fp16.
Imported only where there is an accelerator: PyTorch for CUDA, ROCm and Intel GPUs brings Triton along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.offload.devices.triton_rounding import ROUNDED_TO, put, rounded

TILE = 2048
RUN = 32
"""Numbers whose scale is read once: they divide every size of blocks."""


# Kernels take pointers and numbers, no structures: hence the many arguments, which `decode` puts together.
@triton.jit
def _decode(
    packed, table, absmax, nested_absmax, nested_map, nested_offset,
    out, start: tl.int64, stop: tl.int64, byte_shift: tl.int64, block_shift: tl.int64, nested_shift: tl.int64,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUNDED_TO: tl.constexpr,
    RUN: tl.constexpr, ARE_WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """NESTED_BLOCK: blocks under one nested absmax, 0 where absmax is not nested. ARE_WHOLE: whether all of every run is here:
    its bytes are then read together."""
    first = start // RUN * RUN + tl.program_id(0).to(tl.int64) * TILE
    low, high = start - first, stop - first  # of what is here
    run = tl.arange(0, TILE // RUN) * RUN
    mask = (run + RUN > low) & (run < high)
    place = run[:, None] + tl.arange(0, RUN)[None, :]
    byte = run[:, None] // 2 + tl.arange(0, RUN // 2)[None, :]
    if ARE_WHOLE:
        each, of_byte = mask[:, None], mask[:, None]
    else:
        each, of_byte = (place >= low) & (place < high), (byte * 2 + 1 >= low) & (byte * 2 < high)
    pair = tl.load(packed + (first // 2 + byte_shift) + byte, of_byte, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(pair >> 4, pair & 15), [TILE // RUN, RUN])
    first_block = first // BLOCK
    block = ((first % BLOCK).to(tl.int32) + run) // BLOCK
    scale = tl.load(absmax + (first_block + block_shift) + block, mask, other=0)
    if NESTED_BLOCK:
        nested_block = ((first_block % NESTED_BLOCK).to(tl.int32) + block) // NESTED_BLOCK
        of_nested = tl.load(nested_absmax + (first_block // NESTED_BLOCK + nested_shift) + nested_block, mask, other=0.0)
        scale = tl.load(nested_map + scale.to(tl.int32), mask, other=0.0) * of_nested + nested_offset
    numbers = rounded(tl.load(table + codes) * scale[:, None], ROUNDED_TO)
    put(out + (first - start) + place, numbers, each)


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
    _decode[(triton.cdiv(stop - start // RUN * RUN, TILE),)](
        packed, table, scales, nested_absmax, nested_map, offset, out, start, stop, *shifts,
        BLOCK=block, NESTED_BLOCK=nested_block, ROUNDED_TO=ROUNDED_TO[rounded_to], RUN=RUN,
        ARE_WHOLE=start % RUN == 0 and stop % RUN == 0, TILE=TILE, enable_fp_fusion=False,
    )  # fmt: skip
