"""Moments of a projection of the gradient in place of the gradient's own: APOLLO, and FRUGAL in subspaces of matrices.

A matrix's gradient, turned so that G is [n, m] with n <= m, is projected by P [r, n], which is drawn anew every `interval`
updates. With M and V, AdamW's moments of R = P G, and U = M^ / (sqrt(V^) + eps):

    apollo      P normal with variance 1 / r; s_j = |U_j| / |R_j|, a number a column (one for all with r = 1: APOLLO-Mini);
                D = sqrt(scale) G diag(s) (the root is the authors' code's), whose norm grows by 1% a step at most.
                Zhu et al. 2024, algorithm 1.
    projection  orthonormal rows, or for `columns` r rows of the identity: D = P^T U + scale sign(G - P^T R), and M and V
    columns     begin anew with every P. FRUGAL (Zmushko et al. 2024, algorithm 1).

    theta = (1 - lr wd) theta - lr D

Parameters of one dimension, and matrices with n <= r, have AdamW's step. Matrices of more dimensions are a stack of them.
Sums over a matrix are taken in chunks. The state of a matrix is 2 r m numbers, and an update moves weights and these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from memory.units import round_up
from offload.noise import noise
from offload.update.adafactor import TEMPORARY_BYTES, chunks, from_rows, scaled
from offload.update.rules import Rule
from offload.update.units import UpdateUnit

GROWTH = 1.01  # of the norm of APOLLO's steps
_EPSILON = 1e-8  # beside the norm of a projected column


@dataclass(frozen=True, slots=True)
class _Shape:
    """rows, width: of each of `matrices`. rank: 0 where a parameter has AdamW's moments."""

    matrices: int
    rows: int
    width: int
    rank: int

    @classmethod
    def of(cls, shape: tuple[int, ...], rule: Rule) -> _Shape:
        if len(shape) < 2 or min(shape[-2:]) <= rule.rank:
            return cls(1, 1, prod(shape), 0)
        return cls(prod(shape[:-2]), *shape[-2:], rule.rank)

    @property
    def small(self) -> int:
        return min(self.rows, self.width)

    @property
    def moments(self) -> int:
        """Elements of one of the two."""
        return self.matrices * max(self.rows, self.width) * (self.rank or 1)


def factor_bytes(unit: UpdateUnit, rule: Rule) -> int:
    """Of the state of all parameters of a unit: moments, a count of updates, and APOLLO's last norm."""
    return round_up(sum(4 * (2 * shape.moments + 2) for shape in _shapes(unit, rule).values()))


def temporary_bytes(unit: UpdateUnit, rule: Rule) -> int:
    """What the directions of a unit allocate while they are made and used."""
    return TEMPORARY_BYTES + sum(4 * (3 * x.moments + 2 * x.matrices * x.rank * x.small) for x in _shapes(unit, rule).values())


def directions(
    unit: UpdateUnit, rule: Rule, memory: torch.Tensor, gradients: Mapping[str, torch.Tensor], grad_scale: float, seed: int
) -> dict[str, Stepped | Projected]:
    """Takes gradients, contiguous, into the state (uint8 [factor_bytes], of zeros at first) and says where each moves its
    parameter. seed: of the projections."""
    values, start, found = memory.view(torch.float32), 0, {}
    for name, shape in _shapes(unit, rule).items():
        middle, end = start + shape.moments, start + 2 * shape.moments
        if name in gradients:
            state = values[start:middle], values[middle:end], values[end : end + 2]
            make = _projected if shape.rank else _stepped
            found[name] = make(rule, shape, gradients[name], grad_scale, *state, unit.fqns[name], seed)
        start = end + 2
    return found


@dataclass(frozen=True, slots=True)
class Stepped:
    """AdamW's step of a parameter, fp32 [elements]."""

    step: torch.Tensor

    def of(self, first: int, count: int) -> torch.Tensor:
        return self.step[first : first + count]


