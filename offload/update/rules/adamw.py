"""AdamW (Loshchilov & Hutter 2019), as torch.optim has it.

    m = lerp(m, g, 1 - beta1); v = beta2 v + (1 - beta2) g g
    theta = (1 - lr wd) theta - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.offload.update.rules.rule import AdamNumbers, Scalars


@dataclass(frozen=True, kw_only=True)
class AdamW(AdamNumbers):
    kernel = "adamw"
    states = ("first", "second")

    def scalars(self, learning_rate: float, step: int) -> Scalars:
        beta1, beta2 = self.betas
        return Scalars(
            beta1, 1 - beta1, beta2, 1 - beta2,
            root_divisor=(1 - beta2**step) ** 0.5, epsilon=self.adam_epsilon, step=-learning_rate / (1 - beta1**step),
        )  # fmt: skip
