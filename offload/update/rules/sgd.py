"""SGD with momentum: torch.optim.SGD's, but for the decoupled decay.

m = momentum m + g; theta = (1 - lr wd) theta - lr m
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt

from finetune.offload.update.rules.rule import Rule, Scalars


@dataclass(frozen=True, kw_only=True)
class Sgd(Rule):
    kernel = "sgd"
    states = ("first",)

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the last step's sum that stays."""

    def scalars(self, learning_rate: float, step: int) -> Scalars:
        return Scalars(self.momentum, step=-learning_rate)
