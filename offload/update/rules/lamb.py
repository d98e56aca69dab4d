"""LAMB (You et al. 2020, algorithm 2): AdamW's step, as long as the parameter says.

    u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + wd theta, with m and v as AdamW's after this gradient
    theta = theta - lr |theta| / |u| u, by AdamW's kernel with the learning rate lr |theta| / |u|
A ratio of norms that are not both above 0 is 1. A ratio is known only once all of a parameter's state has been seen: state is
read twice, and sums are taken a piece at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.offload.update.matrices import TEMPORARY_BYTES, sum_of_squares
from finetune.offload.update.rules.adamw import AdamW

if TYPE_CHECKING:
    import torch

    from finetune.offload.update.units import UpdateUnit


@dataclass(frozen=True, kw_only=True)
class Lamb(AdamW):
    state_formats = ("float32", "bfloat16")
    passes = 2

    def temporary_bytes(self, unit: UpdateUnit) -> int:
        return TEMPORARY_BYTES

    def first_pass(self) -> TrustRatios:
        return TrustRatios()


class TrustRatios:
    """Parameter -> ratio, once all its runs of elements were added. A `FirstPass`."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(
        self, name: str, rule: Lamb, weights: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, torch.Tensor], step: int
    ) -> None:
        beta1, beta2 = rule.betas
        update = state["first"].lerp(gradient, 1 - beta1).div_(1 - beta1**step)
        second = (state["second"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update.div_(second.div_(1 - beta2**step).sqrt_().add_(rule.adam_epsilon)).add_(weights, alpha=rule.weight_decay)
        squares = self._squares[name]
        squares[0] += sum_of_squares(weights.clone())
        squares[1] += sum_of_squares(update)

    def __getitem__(self, name: str) -> float:
        weights, update = self._squares[name]
        return (weights / update) ** 0.5 if weights > 0 and update > 0 else 1.0
