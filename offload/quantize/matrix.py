"""One matrix in memory packed, and what is stored of it beside its packed numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, isnan, prod
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.quantize.kernels import Blocks, Sums, nest, pack_4bit, pack_int8
from finetune.offload.quantize.outline import NewTensor, is_state, state


class Statistics(NamedTuple):
    """What is stored of a packed matrix, less its numbers."""

    tensors: dict[str, Tensor]
    """By name: their bytes, uint8."""
    states: dict[str, bytes]
    """By name: what says how it is packed, of a length that is known only now."""
    error: float
    """What they add to the squared error of the matrix: nested scales are not exact."""


def store_statistics(entry: TensorEntry, stored: Sequence[NewTensor], statistics: Blocks | Tensor) -> Statistics:
    """Of the packed weight `entry`. stored: as `outline.stored_tensors` has it. statistics: of nf4 all blocks; of int8 the
    largest magnitude of every row.

    Raises CheckpointError where their mean is beyond fp32.
    """
    is_4bit = isinstance(statistics, Blocks)
    is_nested = any(tensor.name.endswith(".nested_absmax") for tensor in stored)
    nested = nest(statistics) if is_nested else None
    if nested is not None:
        if not isfinite(nested.offset):  # the mean of numbers at fp32's end
            _refuse(entry, is_4bit)
        values = {".absmax": nested.codes, ".nested_absmax": nested.absmax}
    else:
        values = {".absmax": statistics.absmax} if is_4bit else {".SCB": statistics}
    tensors, states = {}, {}
    for tensor in stored[1:]:
        if is_state(tensor):
            states[tensor.name] = state(entry, None if nested is None else nested.offset)
        elif tensor.content is not None:
            tensors[tensor.name] = torch.frombuffer(bytearray(tensor.content), dtype=torch.uint8)
        else:
            tensors[tensor.name] = values[tensor.name[tensor.name.rindex(".") :]].view(torch.uint8)
    return Statistics(tensors, states, 0.0 if nested is None else nested.error)


def check_packed(entry: TensorEntry, sums: Sums, absmax: Tensor, is_4bit: bool) -> None:
    """Raises CheckpointError for a piece of the weight `entry` that held a number that is not finite, or that fp16 cannot hold
    where int8 goes by way of it. sums, absmax: what the kernel has found."""
    if isnan(sums.weights) or not bool(absmax.isfinite().all()):
        _refuse(entry, is_4bit)


def pack_matrix(entry: TensorEntry, stored: Sequence[NewTensor], weight: Tensor) -> tuple[Statistics, Sums]:
    """`weight`, contiguous, in fp32, bf16 or fp16, packed as a whole: all that is stored of it, and how far it is off.

    entry: what the weight is called, and its dtype and shape. stored: as `outline.stored_tensors` has it.
    Raises CheckpointError as `check_packed`.
    """
    is_4bit = stored[0].dtype == "U8"
    if is_4bit:
        packed, statistics = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8), Blocks.of(prod(entry.shape))
        sums, absmax = pack_4bit(weight.view(-1), packed, statistics), statistics.absmax
    else:
        packed, statistics = torch.empty(entry.shape, dtype=torch.int8), torch.empty(entry.shape[0])
        sums, absmax = pack_int8(weight, packed, statistics), statistics
    check_packed(entry, sums, absmax, is_4bit)
    found = store_statistics(entry, stored, statistics)
    numbers = {stored[0].name: packed.view(-1).view(torch.uint8)}
    return Statistics(numbers | found.tensors, found.states, found.error), Sums(sums.error + found.error, sums.weights)


def _refuse(entry: TensorEntry, is_4bit: bool) -> NoReturn:
    largest = "" if is_4bit else " or a number beyond 65504, which int8 cannot take (use nf4)"
    raise CheckpointError(
        f"{entry.path}: tensor '{entry.name}' holds infinity or NaN{largest}: bring the file from its source again"
    )
