"""Keys of section `training` about evaluations: when they happen, and what follows from them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from finetune.methods.registry import METHODS
from finetune.objectives.registry import PREFERENCES
from finetune.options import Conflict, Count, NonNegative, Section, Switch, show

_FALLING = ("loss", "perplexity")  # measures of which less is better, by the end of their names


def _check_steps(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():  # from a command line
        value = int(value)
    if value is not None and value != "epoch" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"expected a number of steps, 1 or more, or epoch, found {show(value)}")
    return value


def _check_metrics(word: Any) -> Any:
    if word is not None and not callable(word) and not re.fullmatch(r".+:[A-Za-z_]\w*", str(word)):
        raise ValueError(f"expected FILE.py:FUNCTION, MODULE:FUNCTION or a function, found {show(word)}")
    return word


StepsOrEpoch = Annotated[int | Literal["epoch"], BeforeValidator(_check_steps)]


class EvaluationOptions(Section):
    """A part of section `training`."""

    eval_steps: Annotated[StepsOrEpoch | None, BeforeValidator(_check_steps)] = None
    """Evaluates every so many steps; epoch: at the end of each pass over the data. None: only at the end."""
    compute_metrics: Annotated[Any, BeforeValidator(_check_metrics)] = None
    """FILE.py:FUNCTION, MODULE:FUNCTION or a function of Transformers' `EvalPrediction`, which has the likeliest token at each
    label; it returns numbers by name. See `finetune.objectives.metrics`."""
    metric_for_best_model: str | None = None
    """What evaluations are compared by, a name that they give: loss, accuracy, or of `compute_metrics`. None: loss."""
    greater_is_better: Switch | None = None
    """Whether more of it is better. None: not where its name ends with loss or perplexity."""
    load_best_model_at_end: Switch = False
    """Whether the run's result is that of the step with the best evaluation, not that of the last. Until the run ends, two
    adapters more are on the disk."""
    early_stopping_patience: Count | None = None
    """Ends the run after so many evaluations in a row that were no better than the best before. None: it is not ended."""
    early_stopping_threshold: NonNegative = 0.0
    """By how much more than that an evaluation must be better to count."""

    @property
    def best_metric(self) -> str:
        """Without eval_ before it."""
        return (self.metric_for_best_model or "loss").removeprefix("eval_")

    @property
    def best_is_greater(self) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.best_metric.endswith(_FALLING)

    def conflicts(self) -> Iterator[Conflict]:
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            yield Conflict(
                ("early_stopping_threshold", "early_stopping_patience"),
                "expected early_stopping_threshold only with early_stopping_patience, found it alone",
            )

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        for key in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, key) and self.eval_steps is None:
                yield Conflict(
                    (f"training.{key}", "training.eval_steps"),
                    f"training.{key}: expected evaluations in the run, found no training.eval_steps",
                )
        if self.compute_metrics is not None and config.objective in tuple(PREFERENCES):
            keys = ("training.compute_metrics", "training.objective")
            yield Conflict(keys, f"training.compute_metrics: expected none with training.objective {config.objective}")
        if self.load_best_model_at_end and "store" in METHODS[config.method].files(config):
            yield Conflict(
                ("training.load_best_model_at_end", "method"),
                "training.load_best_model_at_end: expected a method that leaves an adapter or a journal, found "
                f"{config.method}, whose weights are as large as the model on the disk and are written over: end the "
                "run where it is best, with "
                "training.early_stopping_patience",
            )
