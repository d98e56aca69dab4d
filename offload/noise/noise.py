"""Noise as a function of (seed, parameter, element), and the one pass over memory that moves weights by it.

z = f(seed, parameter, element) by Philox4x32-10 (Salmon et al. 2011): perturbing, updating and replaying agree whatever the
chunking, the order, the number of threads or the instruction set. Rademacher signs are +1 and -1; normals come from
Box-Muller on 16-bit radii in single fp32 operations, so they are the same bits everywhere too; their relative error is below
2e-5, their largest magnitude 4.86.

A pass reads weights once, brings them up to date and writes them as often as wanted:
    theta = source                                                   in fp32
    theta = round(scale * theta + sum_j coefficient_j z(seed_j))     for every pending group, the sum in fp32 (of signs: in
                                                                     fours, then of these), added once
    theta = max(theta, least)                                        after each, where there is a least value
    target = theta + coefficient z(seed)                             rounded once to the target's dtype
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from finetune_native import Dtype
from finetune_native import noise as _native

from finetune.memory.device_kinds import DEVICE_KINDS

ROUNDINGS = tuple(_native.Rounding.__members__)
INSTRUCTION_SETS: tuple[str, ...] = tuple(_native.available())
"""Code that this processor can run, fastest first; all give the same bits."""

_DTYPES = {getattr(torch, dtype.name): dtype for dtype in Dtype}
_KINDS = dict(_native.Kind.__members__)
_PRODUCT_ELEMENTS = 1 << 22


class Noise(NamedTuple):
    """kind: rademacher, gaussian or low_rank. The last, for a matrix [rows, columns] (leading dimensions count as rows):
    z = U V^T / sqrt(rank) with normals U [rows, rank] of the update's own seed and V [columns, rank] of a seed that a group's
    updates share; what has one dimension gets normals. (LOZO, Chen et al. 2024, without the root: its epsilon times the root
    is ours.)
    """

    kind: str
    rank: int = 0


class Update(NamedTuple):
    """coefficient * z(seed) is added."""

    seed: int
    coefficient: float


class Group(NamedTuple):
    """Updates that are summed before they meet the weights, which are multiplied by `scale` (weight decay) first.

    rounding: what happens to the fp32 result: "exact", nothing; "nearest" and "stochastic", it is rounded to the dtype in
    which the parameter is stored, the latter by random bits of `rounding_seed` (bf16 only, and not for low_rank).
    shared_seed: of V, where noise is of low rank.
    """

    scale: float
    updates: tuple[Update, ...]  # in the order in which they are added
    rounding: str = "exact"
    rounding_seed: int = 0
    shared_seed: int = 0


class Target(NamedTuple):
    """Where theta + coefficient * z(seed) goes: contiguous fp32, bf16 or fp16, as many elements as the source.

    shared_seed: of V, where noise is of low rank.
    """

    tensor: torch.Tensor  # is written
    seed: int = 0
    coefficient: float = 0.0
    shared_seed: int = 0


class Parameter(NamedTuple):
    """Whose noise it is. key: `parameter_key` of its name. columns: its last dimension, 0 where it has one dimension.
    stored_dtype: what the groups' rounding rounds to. least: what groups make smaller is raised to it."""

    key: int
    columns: int = 0
    stored_dtype: torch.dtype = torch.float32
    least: float | None = None


# Noise of U and V is unlike that of the parameter itself.
_ROW_KEY, _COLUMN_KEY = 0x5555555555555555, 0xAAAAAAAAAAAAAAAA


