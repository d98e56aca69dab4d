"""Noise as a function of (seed, parameter, element), and the one pass over memory that moves weights by it.

z = f(seed, parameter, element) by Philox4x32-10 (Salmon et al. 2011): perturbing, updating and replaying agree whatever the
chunking, the order, the number of threads or the instruction set. Rademacher signs are +1 and -1; normals come from
Box-Muller on 16-bit radii in single fp32 operations, so they are the same bits everywhere too; their relative error is below
2e-5, their largest magnitude 4.86.

A pass reads weights once, brings them up to date and writes them as often as wanted:
    theta = source                                                   in fp32
    theta = round(scale * theta + sum_j coefficient_j z(seed_j))     for every pending group, the sum in fp32 (of signs: in
                                                                     fours, then of these), added once
    target = theta + coefficient z(seed)                             rounded once to the target's dtype
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from finetune_native import noise as _native

KINDS = ("rademacher", "gaussian")
ROUNDINGS = ("exact", "nearest", "stochastic")
INSTRUCTION_SETS: tuple[str, ...] = tuple(_native.available())
"""Code that this processor can run, fastest first; all give the same bits."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Update(NamedTuple):
    """coefficient * z(seed) is added."""

    seed: int
    coefficient: float


class Group(NamedTuple):
    """Updates that are summed before they meet the weights, which are multiplied by `scale` (weight decay) first.

    rounding: what happens to the fp32 result: "exact", nothing; "nearest" and "stochastic", it is rounded to the dtype in
    which the parameter is stored, the latter by random bits of `rounding_seed` (bf16 only).
    """

    scale: float
    updates: tuple[Update, ...]
    rounding: str = "exact"
    rounding_seed: int = 0


class Target(NamedTuple):
    """Where theta + coefficient * z(seed) goes: contiguous fp32, bf16 or fp16, as many elements as the source."""

    tensor: torch.Tensor
    seed: int = 0
    coefficient: float = 0.0


def parameter_key(name: str) -> int:
    """The 64-bit number that stands for a parameter: a hash of its fully qualified name (of its home, when it is tied)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def move(
    kind: str,
    parameter: int,
    source: torch.Tensor,
    pending: Sequence[Group],
    targets: Sequence[Target],
    *,
    first_element: int = 0,
    segments: Sequence[tuple[int, int]] | None = None,
    stored_dtype: torch.dtype = torch.float32,
    instructions: str = INSTRUCTION_SETS[0],
) -> None:
    """The pass of the module's docstring, on the CPU, with PyTorch's number of threads.

    source: contiguous fp32, bf16 or fp16, any alignment; it may be a target itself. It holds the elements of the parameter
    from `first_element` on, or those of `segments`, pairs of (first element, count), one after the other.
    stored_dtype: what the groups' rounding rounds to. Raises ValueError for tensors that do not fit.
    """
    if segments is None:
        segments = [(first_element, source.numel())]
    for tensor in (source, *(target.tensor for target in targets)):
        if tensor.dtype not in _DTYPES or not tensor.is_contiguous() or tensor.numel() != source.numel():
            raise ValueError(
                f"expected contiguous fp32, bf16 or fp16 of {source.numel()} elements, found {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    if sum(count for _, count in segments) != source.numel():
        raise ValueError(f"segments cover {sum(count for _, count in segments)} elements, source has {source.numel()}")
    rounded_to = _DTYPES[stored_dtype]
    _native.run(
        instructions,
        KINDS.index(kind),
        parameter,
        source.data_ptr(),
        _DTYPES[source.dtype],
        segments,
        [
            (group.scale, group.updates, ROUNDINGS.index(group.rounding), rounded_to, group.rounding_seed)
            for group in pending
        ],
        [(t.tensor.data_ptr(), _DTYPES[t.tensor.dtype], t.seed, t.coefficient) for t in targets],
        torch.get_num_threads(),
    )


def sample(kind: str, seed: int, parameter: int, count: int, first_element: int = 0, **options: str) -> torch.Tensor:
    """z itself: fp32 [count], the noise of elements `first_element` and on."""
    z = torch.zeros(count)
    move(kind, parameter, z, (), [Target(z, seed, 1.0)], first_element=first_element, **options)
    return z