@dataclass(frozen=True, slots=True)
class Projected:
    """scales: apollo's, fp32 [matrices, m]. projections [matrices, r, n], steps and lows [matrices, r, m]: of the others."""

    shape: _Shape
    gradient: torch.Tensor  # [matrices * rows, width]
    gradient_scale: float
    scales: torch.Tensor | None
    projections: torch.Tensor
    steps: torch.Tensor
    lows: torch.Tensor
    sign_scale: float

    def of(self, first: int, count: int) -> torch.Tensor:
        """fp32 [count], from element `first` on."""
        return from_rows(self._rows, first, count, self.shape.width)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        values = scaled(self.gradient[start:stop], self.gradient_scale)
        height = self.shape.rows
        for matrix in range(start // height, -(-stop // height)):
            low, high = max(start, matrix * height), min(stop, (matrix + 1) * height)
            self._move(matrix, slice(low - matrix * height, high - matrix * height), values[low - start : high - start])
        return values

    def _move(self, matrix: int, rows: slice, values: torch.Tensor) -> None:
        """The gradient's rows of a matrix become those of the direction, in place."""
        turned = self.shape.rows > self.shape.width
        if self.scales is not None:
            values *= self.scales[matrix, rows, None] if turned else self.scales[matrix]
            return
        projection, step, low = self.projections[matrix], self.steps[matrix], self.lows[matrix]
        if turned:
            inside, kept = step[:, rows].t() @ projection, low[:, rows].t() @ projection
        else:
            inside, kept = projection[:, rows].t() @ step, projection[:, rows].t() @ low
        values.sub_(kept).sign_().mul_(self.sign_scale).add_(inside)


def _shapes(unit: UpdateUnit, rule: Rule) -> dict[str, _Shape]:
    return {name: _Shape.of(unit.layout.views[name].shape, rule) for name in unit.fqns}


def _stepped(
    rule: Rule, shape: _Shape, gradient: torch.Tensor, grad_scale: float,
    first: torch.Tensor, second: torch.Tensor, numbers: torch.Tensor, fqn: str, seed: int,
) -> Stepped:  # fmt: skip
    numbers[0] += 1
    return Stepped(_adam(rule, scaled(gradient.view(-1), grad_scale), first, second, int(numbers[0])))


def _projected(
    rule: Rule, shape: _Shape, gradient: torch.Tensor, grad_scale: float,
    first: torch.Tensor, second: torch.Tensor, numbers: torch.Tensor, fqn: str, seed: int,
) -> Projected:  # fmt: skip
    period, since = divmod(int(numbers[0]), rule.interval)
    if not since and rule.name != "apollo":
        first.zero_()
        second.zero_()
    numbers[0] += 1
    projections = torch.stack([_projection(rule, shape, fqn, seed, period, i) for i in range(shape.matrices)])
    gradient = gradient.view(-1, shape.width)
    lows, squares = _project(shape, gradient, grad_scale, projections)
    updates = int(numbers[0]) if rule.name == "apollo" else since + 1
    steps = _adam(rule, lows, first.view_as(lows), second.view_as(lows), updates)
    scales = _scales(rule, lows, steps, squares, numbers[1:]) if rule.name == "apollo" else None
    return Projected(shape, gradient, grad_scale, scales, projections, steps, lows, rule.scale)


def _adam(rule: Rule, g: torch.Tensor, first: torch.Tensor, second: torch.Tensor, updates: int) -> torch.Tensor:
    beta1, beta2 = rule.betas
    first.lerp_(g, 1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return (first / (1 - beta1**updates)).div_((second / (1 - beta2**updates)).sqrt_().add_(rule.eps))


def _projection(rule: Rule, shape: _Shape, fqn: str, seed: int, period: int, matrix: int) -> torch.Tensor:
    """fp32 [r, n]."""
    values = torch.zeros(shape.rank * shape.small)
    digest = hashlib.blake2b(f"{seed}/projection/{period}".encode(), digest_size=8).digest()
    target = noise.Target(values, int.from_bytes(digest, "little"), 1.0)
    first_element = matrix * values.numel()
    parameter = noise.Parameter(noise.parameter_key(fqn))
    noise.move(noise.Noise("gaussian"), parameter, values, (), [target], first_element)
    values = values.view(shape.rank, shape.small)
    if rule.name == "apollo":
        return values.mul_(shape.rank**-0.5)
    if rule.name == "projection":
        return torch.linalg.qr(values.t()).Q.t().contiguous()
    chosen = values.view(-1)[: shape.small].argsort()[: shape.rank]  # as many normals as there are rows: a random order
    return torch.zeros_like(values).index_put_((torch.arange(shape.rank), chosen), torch.ones(()))


def _project(
    shape: _Shape, gradient: torch.Tensor, grad_scale: float, projections: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """P G, fp32 [matrices, r, m], and the squared norms of G's columns, fp64 [matrices, m]."""
    large = max(shape.rows, shape.width)
    lows = torch.zeros(shape.matrices, shape.rank, large)
    squares = torch.zeros(shape.matrices, large, dtype=torch.float64)
    for matrix in range(shape.matrices):
        for start, stop in chunks(shape.rows, shape.width):
            at = matrix * shape.rows
            values = scaled(gradient[at + start : at + stop], grad_scale)
            if shape.rows > shape.width:
                lows[matrix, :, start:stop] = projections[matrix] @ values.t()
                squares[matrix, start:stop] = values.square_().sum(dim=1)
            else:
                lows[matrix] += projections[matrix][:, start:stop] @ values
                squares[matrix] += values.square_().sum(dim=0)
    return lows, squares


def _scales(
    rule: Rule, lows: torch.Tensor, steps: torch.Tensor, squares: torch.Tensor, last_norm: torch.Tensor
) -> torch.Tensor:
    """APOLLO's, the limit on growth in them. last_norm: fp32 [1], of the parameter's last step."""
    over = (1, 2) if rule.rank == 1 else 1
    scales = steps.norm(dim=over, keepdim=True) / (lows.norm(dim=over, keepdim=True) + _EPSILON)
    scales = (scales.squeeze(1) * rule.scale**0.5).expand(len(lows), lows.shape[2]).clone()
    norm = float((scales.double().square_() * squares).sum().sqrt())
    limit = GROWTH * float(last_norm)
    if 0 < limit < norm:
        scales *= limit / norm
        norm = limit
    last_norm.fill_(norm)
    return scales
