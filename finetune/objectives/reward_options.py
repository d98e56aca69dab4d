"""Section `reward`: of a model that gives a text a score. Names are TRL's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.objectives.answer_options import METHODS_OF_GRADIENTS, conflicts_of_answers
from finetune.options import Conflict, NonNegative, Section


class RewardOptions(Section):
    """Of `training.objective` reward."""

    center_rewards_coefficient: NonNegative | None = None
    """What the mean of (score of the chosen text + score of the rejected one)^2 counts, which keeps scores around 0 (Eisenstein
    et al. 2023). None: nothing."""

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        word = config.training.objective
        if word == "reward":
            yield from conflicts_of_answers(config, word, METHODS_OF_GRADIENTS)
        elif self.center_rewards_coefficient is not None:
            yield Conflict(
                ("reward.center_rewards_coefficient", "training.objective"),
                f"expected only with training.objective reward, found {word}",
            )