def parameter_key(name: str) -> int:
    """The 64-bit number that stands for a parameter: a hash of its fully qualified name (of its home, when it is tied)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def move(
    noise: Noise,
    parameter: Parameter,
    source: torch.Tensor,
    pending: Sequence[Group],
    targets: Sequence[Target],
    elements: int | Sequence[tuple[int, int]] = 0,
    instructions: str = INSTRUCTION_SETS[0],
) -> None:
    """The pass of the module's docstring: on the CPU with PyTorch's number of threads, elsewhere on the tensors' device.

    source: contiguous fp32, bf16 or fp16, any alignment; it may be a target itself. elements: which ones of the parameter it
    holds: those from this one on, or, on the CPU, these segments, pairs of (first element, count), one after the other.
    Raises ValueError for tensors that do not fit.
    """
    segments = [(elements, source.numel())] if isinstance(elements, int) else elements
    for tensor in (source, *(target.tensor for target in targets)):
        if tensor.dtype not in _DTYPES or not tensor.is_contiguous() or tensor.numel() != source.numel():
            raise ValueError(
                f"expected contiguous fp32, bf16 or fp16 of {source.numel()} elements, found {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    if sum(count for _, count in segments) != source.numel():
        raise ValueError(f"segments cover {sum(count for _, count in segments)} elements, source has {source.numel()}")
    if parameter.least is not None and pending:
        theta = targets[0].tensor if targets[0].tensor.dtype == torch.float32 else torch.empty_like(source, dtype=torch.float32)
        for group in pending:
            move(noise, parameter._replace(least=None), source, [group], [Target(theta)], elements, instructions)
            source = theta.clamp_(min=parameter.least)
        pending = ()
    if noise.kind == "low_rank" and parameter.columns:
        _move_low_rank(noise, parameter, source, pending, targets, segments)
        return
    kind = "gaussian" if noise.kind == "low_rank" else noise.kind
    if _kernels_for(source) == "triton":
        from finetune.offload.noise import triton_kernels

        triton_kernels.move(kind, parameter, source, pending, targets, segments[0][0])
        return
    rounded_to = _DTYPES[parameter.stored_dtype]
    _native.run(
        instructions, _KINDS[kind], parameter.key, source.data_ptr(), _DTYPES[source.dtype], segments,
        [(g.scale, g.updates, _native.Rounding[g.rounding], rounded_to, g.rounding_seed) for g in pending],
        [(t.tensor.data_ptr(), _DTYPES[t.tensor.dtype], t.seed, t.coefficient) for t in targets],
        torch.get_num_threads(),
    )  # fmt: skip


def _kernels_for(tensor: torch.Tensor) -> str | None:
    return DEVICE_KINDS[tensor.device.type].kernels


def sample(kind: str, seed: int, key: int, count: int, first_element: int = 0, **options: str) -> torch.Tensor:
    """z itself, of a kind that is not low_rank: fp32 [count], the noise of elements `first_element` and on."""
    z = torch.zeros(count)
    move(Noise(kind), Parameter(key), z, (), [Target(z, seed, 1.0)], first_element, **options)
    return z


def add_rows(noise: Noise, key: int, total: torch.Tensor, updates: Sequence[Update], first_row: int = 0) -> None:
    """Adds coefficient * U(seed) to `total`, fp32 [rows, rank], the rows from `first_row` on; one update after the other."""
    if updates:
        groups = [Group(1.0, (update,)) for update in updates]
        move(Noise("gaussian"), Parameter(key ^ _ROW_KEY), total, groups, [Target(total)], first_row * noise.rank)


def divided_by_root(noise: Noise, u: torch.Tensor) -> torch.Tensor:
    """U / sqrt(rank)."""
    return u * torch.tensor(noise.rank, dtype=torch.float32).rsqrt()


def shared_columns(noise: Noise, key: int, seed: int, columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """V^T of a matrix with so many columns: fp32 [rank, columns]."""
    v = torch.zeros(columns * noise.rank, device=device)
    move(Noise("gaussian"), Parameter(key ^ _COLUMN_KEY), v, (), [Target(v, seed, 1.0)])
    return v.view(columns, noise.rank).t().contiguous()


def _move_low_rank(
    noise: Noise,
    parameter: Parameter,
    source: torch.Tensor,
    pending: Sequence[Group],
    targets: Sequence[Target],
    segments: Sequence[tuple[int, int]],
) -> None:
    key, columns = parameter.key, parameter.columns
    columns_of = {
        seed: shared_columns(noise, key, seed, columns) for seed in {x.shared_seed for x in (*pending, *targets)}
    }
    if _kernels_for(source) != "native":
        factors = [
            [(u.view(-1, noise.rank), columns_of[x.shared_seed]) for u, x in zip(rows, of, strict=True)]
            for rows, of in zip(
                _rows_of(noise, key, columns, pending, targets, segments), (pending, targets), strict=True
            )
        ]
        _add_products(source, pending, targets, *factors, parameter)
        return
    whole_rows = all(first % columns == 0 and count % columns == 0 for first, count in segments)
    at = 0
    for band in [segments] if whole_rows and segments else [[segment] for segment in segments]:
        count = sum(count for _, count in band)
        # Kept until the pass is over, which holds their addresses.
        group_rows, target_rows = _rows_of(noise, key, columns, pending, targets, band)
        _native.run_low_rank(
            source.data_ptr() + at * source.itemsize, _DTYPES[source.dtype], band[0][0] % columns, count, columns, noise.rank,
            [
                (group.scale, u.data_ptr(), columns_of[group.shared_seed].data_ptr(),
                 _DTYPES[parameter.stored_dtype if group.rounding == "nearest" else torch.float32])
                for group, u in zip(pending, group_rows, strict=True)
            ],
            [
                (target.tensor.data_ptr() + at * target.tensor.itemsize, _DTYPES[target.tensor.dtype], u.data_ptr(),
                 columns_of[target.shared_seed].data_ptr(), target.coefficient)
                for target, u in zip(targets, target_rows, strict=True)
            ],
            torch.get_num_threads(),
        )  # fmt: skip
        at += count


def _rows_of(
    noise: Noise,
    key: int,
    columns: int,
    pending: Sequence[Group],
    targets: Sequence[Target],
    segments: Sequence[tuple[int, int]],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The sum of coefficient * U(seed) / sqrt(rank) of every group, and of every target with 1 as its coefficient: fp32
    [rows * rank] each, of the rows that `segments` lie in."""
    rank = noise.rank
    of_rows = [(first // columns * rank, -(-(first % columns + n) // columns) * rank) for first, n in segments]

    def rows(updates: Sequence[Update]) -> torch.Tensor:
        u = torch.zeros(sum(n for _, n in of_rows))
        move(Noise("gaussian"), Parameter(key ^ _ROW_KEY), u, [Group(1.0, tuple(updates))], [Target(u)], of_rows)
        return divided_by_root(noise, u)

    return [rows(group.updates) for group in pending], [rows([Update(target.seed, 1.0)]) for target in targets]


def _add_products(
    source: torch.Tensor,
    pending: Sequence[Group],
    targets: Sequence[Target],
    group_factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    target_factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    parameter: Parameter,
) -> None:
    """The pass for noise of low rank in PyTorch, on any device, for whole rows: the operations of csrc/low_rank.cpp.

    factors: U, fp32 [rows, rank], and V, fp32 [rank, columns], of every group and target.
    """

    def product(factors: tuple[torch.Tensor, torch.Tensor], rows: slice) -> torch.Tensor:
        u, v = factors[0][rows].to(source.device), factors[1].to(source.device)
        z = u[:, :1] * v[0]
        for k in range(1, v.shape[0]):
            z = z + u[:, k : k + 1] * v[k]
        return z

    columns = parameter.columns
    num_rows = source.numel() // columns
    step = max(1, _PRODUCT_ELEMENTS // columns)  # bounds what is held in fp32
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        theta = source.view(num_rows, columns)[rows].float()
        for group, factors in zip(pending, group_factors, strict=True):
            theta = theta * torch.tensor(group.scale, dtype=torch.float32) + product(factors, rows)
            if group.rounding == "nearest":
                theta = theta.to(parameter.stored_dtype).float()
        for target, factors in zip(targets, target_factors, strict=True):
            moved = theta
            if target.coefficient:
                moved = theta + torch.tensor(target.coefficient, dtype=torch.float32) * product(factors, rows)
            target.tensor.view(num_rows, columns)[rows].copy_(moved)
