"""LAMB's trust ratios (You et al. 2020, algorithm 2): how long a step of AdamW each parameter takes.

    u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + wd theta, with m and v as AdamW's after this gradient
    theta = theta - lr |theta| / |u| u, by AdamW's kernel with the learning rate lr |theta| / |u|
A ratio of norms that are not both above 0 is 1. A ratio is known only once all of a parameter's state has been seen: state is
read twice, and sums are taken a piece at a time.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from offload.update.adafactor import scaled
from offload.update.rules import Rule


class TrustRatios:
    """Parameter -> ratio, once all its runs of elements were added."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(
        self, name: str, rule: Rule, weights: torch.Tensor, gradient: torch.Tensor, gradient_scale: float,
        first: torch.Tensor, second: torch.Tensor, step: int,
    ) -> None:  # fmt: skip
        """A run of elements of parameter `name`, all [count]: weights fp32, gradient fp32 or bf16, state fp32 or bf16.

        rule: what updates the parameter. step: from 1, of this update, for the bias correction.
        """
        beta1, beta2 = rule.betas
        g = scaled(gradient, gradient_scale)
        update = torch.lerp(first.float(), g, 1 - beta1).div_(1 - beta1**step)
        second = (second.float() * beta2).addcmul_(g, g, value=1 - beta2).div_(1 - beta2**step).sqrt_().add_(rule.eps)
        update.div_(second).add_(weights, alpha=rule.weight_decay)
        squares = self._squares[name]
        squares[0] += float(weights.square().sum(dtype=torch.float64))
        squares[1] += float(update.square_().sum(dtype=torch.float64))

    def __getitem__(self, name: str) -> float:
        weights, update = self._squares[name]
        return (weights / update) ** 0.5 if weights > 0 and update > 0 else 1.0


def masters(weights: torch.Tensor, remainder: torch.Tensor | None) -> torch.Tensor:
    """fp32 masters of stored weights; remainder: int16, the lower halves, of bf16 weights that have them."""
    if remainder is None:
        return weights.float()
    return ((weights.view(torch.int16).int() << 16) + remainder).view(torch.float32)
