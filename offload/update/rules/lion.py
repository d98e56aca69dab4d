"""Lion (Chen et al. 2023).

theta = (1 - lr wd) theta - lr sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.offload.update.rules.rule import Scalars, TwoBetas


@dataclass(frozen=True, kw_only=True)
class Lion(TwoBetas):
    kernel = "lion"
    states = ("first",)

    def scalars(self, learning_rate: float, step: int) -> Scalars:
        beta1, beta2 = self.betas
        return Scalars(beta1, 1 - beta1, beta2, 1 - beta2, step=-learning_rate)
