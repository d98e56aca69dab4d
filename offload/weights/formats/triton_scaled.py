"""The decoder on accelerators, in Triton, of matrices with a grid of scales: GPTQ, AWQ, compressed-tensors, FP8, MXFP4, int8.

number = (value(code) - zero) * scale in fp32, rounded to one dtype, times a factor, and converted to the target's: the same
single operations as the portable decoders, the same bits. Nothing may be fused (`enable_fp_fusion=False`). A program decodes
some rows and columns. What has one scale (a *run* of neighbouring columns) is a dimension of its own: the scale, the zero
point and, where it holds columns, the word are read once for all of it.
Imported only where there is an accelerator: PyTorch for CUDA, ROCm and Intel GPUs brings Triton along.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.offload.devices.triton_rounding import ROUNDED_TO, put, rounded

WORD_BITS = 32
_LONGEST_RUN = 16
_TILES = {False: (4, 512), True: (64, 64)}
"""Rows and columns of a program: whether columns are in memory what rows are in the target -> both."""


class Codes(NamedTuple):
    """data: [rows, units of columns], of any strides.

    form: "int8", "e4m3" (uint8): a number a byte. "columns", "e2m1" (of 4 bits): neighbouring columns in words, int32, lowest
    bits first. "rows": in words of AWQ's order ([Note: AWQ's order] in `awq.py`), data is [words of rows, columns].
    bits: of a code in a word: 2, 3, 4 or 8; 3 go on in the next word. less: what is taken from each integer.
    """

    data: Tensor
    form: str
    bits: int = 8
    less: int = 0


class Scales(NamedTuple):
    """data: fp32, bf16 or fp16, of e2m1 exponents in uint8 [rows of scales, groups], of any strides. columns, rows: of the
    numbers under one scale.

    zeros: like `data`, of its strides too ("plain"), or integers in words of rows, int32 [words, groups] ("words", "less one":
    see [Note: GPTQ's zero points] in `gptq.py`). groups: int32 [columns], of each column its own.
    """

    data: Tensor
    columns: int
    rows: int = 1
    zeros: Tensor | None = None
    zeros_form: str = "none"
    groups: Tensor | None = None


@triton.jit
def _value(code, FORM: tl.constexpr, LESS: tl.constexpr):
    """Of int32 codes, fp32. The bits of small floats, moved to where fp32 has them, are their values by a power of two."""
    if FORM == "e4m3":
        bits = (code & 127) << 20 | (code & 128) << 24
        return tl.where((code & 127) == 127, float("nan"), bits.to(tl.float32, bitcast=True) * 1.329227995784916e36)  # 2^120
    elif FORM == "e2m1":  # twice their values: by 2^127
        return ((code & 7) << 22 | (code & 8) << 28).to(tl.float32, bitcast=True) * 1.7014118346046923e38
    else:
        return (code - LESS).to(tl.float32)


@triton.jit
def _scale(scales, mask, FORM: tl.constexpr):
    scale = tl.load(scales, mask, other=0)
    if FORM == "e2m1":  # half of 2^(byte - 127): of 255 too it is finite, so that zeros stay zeros
        byte = scale.to(tl.int32)
        return tl.where(byte > 1, (byte - 1) << 23, (1 << 21) << (byte & 1)).to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)


@triton.jit
def _word(start, bit, stride, mask, BITS: tl.constexpr, ONES: tl.constexpr):
    """The words that have a field at each bit of a row of words, plus `ONES`. start: where the row begins."""
    word = tl.load(start + (bit // 32).to(tl.int64) * stride, mask, other=0) + ONES
    if BITS == 3:
        after = tl.load(start + ((bit + 2) // 32).to(tl.int64) * stride, mask, other=0)
        return (word.to(tl.int64) & 0xFFFFFFFF) | (after.to(tl.int64) << 32)
    else:
        return word


@triton.jit
def _zeros(start, bit, shift, stride, mask, BITS: tl.constexpr, LESS: tl.constexpr, FORM: tl.constexpr):
    """Zero points out of words, less what is taken from codes too: fp32. See [Note: GPTQ's zero points] in `gptq.py`."""
    HAS_ONE_LESS: tl.constexpr = FORM == "less one"
    ONES: tl.constexpr = 0x55555555 if BITS == 2 else 0x11111111 if BITS == 4 else 0x01010101
    zero = _word(start, bit, stride, mask, BITS, ONES if HAS_ONE_LESS and BITS != 3 else 0) >> shift
    if HAS_ONE_LESS and BITS == 3:
        zero += 1
    return ((zero & ((1 << BITS) - 1)).to(tl.int32) - LESS).to(tl.float32)


# Kernels take pointers and numbers, no structures: hence the many arguments, which `decode` puts together.
@triton.jit
def _decode(
    codes, scales, zeros, groups, out, first: tl.int64, rows, columns, height, width, factor,
    code_row, code_column, scale_row, scale_group, zero_row, zero_group, out_row, out_column,
    FORM: tl.constexpr, BITS: tl.constexpr, LESS: tl.constexpr, ZEROS: tl.constexpr, HAS_GROUPS: tl.constexpr,
    ROUNDED_TO: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = first + place
    column = (tl.program_id(1) * RUNS + tl.arange(0, RUNS)) * RUN
    within = tl.arange(0, RUN)
    mask = (place < rows)[:, None] & (column < columns)[None, :]
    each = (place < rows)[:, None, None] & ((column[:, None] + within[None, :]) < columns)[None, :, :]
    bit, shift = row * BITS, (row * BITS % 32).to(tl.int32)
    if FORM == "rows":
        shift = ((row % 2) * 16 + (row % 8 // 2) * 4).to(tl.int32)

    if FORM == "columns" or FORM == "e2m1":
        of_row = codes + (row * code_row)[:, None]
        word = _word(of_row, (column * BITS)[None, :], code_column, mask, BITS, 0)
        code = word[:, :, None] >> ((column * BITS % 32)[:, None] + (within * BITS)[None, :])[None, :, :]
        code = (code & ((1 << BITS) - 1)).to(tl.int32)
    else:
        unit = row if FORM != "rows" else row * BITS // 32
        at = (column[:, None] + within[None, :]).to(tl.int64) * code_column
        code = tl.load(codes + ((unit * code_row)[:, None, None] + at[None, :, :]), each, other=0).to(tl.int32)
        if FORM == "rows":
            code = (code >> shift[:, None, None]) & ((1 << BITS) - 1)
    value = _value(code, FORM, LESS)

    if HAS_GROUPS:
        group = tl.load(groups + column, column < columns, other=0).to(tl.int64)
    else:
        group = (column // width).to(tl.int64)
    at = (row // height * scale_row)[:, None] + (group * scale_group)[None, :]
    if ZEROS == "plain":
        value = rounded(value - tl.load(zeros + at, mask, other=0).to(tl.float32)[:, :, None], ROUNDED_TO)
    elif ZEROS != "none":
        of_group = zeros + (group * zero_group)[None, :]
        zero = _zeros(of_group, bit[:, None], shift[:, None], zero_row, mask, BITS, LESS, ZEROS)
        value = value - zero[:, :, None]
    numbers = rounded(value * _scale(scales + at, mask, FORM)[:, :, None], ROUNDED_TO) * factor
    at = (column[:, None] + within[None, :]).to(tl.int64) * out_column
    put(out + (place.to(tl.int64) * out_row)[:, None, None] + at[None, :, :], numbers, each)


def decode(
    codes: Codes,
    scales: Scales,
    out: Tensor,
    rounded_to: torch.dtype = torch.float32,
    factor: float = 1.0,
    first: int = 0,
) -> None:
    """Fills `out` [rows, columns], fp32, bf16 or fp16 of any strides, with rows [first, first + rows) of codes and scales.

    rounded_to: what numbers are rounded to before the factor and the target's dtype.
    """
    if not out.numel():
        return
    rows, columns = out.shape
    zeros = scales.data if scales.zeros is None else scales.zeros
    longest = _LONGEST_RUN
    if codes.form in ("columns", "e2m1"):  # a run's codes lie in one word
        longest = WORD_BITS // codes.bits if codes.bits != 3 else 1
    run = 1 if scales.groups is not None else longest if scales.columns >= columns else gcd(scales.columns, longest)
    tile_rows, tile_columns = _TILES[codes.data.stride(0) == 1 or codes.form == "rows" or out.stride(0) == 1]
    _decode[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))](
        codes.data, scales.data, zeros, codes.data if scales.groups is None else scales.groups, out,
        first, rows, columns, scales.rows, scales.columns, factor,
        *codes.data.stride(), *scales.data.stride(), *zeros.stride(), *out.stride(),
        FORM=codes.form, BITS=codes.bits, LESS=codes.less, ZEROS=scales.zeros_form, HAS_GROUPS=scales.groups is not None,
        ROUNDED_TO=ROUNDED_TO[rounded_to], RUN=run, ROWS=tile_rows, RUNS=tile_columns // run, enable_fp_fusion=False,
        num_warps=tile_rows * tile_columns // 512,
    )  # fmt: skip
