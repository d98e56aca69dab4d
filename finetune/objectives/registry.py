"""The objectives, by the word that a configuration has for them. Imports neither torch nor NumPy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from finetune.options import show
from finetune.plugin import load


@dataclass(frozen=True, slots=True)
class ObjectiveEntry:
    """What is known of an objective before its code is loaded."""

    code: str
    """"module:Class", a `finetune.objectives.base.Objective`."""
    packs: bool = False
    """Whether a row may hold several examples; else each example is asked alone."""
    has_reference: bool = False
    """Whether steps and measurements meet the model without its adapter too, see `finetune.adapters.reference`."""
    scores: bool = False
    """Whether the model gives a text a score, by a head of one output, rather than the likelihood of tokens."""
    steps_alone: bool = False
    """Whether its steps cannot be those of other runs too."""
    section: str = ""
    """Of the configuration, that no other objective reads: its options; empty: it has none."""

    def load(self) -> type:
        """The objective's class."""
        return load(self.code)


OBJECTIVES: dict[str, ObjectiveEntry] = {
    "loss": ObjectiveEntry("finetune.objectives.token_loss:TokenLoss", packs=True),
    "classification": ObjectiveEntry("finetune.objectives.classification:Classification"),
    "accuracy": ObjectiveEntry("finetune.objectives.accuracy:Accuracy"),
    "exact_match": ObjectiveEntry("finetune.objectives.exact_match:ExactMatch"),
    "f1": ObjectiveEntry("finetune.objectives.f1:F1"),
}
PREFERENCES: dict[str, ObjectiveEntry] = {
    "dpo": ObjectiveEntry("finetune.objectives.dpo:DPO", has_reference=True, section="preference"),
    "cpo": ObjectiveEntry("finetune.objectives.cpo:CPO", section="preference"),
    "simpo": ObjectiveEntry("finetune.objectives.simpo:SimPO", section="preference"),
    "orpo": ObjectiveEntry("finetune.objectives.orpo:ORPO", section="preference"),
    "kto": ObjectiveEntry("finetune.objectives.kto:KTO", has_reference=True, section="preference"),
    "grpo": ObjectiveEntry("finetune.objectives.grpo:GRPO", steps_alone=True, section="grpo"),
    "reward": ObjectiveEntry("finetune.objectives.reward_model:RewardModel", scores=True, steps_alone=True, section="reward"),
}
"""Objectives of methods with gradients, beside loss: `training.objective`."""
OBJECTIVE_SECTIONS = {
    "preference": "finetune.objectives.preference_options:PreferenceOptions",
    "grpo": "finetune.objectives.grpo_options:GrpoOptions",
    "reward": "finetune.objectives.reward_options:RewardOptions",
}
"""Sections that some objectives read: "module:Class", a `finetune.options.Section`."""
_FUNCTION = ObjectiveEntry("finetune.objectives.rewards:Rewards")


def find_objective(word: Any) -> ObjectiveEntry:
    """word: a name of OBJECTIVES or PREFERENCES, FILE.py:FUNCTION, MODULE:FUNCTION or a function."""
    return (OBJECTIVES | PREFERENCES).get(word, _FUNCTION) if isinstance(word, str) else _FUNCTION


def trains_beside_reference(config: Any) -> bool:
    """Whether steps of a run meet the model without its adapter too. Those of grpo do where the distance from it counts; its
    measurements never do."""
    return find_objective(config.objective).has_reference or (config.objective == "grpo" and config.grpo.beta > 0)


def check_objective(word: Any) -> Any:
    """Returns it. Raises ValueError for a word that can name no objective."""
    if not callable(word) and word not in tuple(OBJECTIVES) and not re.fullmatch(r".+:[A-Za-z_]\w*", str(word)):
        raise ValueError(f"expected one of {', '.join(OBJECTIVES)}, FILE.py:FUNCTION or a function, found {show(word)}")
    return word
