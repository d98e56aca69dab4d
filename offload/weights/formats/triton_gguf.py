"""The decoder of GGUF's blocks on accelerators, in Triton: the single fp32 operations of `gguf_blocks.py`, and so its bits.

Nothing may be fused (`enable_fp_fusion=False`). A program decodes some *parts*: neighbouring elements that have one scale, in
simple types a whole block. Where a code's bits lie is told by the bits of its element's number, each by itself, so that it is
the sum of what the part and the place in the part tell.
Imported only where there is an accelerator: PyTorch for CUDA, ROCm and Intel GPUs brings Triton along.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.offload.devices.triton_rounding import put
from finetune.offload.files.gguf_file import BLOCKS
from finetune.offload.weights.formats.gguf_blocks import iq4_table

ELEMENTS = 2048


class Layout(NamedTuple):
    """Of a type's blocks. Places are bytes from the block's beginning; -1: there is none."""

    part: int
    """Elements under one scale."""
    scale: int
    minimum: int
    """Both fp16."""
    low: tuple[int, int, int]
    """Of codes' low bits: where they begin, how many a code has, and of how many bytes in a row the lowest ones come first."""
    high: tuple[int, int, int] = (-1, 1, 1)
    less: int = 0
    """What is taken from codes; of 8 bits, which are signed, they are shifted by it before."""
    scales: str = "none"
    """How those of the parts are packed."""
    scales_at: int = 0
    has_table: bool = False
    """Whether codes are those of IQ4."""


LAYOUTS = {
    "Q4_0": Layout(32, 0, -1, (2, 4, 16), less=8),
    "Q4_1": Layout(32, 0, 2, (4, 4, 16)),
    "Q5_0": Layout(32, 0, -1, (6, 4, 16), (2, 1, 1), less=16),
    "Q5_1": Layout(32, 0, 2, (8, 4, 16), (4, 1, 1)),
    "Q8_0": Layout(32, 0, -1, (2, 8, 32), less=128),
    "Q2_K": Layout(16, 80, 82, (16, 2, 32), scales="4 and 4 bits", scales_at=0),
    "Q3_K": Layout(16, 108, -1, (32, 2, 32), (0, 1, 32), less=4, scales="4 + 2 bits", scales_at=96),
    "Q4_K": Layout(32, 0, 2, (16, 4, 32), scales="6 and 6 bits", scales_at=4),
    "Q5_K": Layout(32, 0, 2, (48, 4, 32), (16, 1, 32), scales="6 and 6 bits", scales_at=4),
    "Q6_K": Layout(16, 208, -1, (0, 4, 64), (128, 2, 32), less=32, scales="8 bits", scales_at=192),
    "IQ4_NL": Layout(32, 0, -1, (2, 4, 16), has_table=True),
    "IQ4_XS": Layout(32, 0, -1, (8, 4, 16), scales="4 + 2 bits in order", scales_at=2, has_table=True),
}
"""See [Note: GGUF blocks] in `gguf_blocks.py`."""


