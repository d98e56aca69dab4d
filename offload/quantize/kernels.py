"""Weights to NF4 and to LLM.int8(): the bits of bitsandbytes 0.50's own quantisation on a CPU, and how far they are from the
weights.

[Note: how bitsandbytes quantises]
NF4: a weight times 1 / absmax of its block (of a shorter last block, divided by it), clamped to [-1, 1], gets the lower of two
codes where it is exactly between them. Nested: from the absmax of all blocks their mean is taken; of 256 of these differences
the largest magnitude is kept in fp32, and each difference as one of 256 numbers (dynamic quantisation), found in a table of
65536 equal steps, so not always the nearest. LLM.int8(): weights are rounded to fp16, multiplied by 127 / absmax of their row
and rounded to integers, ties to even. All in fp32, no operation fused but the last one of the table's index.

Sources: Dettmers et al. 2023 (QLoRA), section 3; Dettmers et al. 2022 (LLM.int8()); bitsandbytes, `quantize_4bit`,
`quantize_blockwise` and `int8_vectorwise_quant` for CPUs, `Int8Params`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from finetune_native import Dtype
from finetune_native import quantize as _native
from torch import Tensor

from finetune.offload.weights.formats.bitsandbytes_files import CODES

BLOCK = 64
"""Weights under one absmax, bitsandbytes' default."""
NESTED_BLOCK = 256
"""Blocks under one nested absmax."""
INSTRUCTION_SETS: tuple[str, ...] = tuple(_native.available())
"""Code that this processor can run, fastest first; all give the same bytes."""
DTYPES = {getattr(torch, dtype.name): dtype for dtype in Dtype}
"""Of weights that can be quantised."""

_STEPS = 65536  # of the table by which nested absmax are coded


class Sums(NamedTuple):
    """Of a piece of a matrix. NaN or infinite where one of its weights is."""

    error: float
    """Squares of the quantised weights less the weights."""
    weights: float
    """Squares of the weights."""


class Blocks(NamedTuple):
    """What is kept of every block of a matrix while it is packed: fp32 [blocks] each."""

    absmax: Tensor
    slopes: Tensor
    """Sums of code * (code * absmax - weight): half of what the squared error changes by with absmax."""
    squares: Tensor
    """Sums of code^2."""

    @classmethod
    def of(cls, count: int) -> Blocks:
        """For a matrix of so many weights."""
        return cls(*(torch.empty(-(-count // BLOCK)) for _ in cls._fields))

    def within(self, start: int, stop: int) -> Blocks:
        """Of weights [start, stop), which begin at a block."""
        return Blocks(*(tensor[start // BLOCK : -(-stop // BLOCK)] for tensor in self))


class Nested(NamedTuple):
    """absmax in 8 bits: nested_map()[codes] * absmax of their blocks + offset."""

    codes: Tensor
    """uint8 [blocks]"""
    absmax: Tensor
    """fp32 [blocks / 256]"""
    offset: float
    """An fp32 number."""
    error: float
    """What this adds to the squared error of the matrix."""


def pack_4bit(source: Tensor, packed: Tensor, blocks: Blocks, instructions: str = INSTRUCTION_SETS[0]) -> Sums:
    """NF4. source: fp32, bf16 or fp16 [weights], contiguous, from the beginning of a block on. Fills packed: uint8
    [weights / 2], and `blocks`, which are those of these weights."""
    codes = CODES["nf4"]
    bounds = _bounds()
    of_blocks = tuple(tensor.data_ptr() for tensor in blocks)
    threads = torch.get_num_threads()
    return Sums(
        *_native.pack_4bit(
            instructions, source.data_ptr(), DTYPES[source.dtype], source.numel(), codes, bounds, packed.data_ptr(),
            of_blocks, threads,
        )
    )  # fmt: skip


def pack_int8(source: Tensor, packed: Tensor, absmax: Tensor, instructions: str = INSTRUCTION_SETS[0]) -> Sums:
    """LLM.int8(). source: fp32, bf16 or fp16 [rows, columns], contiguous. Fills packed: int8 [rows, columns], and absmax: fp32
    [rows], which is infinite for a row with a weight that fp16 cannot hold."""
    rows, columns = source.shape
    threads = torch.get_num_threads()
    return Sums(
        *_native.pack_int8(
            instructions, source.data_ptr(), DTYPES[source.dtype], rows, columns, packed.data_ptr(), absmax.data_ptr(),
            threads,
        )
    )  # fmt: skip


def nest(blocks: Blocks) -> Nested:
    """absmax of a whole matrix in 8 bits, finite ones. The mean is that of one thread: PyTorch's on more can differ in its last
    bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        offset = blocks.absmax.mean()
    finally:
        torch.set_num_threads(threads)
    count = blocks.absmax.numel()
    codes, absmax = torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // NESTED_BLOCK))
    of_blocks = tuple(tensor.data_ptr() for tensor in blocks)
    tables = nested_map().data_ptr(), _table().data_ptr()
    error = _native.nest(of_blocks, count, float(offset), *tables, codes.data_ptr(), absmax.data_ptr())
    return Nested(codes, absmax, float(offset), error)


@cache
def _bounds() -> tuple[float, ...]:
    """Between the codes of NF4, rounded to fp32."""
    codes = torch.tensor(CODES["nf4"])
    return tuple(((codes[:-1] + codes[1:]) / 2).tolist())


@cache
def nested_map() -> Tensor:
    """The 256 numbers of the signed dynamic type, fp32, ascending: for each of 7 powers of ten, twice as many as for the one
    below, in the middle of equal steps; 0 and 1 (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization")."""
    positive = []
    for exponent in range(7):
        steps = torch.linspace(0.1, 1, 2**exponent + 1)
        positive += (10 ** (exponent - 6) * ((steps[:-1] + steps[1:]) / 2)).tolist()
    return torch.tensor(sorted([*positive, *(-number for number in positive), 0.0, 1.0]))


@cache
def _table() -> Tensor:
    """Which number of `nested_map` is the nearest to each of 65536 steps from -1 to 1: uint8."""
    numbers = nested_map()
    steps = torch.arange(_STEPS).float().mul_(2).div_(_STEPS - 1).add_(-1)
    return torch.bucketize(steps, (numbers[:-1] + numbers[1:]) * 0.5).to(torch.uint8)
