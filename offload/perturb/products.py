"""Low-rank noise met in products: a linear layer gives y = scale x W^T + (x V) U^T, and W stays as it lies in its slot.

A step's variants of a matrix are  scale W + sum_g A_g V_g^T + coefficient U V^T / sqrt(rank),  with A_g the sum of a pending
group's U, kept in fp32 between steps. Nothing of the matrix's size is made: a pair of variants shares every matrix, and a
layer pays for two thin products. (LOZO, Chen et al. 2024, whose factors stand in the same places.) The bits are not those of
perturbed weights, which are rounded to the dtype that computes with their noise in them; here what is added to W is rounded
by itself and keeps its own precision.

What is no weight of an `nn.Linear` (norms, biases, stacked experts) is perturbed as ever, see
`finetune.offload.perturb.variants`.

[Note: packed weights under products]
W may be packed: it is decoded for its product, and its bytes never change. Nothing can be folded into them, so the factors of
every group stay in memory for the whole run, and what is added is that of the decoded weight stored plainly, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from math import prod
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from finetune.offload.noise import noise
from finetune.offload.weights.binding import LinearInSlot
from finetune.offload.weights.parts import ModelParts


class Factors(NamedTuple):
    """What one variant makes of a matrix W [rows, columns]: scale W + up @ down, both in the dtype that computes.

    down: [K, columns]; up: [rows, K]; None where nothing is added.
    """

    scale: float
    down: torch.Tensor | None
    up: torch.Tensor | None


NO_FACTORS = Factors(1.0, None, None)


class PerturbedProduct(LinearInSlot):
    """The forward of a linear layer under `factors`: x [..., columns] to [..., rows]."""

    __slots__ = ("factors",)

    def __init__(self, module: nn.Linear) -> None:
        """module: whose bias is added."""
        super().__init__(module)
        self.factors = NO_FACTORS

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return perturbed_product(x, self.numbers(x.dtype), self.factors, self.module.bias)


def perturbed_product(
    x: torch.Tensor, weight: torch.Tensor, factors: Factors, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., columns] times the variant of `weight` [rows, columns] that `factors` describe, plus bias [rows]."""
    rows = x.reshape(-1, x.shape[-1])
    y = functional.linear(rows, weight.to(rows.dtype))
    scale, down, up = factors
    if up is not None:
        y.addmm_(rows @ down.t(), up.t(), beta=scale)
    elif scale != 1.0:
        y *= scale
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], y.shape[-1])


class MatrixNoise:
    """Factors of one matrix, or of some of its rows, for any variant. The sums of pending groups stay in memory, and a step's
    updates are added to them one by one: they are the same however many steps came in one process."""

    def __init__(
        self,
        kind: noise.Noise,
        key: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        most_groups: int,
        first_row: int = 0,
    ) -> None:
        """shape: of these rows, which are the matrix's from `first_row` on. most_groups: that are ever pending."""
        self._kind = kind
        self._key = key
        self._rows, self._columns = shape
        self._dtype = dtype
        self._device = device
        self._first_row = first_row
        self._summed: tuple[noise.Group, ...] = ()
        self._sums = torch.zeros(most_groups, self._rows, kind.rank, device=device)
        self._visit: tuple[tuple[int, int], torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def factors(self, pending: Sequence[noise.Group], seed: int, coefficient: float, shared_seed: int) -> Factors:
        """Of the variant with so much noise on top of `pending`; groups are rounded when they are folded, not here."""
        scale = prod(group.scale for group in pending)
        if not coefficient:
            seed = shared_seed = 0
        if self._visit is None or self._visit[0] != (seed, shared_seed):
            probe = self._probe(seed) if coefficient else torch.empty(self._rows, 0, device=self._device)
            sums = self._group_rows(pending)
            seeds = [group.shared_seed for group in pending] + [shared_seed] * bool(coefficient)
            self._visit = (seed, shared_seed), self._columns_of(seeds), sums, probe
        _, down, sums, probe = self._visit
        if not down.numel():
            return Factors(scale, None, None)
        return Factors(scale, down, torch.cat([sums, (probe * coefficient).to(self._dtype)], dim=1))

    def forget(self) -> None:
        """The visit is over: the next one may have other updates pending."""
        self._visit = None

    def _probe(self, seed: int) -> torch.Tensor:
        """U(seed) / sqrt(rank): fp32 [rows, rank]."""
        u = torch.zeros(self._rows, self._kind.rank, device=self._device)
        noise.add_rows(self._kind, self._key, u, [noise.Update(seed, 1.0)], self._first_row)
        return noise.divided_by_root(self._kind, u)

    def _group_rows(self, pending: Sequence[noise.Group]) -> torch.Tensor:
        """A / sqrt(rank) of every pending group, times the scales of those after it: [rows, rank * groups]."""
        if len(pending) > len(self._sums):  # a run that goes on with fewer steps than it has done
            self._summed, self._sums = (), torch.zeros(len(pending), *self._sums.shape[1:], device=self._device)
        for group, known, total in zip_longest(pending, self._summed[: len(pending)], self._sums[: len(pending)]):
            done = 0 if known is None else len(known.updates)
            if known is None or known.shared_seed != group.shared_seed or group.updates[:done] != known.updates:
                total.zero_()
                done = 0
            noise.add_rows(self._kind, self._key, total, group.updates[done:], self._first_row)
        self._summed = tuple(pending)
        parts, later = [torch.empty(self._rows, 0, dtype=self._dtype, device=self._device)], 1.0
        for group, total in zip(reversed(pending), self._sums[: len(pending)].flip(0), strict=True):
            parts.insert(1, (noise.divided_by_root(self._kind, total) * later).to(self._dtype))
            later *= group.scale
        return torch.cat(parts, dim=1)

    def _columns_of(self, seeds: Sequence[int]) -> torch.Tensor:
        """V^T of these seeds, one below the other: [rank * seeds, columns]."""
        made = {
            seed: noise.shared_columns(self._kind, self._key, seed, self._columns, self._device).to(self._dtype)
            for seed in set(seeds)
        }
        none = torch.empty(0, self._columns, dtype=self._dtype, device=self._device)
        return torch.cat([none, *(made[seed] for seed in seeds)])


def product_weights(parts: ModelParts) -> set[str]:
    """Fully qualified names of the weights that can meet noise in products: of linear layers in blocks, and the head's."""
    units = list(zip(parts.prefixes, parts.bindings, strict=True))
    if parts.head is not None:
        units.append((parts.head.name, parts.head.binding))
    return {f"{prefix}.{name}" for prefix, binding in units for name in binding.linear_weights}


def factor_bytes(shape: tuple[int, int], rank: int, groups: int, itemsize: int) -> tuple[int, int]:
    """Of one matrix: what is kept of so many pending groups, and what a visit makes of them and of two variants."""
    rows, columns = shape
    kept = 4 * rows * rank * groups
    width = rank * (groups + 1)
    return kept, width * (rows * (3 * itemsize + 4) + columns * (2 * itemsize + 4))
