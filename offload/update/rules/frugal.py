"""FRUGAL (Zmushko et al. 2024, algorithm 1) in subspaces of matrices: AdamW's step inside, the sign of the gradient outside.

With U, R and P of `finetune.offload.update.rules.projected`, where P has orthonormal rows, or for `Columns` r rows of the
identity:
    D = P^T U + sign_scale sign(G - P^T R), and M and V begin anew with every P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.offload.update.rules.projected import Projected, ProjectedRule
from finetune.offload.update.rules.rule import Direction

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Subspace(ProjectedRule):
    interval: int = 50
    """Updates between projections."""
    sign_scale: float = 1.0
    """Learning rate of the signs, in units of the learning rate."""

    @property
    def refresh_steps(self) -> int:
        return self.interval

    def direct(self, found: Projected) -> Direction:
        def move(matrix: int, rows: slice, values: torch.Tensor) -> None:
            projection, step, low = found.projections[matrix], found.steps[matrix], found.lows[matrix]
            if found.shape.turned:
                inside, kept = step[:, rows].t() @ projection, low[:, rows].t() @ projection
            else:
                inside, kept = projection[:, rows].t() @ step, projection[:, rows].t() @ low
            values.sub_(kept).sign_().mul_(self.sign_scale).add_(inside)

        return found.along(move)


@dataclass(frozen=True, kw_only=True)
class Projection(Subspace):
    """Directions at random."""

    def project(self, normals: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.linalg.qr(normals.t()).Q.t().contiguous()


@dataclass(frozen=True, kw_only=True)
class Columns(Subspace):
    """Rows or columns of the matrix itself."""

    def project(self, normals: torch.Tensor) -> torch.Tensor:
        rank, small = normals.shape
        chosen = normals.view(-1)[:small].argsort()[:rank]  # as many normals as there are rows: a random order
        return normals.zero_().scatter_(1, chosen[:, None], 1.0)
