"""Section `grpo`: completions that the model writes, and what is made of their rewards. Names and defaults are TRL's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune.objectives.answer_options import METHODS_OF_LORA, conflicts_of_answers
from finetune.options import Conflict, Count, NonNegative, Number, Positive, Section, Switch, show


def _check_rewards(value: Any) -> Any:
    """One word stands for a list of it."""
    words = value if isinstance(value, list | tuple) else [value]
    for word in words:
        if not callable(word) and not re.fullmatch(r".+:[A-Za-z_]\w*", str(word)):
            raise ValueError(f"expected FILE.py:FUNCTION, MODULE:FUNCTION or a function, or a list of such, found {show(word)}")
    return list(words)


class GrpoOptions(Section):
    """Of `training.objective` grpo."""

    reward_funcs: Annotated[list[Any], BeforeValidator(_check_rewards)] = []
    """What completions are worth: FILE.py:FUNCTION, MODULE:FUNCTION, in Python a function, or several. Each is called with
    lists of strings, prompts, completions and references, and gives a number for each completion, more for better."""
    reward_weights: list[Number] | None = None
    """What each of them counts in the sum. None: 1."""
    num_generations: Annotated[Count, Field(ge=2)] = 8
    """Completions of each prompt: a group. `training.batch_size` counts prompts."""
    max_completion_length: Count = 256
    """Tokens that a completion may have; `dataset.sequence_length` is that of prompt and completion."""
    temperature: Positive = 1.0
    """Of the sampling; likelihoods are those at this temperature."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Samples among the likeliest tokens that together have this probability."""
    beta: NonNegative = 0.0
    """What the distance (KL) from the model without its adapter counts. 0: there is no reference."""
    num_iterations: Count = 1
    """Updates with the same completions."""
    epsilon: NonNegative = 0.2
    """By how much less than 1 the ratio of likelihoods to those before the first update counts."""
    epsilon_high: NonNegative | None = None
    """By how much more. None: epsilon."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether there is such a ratio for every token, or one for a completion, the mean of the logarithms (GSPO)."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """grpo: the mean over completions of their means over tokens. bnpo, dapo: the mean over all tokens. dr_grpo: the sum over
    tokens, by the number of completions and `max_completion_length`."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """By what spread advantages are divided: of the rewards of a prompt's completions, of the step's, or of none (Dr. GRPO)."""
    mask_truncated_completions: Switch = False
    """Whether completions that have not ended by themselves count for nothing."""

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def conflicts(self) -> Iterator[Conflict]:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            yield Conflict(
                ("reward_weights", "reward_funcs"),
                f"expected as many reward_weights as reward_funcs, {len(self.reward_funcs)}, found {len(self.reward_weights)}",
            )

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        word = config.training.objective
        if word != "grpo":
            for key in sorted(self.model_fields_set):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield Conflict(
                        (f"grpo.{key}", "training.objective"), f"expected only with training.objective grpo, found {word}"
                    )
            return
        yield from conflicts_of_answers(config, word, METHODS_OF_LORA)
        if not self.reward_funcs:
            yield Conflict(
                ("grpo.reward_funcs", "training.objective"),
                "grpo.reward_funcs: expected what completions are worth, such as FILE.py:FUNCTION, found none",
            )
        if self.max_completion_length >= config.dataset.sequence_length:
            yield Conflict(
                ("grpo.max_completion_length", "dataset.sequence_length"),
                "grpo.max_completion_length: expected less than dataset.sequence_length, which prompt and completion have "
                f"together, {config.dataset.sequence_length}, found {self.max_completion_length}",
            )
        if config.engine.sequence_chunk is not None:
            yield Conflict(
                ("engine.sequence_chunk", "training.objective"),
                "engine.sequence_chunk: expected none with training.objective grpo, found "
                f"{config.engine.sequence_chunk}: completions are written from whole prompts",
            )
