"""AdamW's moments of a projection of the gradient in place of the gradient's own: what APOLLO and FRUGAL have in common.

A matrix's gradient, turned so that G is [n, m] with n <= m, is projected by P [r, n], which is drawn anew every
`refresh_steps` updates. M and V are AdamW's moments of R = P G, and U = M^ / (sqrt(V^) + eps); a rule makes of these the D in
    theta = (1 - lr wd) theta - lr D

Parameters of one dimension, and matrices with n <= r, have AdamW's step. Matrices of more dimensions are a stack of them.
Sums over a matrix are taken in chunks. The state of a matrix is 2 r m numbers, and an update moves weights and these.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from annotated_types import Ge

from finetune.offload.update.matrices import TEMPORARY_BYTES, Elements, Rows, chunks, parts, scaled
from finetune.offload.update.rules.rule import AdamNumbers, Direction, DirectionRule

if TYPE_CHECKING:
    import torch

    from finetune.offload.update.units import UpdateUnit


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a parameter, as a stack of `matrices` of so many `rows`, each of `width` elements. rank: 0 where it has AdamW's
    moments."""

    matrices: int
    rows: int
    width: int
    rank: int

    @classmethod
    def of(cls, shape: tuple[int, ...], rank: int) -> Shape:
        if len(shape) < 2 or min(shape[-2:]) <= rank:
            return cls(1, 1, prod(shape), 0)
        return cls(prod(shape[:-2]), *shape[-2:], rank)

    @property
    def turned(self) -> bool:
        return self.rows > self.width

    @property
    def small(self) -> int:
        return min(self.rows, self.width)

    @property
    def large(self) -> int:
        return max(self.rows, self.width)

    @property
    def moments(self) -> int:
        """Elements of one of the two."""
        return self.matrices * self.large * (self.rank or 1)


class Kept(NamedTuple):
    """The state of a parameter, fp32."""

    first: torch.Tensor  # [moments]
    second: torch.Tensor  # [moments]
    updates: torch.Tensor  # [1], how many there were
    last_norm: torch.Tensor  # [1], apollo's, of its last step


@dataclass(frozen=True, slots=True)
class Projected:
    """What a rule makes a direction of. All fp32, but for the gradient's own dtype."""

    shape: Shape  # of the parameter
    gradient: torch.Tensor  # [matrices * rows, width]
    gradient_scale: float  # what the gradient is multiplied by
    projections: torch.Tensor  # [matrices, r, n]: P
    lows: torch.Tensor  # [matrices, r, m]: R
    steps: torch.Tensor  # [matrices, r, m]: U
    column_squares: torch.Tensor  # [matrices, m], fp64: squared norms of G's columns
    kept: Kept  # its state

    def along(self, move: Callable[[int, slice, torch.Tensor], None]) -> Rows:
        """move(matrix, rows, values) turns rows of a matrix's gradient, fp32, into those of the direction, in place."""

        def make(start: int, stop: int) -> torch.Tensor:
            values = scaled(self.gradient[start:stop], self.gradient_scale)
            for matrix, rows, here in parts(start, stop, self.shape.rows):
                move(matrix, rows, values[here])
            return values

        return Rows(make, self.shape.width)


