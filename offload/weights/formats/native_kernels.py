"""Decoders of packed weights on CPUs, in C++ (`csrc/decode.h`): the same single fp32 operations as the portable ones.

number = (value(code) - zero) * scale * factor in fp32, every operation rounded; the result is rounded to one dtype and
converted to the target's: the bits of these operations in PyTorch, one after the other, on every instruction set (of NaN only
that it is one). Nothing is allocated. Targets that are larger than the caches are written past them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from finetune_native import Dtype
from finetune_native import blocks as _blocks
from finetune_native import decode as _native
from torch import Tensor

from finetune.offload.files.gguf_file import BLOCKS

INSTRUCTION_SETS: tuple[str, ...] = tuple(_native.available())
"""Code that this processor can run, fastest first; all give the same bits."""

_DTYPES = {getattr(torch, dtype.name): dtype for dtype in Dtype}
_CODES = dict(_native.Code.__members__)
_CODE_DTYPES = {
    name: torch.uint8 if name.startswith("four_bit") else getattr(torch, name) for name in _CODES
}
_SCALE_FORMATS = {
    getattr(torch, name): value for name, value in _native.ScaleFormat.__members__.items() if name != "nested"
}


class Codes(NamedTuple):
    """What lies in memory.

    kind: four_bit (two codes a byte, the first in its high half), four_bit_low (in its low half), int8, float8_e4m3fn,
    float8_e5m2; bfloat16 and float16, which have no scales. data: contiguous, uint8 for four bits. table: of four bits, the
    number of every code. odd: the first number is the second of its byte (of one row).
    """

    kind: str
    data: Tensor
    table: tuple[float, ...] = ()
    odd: bool = False


class Nested(NamedTuple):
    """Scales that are bytes b: map[b] * outer[index / group] + offset. map: fp32 [256]; outer: fp32, contiguous.

    into_group: scales of the first outer one that come before these.
    """

    map: Tensor
    outer: Tensor
    group: int
    offset: float
    into_group: int = 0


class Scales(NamedTuple):
    """data: fp32, bf16, fp16 or e8m0, uint8 where nested; contiguous, row after row. rows, columns: of the numbers under one
    scale.

    into_group: columns of the first scale that come before the matrix (of one row). zeros: of four bits, the zero points, fp32
    in the shape of `data`.
    """

    data: Tensor
    columns: int
    rows: int = 1
    into_group: int = 0
    nested: Nested | None = None
    zeros: Tensor | None = None


def decode(
    codes: Codes,
    scales: Scales | None,
    target: Tensor,
    rounded: torch.dtype | None = None,
    factor: float = 1.0,
    instructions: str = INSTRUCTION_SETS[0],
) -> Tensor:
    """Fills `target` ([columns] or [rows, columns], contiguous; fp32, bf16 or fp16) and gives it back, on PyTorch's number of
    threads.

    rounded: what numbers are rounded to before they are converted; None: to the target's dtype alone. factor: of int8 only.
    Raises ValueError for what does not fit.
    """
    if not target.numel():
        return target
    rows, columns = (1, *target.shape)[-2:]
    _check(codes, scales, target, rows, columns)
    nested = scales.nested if scales else None
    _native.run(
        instructions,
        _CODES[codes.kind],
        codes.data.data_ptr(),
        codes.odd,
        rows,
        columns,
        codes.table,
        _scale_arguments(scales, columns),
        (nested.map.data_ptr(), nested.outer.data_ptr(), nested.group, nested.into_group, nested.offset)
        if nested
        else (0, 0, 1, 0, 0.0),
        scales.zeros.data_ptr() if scales and scales.zeros is not None else 0,
        factor,
        _DTYPES[rounded or torch.float32],
        target.data_ptr(),
        _DTYPES[target.dtype],
        torch.get_num_threads(),
    )
    return target


def decode_blocks(block_type: str, blocks: Tensor, target: Tensor, instructions: str = INSTRUCTION_SETS[0]) -> Tensor:
    """Fills `target` (contiguous; fp32, bf16 or fp16) with the numbers of GGUF's blocks and gives it back, on PyTorch's number
    of threads. The bits are those of `finetune.offload.weights.formats.gguf_blocks`.

    block_type: ggml's word. blocks: uint8, contiguous. Raises ValueError for what does not fit.
    """
    kind = _blocks.Type.__members__[block_type]
    elements, num_bytes = BLOCKS[block_type][1:]
    count = target.numel() // elements
    for tensor, dtypes, size in ((blocks, (torch.uint8,), count * num_bytes), (target, tuple(_DTYPES), count * elements)):
        if tensor.dtype not in dtypes or not tensor.is_contiguous() or tensor.numel() != size or not tensor.is_cpu:
            raise ValueError(
                f"expected {size} contiguous numbers of {' or '.join(map(str, dtypes))} on the CPU for {count} blocks of "
                f"{block_type}, found {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    _blocks.run(
        instructions, kind, blocks.data_ptr(), count, target.data_ptr(), _DTYPES[target.dtype], torch.get_num_threads()
    )
    return target


def _scale_arguments(scales: Scales | None, columns: int) -> tuple:
    if scales is None:
        return _native.ScaleFormat.float32, 0, 1, columns, 0
    data, nested = scales.data, scales.nested
    form = _native.ScaleFormat.nested if nested else _SCALE_FORMATS[data.dtype]
    return form, data.data_ptr(), scales.rows, scales.columns, scales.into_group


def _check(codes: Codes, scales: Scales | None, target: Tensor, rows: int, columns: int) -> None:
    dtype = _CODE_DTYPES[codes.kind]
    has_pairs = codes.kind.startswith("four_bit")
    needed = (rows * columns + codes.odd + 1) // 2 if has_pairs else rows * columns
    tensors = [(codes.data, (dtype,), needed), (target, tuple(_DTYPES), rows * columns)]
    if (scales is None) != (dtype in (torch.bfloat16, torch.float16)):
        raise ValueError(f"{codes.kind} with scales {scales}")
    if scales is not None:
        if scales.zeros is not None and not has_pairs:
            raise ValueError(f"zero points of {codes.kind}")
        if min(scales.rows, scales.columns, scales.nested.group if scales.nested else 1) < 1:
            raise ValueError(f"a scale of {scales.rows} rows and {scales.columns} columns")
        groups = -(-rows // scales.rows) * -(-(scales.into_group + columns) // scales.columns)
        nested = scales.nested
        tensors.append((scales.data, (torch.uint8,) if nested else tuple(_SCALE_FORMATS), groups))
        if scales.zeros is not None:
            tensors.append((scales.zeros, (torch.float32,), groups))
        if nested:
            tensors.append((nested.map, (torch.float32,), 256))
            tensors.append((nested.outer, (torch.float32,), -(-(nested.into_group + groups) // nested.group)))
    for tensor, dtypes, count in tensors:
        fits = tensor.dtype in dtypes and tensor.is_contiguous() and tensor.numel() >= count
        if not fits or not tensor.is_cpu:
            raise ValueError(
                f"expected {count} contiguous numbers of {' or '.join(map(str, dtypes))} on the CPU, found {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
