"""Section `preference`: the numbers in losses of preferences. Names are TRL's; formulas are in the objectives' own files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune.objectives.answer_options import METHODS_OF_GRADIENTS, METHODS_OF_LORA, conflicts_of_answers
from finetune.objectives.registry import find_objective
from finetune.options import Conflict, NonNegative, Number, Positive, Section, Switch

_LOSS_TYPES = {"dpo": ("sigmoid", "hinge", "ipo", "robust"), "cpo": ("sigmoid", "hinge", "ipo")}
_SMOOTHED = ("sigmoid", "robust")
_READS = {
    "dpo": ("beta", "loss_type", "label_smoothing"),
    "cpo": ("beta", "loss_type", "label_smoothing", "cpo_alpha"),
    "simpo": ("beta", "label_smoothing", "simpo_gamma", "cpo_alpha"),
    "orpo": ("beta", "orpo_prompt_loss"),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
}


class PreferenceOptions(Section):
    """Of `training.objective` dpo, cpo, simpo, orpo and kto."""

    beta: Positive | None = None
    """dpo, kto: how near the model stays to its reference. cpo, simpo: the scale of rewards. orpo: the weight of the odds ratio
    (lambda in its paper). ipo: tau. None: 0.1, and 2.0 for simpo."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """Of dpo and cpo. robust is for dpo."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0
    """How often a pair is taken to be the wrong way round. sigmoid: conservative DPO; robust: its unbiased form."""
    simpo_gamma: NonNegative = 0.5
    """simpo: by how much the reward of the chosen answer should be larger."""
    cpo_alpha: NonNegative | None = None
    """cpo, simpo: the weight of the chosen answers' mean cross entropy. None: 1 for cpo, 0 for simpo."""
    orpo_prompt_loss: Switch = True
    """orpo: whether that mean is over the prompt too, as in the authors' code and TRL; else over the answer alone."""

    desirable_weight: NonNegative = 1.0
    """kto: of rows whose answer is wanted."""
    undesirable_weight: NonNegative = 1.0
    """kto: of rows whose answer is not wanted."""

    def beta_of(self, objective: str) -> float:
        """With this `training.objective`."""
        return (2.0 if objective == "simpo" else 0.1) if self.beta is None else self.beta

    def cpo_alpha_of(self, objective: str) -> float:
        """With this `training.objective`."""
        return float(objective == "cpo") if self.cpo_alpha is None else self.cpo_alpha

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        word = config.training.objective
        found = {key for key in self.model_fields_set if getattr(self, key) != type(self).model_fields[key].default}
        for key in sorted(found - set(_READS.get(word, ()))):
            readers = ", ".join(name for name, keys in _READS.items() if key in keys)
            yield Conflict(
                (f"preference.{key}", "training.objective"), f"expected only with training.objective {readers}, found {word}"
            )
        if word in _LOSS_TYPES and self.loss_type not in _LOSS_TYPES[word]:
            yield Conflict(
                ("preference.loss_type", "training.objective"),
                f"preference.loss_type: expected one of {', '.join(_LOSS_TYPES[word])} with {word}, found {self.loss_type}",
            )
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            yield Conflict(
                ("preference.label_smoothing", "preference.loss_type"),
                f"preference.label_smoothing: expected 0 with loss_type {self.loss_type}, found {self.label_smoothing}",
            )
        if word not in _READS:
            return
        yield from conflicts_of_answers(
            config, word, METHODS_OF_LORA if find_objective(word).has_reference else METHODS_OF_GRADIENTS
        )
        if word == "kto" and config.training.batch_size == 1:
            yield Conflict(
                ("training.objective", "training.batch_size"),
                "training.batch_size: expected at least 2 with training.objective kto, which pairs prompts with other rows' "
                "answers, found 1",
            )
        if not config.dataset.completion_only:
            yield Conflict(
                ("training.objective", "dataset.completion_only"),
                f"dataset.completion_only: expected it on with training.objective {word}, which compares answers, found it off",
            )
