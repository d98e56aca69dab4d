"""APOLLO (Zhu et al. 2024, algorithm 1): the gradient, scaled by how long a step its projection takes.

With P normal of variance 1 / r, and U and R of `finetune.offload.update.rules.projected`:
    s_j = |U_j| / |R_j|, a number a column (one for all with r = 1: APOLLO-Mini)
    D = sqrt(scale) G diag(s), whose norm grows by 1% a step at most; the root is the authors' code's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from finetune.offload.update.rules.projected import Projected, ProjectedRule
from finetune.offload.update.rules.rule import Direction

if TYPE_CHECKING:
    import torch

GROWTH = 1.01  # of the norm of steps
_EPSILON = 1e-8  # beside the norm of a projected column


@dataclass(frozen=True, kw_only=True)
class Apollo(ProjectedRule):
    begins_anew = False

    refresh_steps: Annotated[int, Ge(1)] = 200
    """Updates between projections."""
    scale: Annotated[float, Ge(0)] = 1.0
    """The square of a factor of its steps, as in the authors' code. APOLLO-Mini: rank 1 with a scale of 128."""

    def project(self, normals: torch.Tensor) -> torch.Tensor:
        return normals.mul_(self.rank**-0.5)

    def direct(self, found: Projected) -> Direction:
        scales = self._scales(found)

        def move(matrix: int, rows: slice, values: torch.Tensor) -> None:
            values *= scales[matrix, rows, None] if found.shape.turned else scales[matrix]

        return found.along(move)

    def _scales(self, found: Projected) -> torch.Tensor:
        """fp32 [matrices, m], the limit on growth in them."""
        over = (1, 2) if self.rank == 1 else 1
        scales = found.steps.norm(dim=over, keepdim=True) / (found.lows.norm(dim=over, keepdim=True) + _EPSILON)
        scales = (scales.squeeze(1) * self.scale**0.5).expand(found.shape.matrices, found.shape.large).clone()
        norm = float((scales.double().square_() * found.column_squares).sum().sqrt())
        limit = GROWTH * float(found.kept.last_norm)
        if 0 < limit < norm:
            scales *= limit / norm
            norm = limit
        found.kept.last_norm.fill_(norm)
        return scales