@dataclass(frozen=True, kw_only=True)
class ProjectedRule(AdamNumbers, DirectionRule):
    begins_anew: ClassVar[bool] = True
    """Whether moments begin anew with every projection."""

    rank: Annotated[int, Ge(1)] = 32
    """Dimensions that matrices are projected to."""

    @property
    @abstractmethod
    def refresh_steps(self) -> int:
        """Updates between projections."""

    @abstractmethod
    def project(self, normals: torch.Tensor) -> torch.Tensor:
        """P, of as many independent normals: fp32 [r, n], which may be used up."""

    @abstractmethod
    def direct(self, found: Projected) -> Direction:
        """D."""

    def factor_bytes(self, unit: UpdateUnit) -> int:
        return sum(4 * (2 * shape.moments + 2) for shape in self._shapes(unit).values())

    def temporary_bytes(self, unit: UpdateUnit) -> int:
        return TEMPORARY_BYTES + sum(
            4 * (3 * x.moments + 2 * x.matrices * x.rank * x.small) for x in self._shapes(unit).values()
        )

    def directions(
        self, unit: UpdateUnit, factors: torch.Tensor, gradients: Mapping[str, torch.Tensor], grad_scale: float, seed: int
    ) -> dict[str, Direction]:
        start, found = 0, {}
        for name, shape in self._shapes(unit).items():
            middle, end = start + shape.moments, start + 2 * shape.moments
            if name in gradients:
                kept = Kept(
                    factors[start:middle], factors[middle:end], factors[end : end + 1], factors[end + 1 : end + 2]
                )
                if shape.rank:
                    found[name] = self._direction(shape, unit.fqns[name], gradients[name], grad_scale, kept, seed)
                else:
                    kept.updates.add_(1)
                    gradient = scaled(gradients[name].view(-1), grad_scale)
                    found[name] = Elements(self._adam(gradient, kept.first, kept.second, int(kept.updates)))
            start = end + 2
        return found

    def _shapes(self, unit: UpdateUnit) -> dict[str, Shape]:
        return {name: Shape.of(unit.layout.views[name].shape, self.rank) for name in unit.fqns}

    def _direction(
        self, shape: Shape, fqn: str, gradient: torch.Tensor, grad_scale: float, kept: Kept, seed: int
    ) -> Direction:
        period, since = divmod(int(kept.updates), self.refresh_steps)
        if self.begins_anew and not since:
            kept.first.zero_()
            kept.second.zero_()
        kept.updates.add_(1)
        gradient = gradient.view(-1, shape.width)
        projections = kept.first.new_empty(shape.matrices, shape.rank, shape.small)
        for matrix in range(shape.matrices):
            projections[matrix] = self.project(_normals(shape, fqn, f"{seed}/projection/{period}", matrix))
        lows, squares = _project(shape, gradient, grad_scale, projections)
        updates = since + 1 if self.begins_anew else int(kept.updates)
        steps = self._adam(lows, kept.first.view_as(lows), kept.second.view_as(lows), updates)
        return self.direct(Projected(shape, gradient, grad_scale, projections, lows, steps, squares, kept))

    def _adam(self, g: torch.Tensor, first: torch.Tensor, second: torch.Tensor, updates: int) -> torch.Tensor:
        beta1, beta2 = self.betas
        first.lerp_(g, 1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        return (first / (1 - beta1**updates)).div_((second / (1 - beta2**updates)).sqrt_().add_(self.adam_epsilon))


def _project(
    shape: Shape, gradient: torch.Tensor, grad_scale: float, projections: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """R, fp32 [matrices, r, m], and the squared norms of G's columns, fp64 [matrices, m]."""
    lows = projections.new_zeros(shape.matrices, shape.rank, shape.large)
    squares = projections.new_zeros(shape.matrices, shape.large).double()
    for matrix in range(shape.matrices):
        for start, stop in chunks(shape.rows, shape.width):
            at = matrix * shape.rows
            values = scaled(gradient[at + start : at + stop], grad_scale)
            if shape.turned:
                lows[matrix, :, start:stop] = projections[matrix] @ values.t()
                squares[matrix, start:stop] = values.square_().sum(dim=1)
            else:
                lows[matrix] += projections[matrix][:, start:stop] @ values
                squares[matrix] += values.square_().sum(dim=0)
    return lows, squares


def _normals(shape: Shape, fqn: str, draw: str, matrix: int) -> torch.Tensor:
    """fp32 [r, n], of a parameter's matrix; draw: another word gives others."""
    import torch

    from finetune.offload.noise import noise

    values = torch.zeros(shape.rank * shape.small)
    target = noise.Target(values, int.from_bytes(hashlib.blake2b(draw.encode(), digest_size=8).digest(), "little"), 1.0)
    parameter = noise.Parameter(noise.parameter_key(fqn))
    noise.move(noise.Noise("gaussian"), parameter, values, (), [target], matrix * values.numel())
    return values.view(shape.rank, shape.small)