@triton.jit
def _byte(number, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Which byte has the code of that number, of codes of `BITS` bits: the lowest bits of `WIDTH` bytes, then the next ones."""
    return number // (WIDTH * (8 // BITS)) * WIDTH + number % WIDTH


@triton.jit
def _shift(number, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """And which of its bits is the lowest."""
    return number // WIDTH % (8 // BITS) * BITS


@triton.jit
def _field(start, number, mask, BITS: tl.constexpr, WIDTH: tl.constexpr):
    byte = tl.load(start + _byte(number, BITS, WIDTH), mask, other=0).to(tl.int32)
    return byte >> _shift(number, BITS, WIDTH) & ((1 << BITS) - 1)


@triton.jit
def _codes(block, first, within, mask, PLACE: tl.constexpr):
    """The codes of elements first [parts] + within [elements of a part], which have no bits in common: int32."""
    BITS: tl.constexpr = PLACE[1]
    WIDTH: tl.constexpr = PLACE[2]
    byte = (block + PLACE[0] + _byte(first, BITS, WIDTH))[:, None] + _byte(within, BITS, WIDTH)[None, :]
    shift = _shift(first, BITS, WIDTH)[:, None] + _shift(within, BITS, WIDTH)[None, :]
    return tl.load(byte, mask[:, None], other=0).to(tl.int32) >> shift & ((1 << BITS) - 1)


@triton.jit
def _scales(start, part, mask, SCALES: tl.constexpr):
    """Of parts, in units of their blocks' scale and minimum: two of int32."""
    if SCALES == "8 bits":
        return tl.load(start + part, mask, other=0).to(tl.int8, bitcast=True).to(tl.int32), part
    elif SCALES == "4 and 4 bits":
        both = tl.load(start + part, mask, other=0).to(tl.int32)
        return both & 15, both >> 4
    elif SCALES == "4 + 2 bits":
        return (_field(start, part, mask, 4, 8) | _field(start + 8, part, mask, 2, 4) << 4) - 32, part
    elif SCALES == "4 + 2 bits in order":
        return (_field(start + 2, part, mask, 4, 1) | _field(start, part, mask, 2, 1) << 4) - 32, part
    else:
        first, second = tl.load(start + part % 4, mask, other=0), tl.load(start + 4 + part % 4, mask, other=0)
        third = tl.load(start + 8 + part % 4, mask, other=0).to(tl.int32)
        first, second = first.to(tl.int32), second.to(tl.int32)
        scale = tl.where(part < 4, first & 63, third & 15 | first >> 2 & 48)
        return scale, tl.where(part < 4, second & 63, third >> 4 | second >> 2 & 48)


# Kernels take pointers and numbers, no structures: hence the many arguments, which `decode` puts together.
@triton.jit
def _decode(
    blocks, halves, table, out, count, TILE: tl.constexpr, PARTS: tl.constexpr, BYTES: tl.constexpr,
    PART: tl.constexpr, SCALE: tl.constexpr, MINIMUM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    LESS: tl.constexpr, SCALES: tl.constexpr, SCALES_AT: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """PARTS, BYTES: of a block. The rest is a `Layout`."""
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask, within = number < count, tl.arange(0, PART)
    part, block = (number % PARTS).to(tl.int32), blocks + number // PARTS * BYTES
    half = halves + number // PARTS * (BYTES // 2)
    scale = tl.load(half + SCALE // 2, mask, other=0).to(tl.float32)
    code = _codes(block, part * PART, within, mask, LOW)
    if HIGH[0] >= 0:
        code |= _codes(block, part * PART, within, mask, HIGH) << LOW[1]
    if LOW[1] == 8:
        code ^= 128
    value = tl.load(table + code) if HAS_TABLE else (code - LESS).to(tl.float32)
    if SCALES != "none":
        of_part, least = _scales(block + SCALES_AT, part, mask, SCALES)
        scale = scale * of_part.to(tl.float32)
    value = value * scale[:, None]
    if MINIMUM >= 0:
        minimum = tl.load(half + MINIMUM // 2, mask, other=0).to(tl.float32)
        if SCALES == "none":
            value = value + minimum[:, None]
        else:
            value = value - (minimum * least.to(tl.float32))[:, None]
    put(out + (number * PART)[:, None] + within[None, :], value, mask[:, None])


def decode(block_type: str, blocks: Tensor, out: Tensor) -> None:
    """Fills `out` (fp32, bf16 or fp16) with the numbers of `blocks` (uint8), both contiguous. block_type: ggml's word."""
    layout, block = LAYOUTS[block_type], BLOCKS[block_type]
    count, tile = out.numel() // layout.part, ELEMENTS // layout.part
    if count:
        _decode[(triton.cdiv(count, tile),)](
            blocks, blocks.view(torch.float16), iq4_table(out.device), out, count, tile, block.elements // layout.part,
            block.num_bytes, *layout, enable_fp_fusion=False,
        )  # fmt: skip
