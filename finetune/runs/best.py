"""The best step so far, by what evaluations found, and whether it is long ago: Transformers' rules of `metric_for_best_model`
and of `EarlyStoppingCallback`.

Both are functions of the evaluations alone, which are in the rows of metrics.jsonl: so a resumed run knows what an unbroken one
would, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.config.training_options import TrainingOptions
from finetune.memory.errors import UserError
from finetune.offload.files.sealed import unseal

BEST = "best"
"""In a run's directory: what was best, as step-N, while the run goes on."""
BEST_FILE = "best.json"
"""Of a run that has ended with its best step as its result: which step that is."""


class BestStep:
    """metric: the name of what is compared, without eval_. step: the best so far, 0 where there is none; value: what was
    measured then. misses: evaluations in a row that were no improvement beyond the threshold."""

    def __init__(self, options: TrainingOptions) -> None:
        self.metric = options.best_metric
        self._greater = options.best_is_greater
        self._patience = options.early_stopping_patience
        self._threshold = options.early_stopping_threshold
        self._is_wanted = bool(options.metric_for_best_model or options.load_best_model_at_end or self._patience)
        self.step, self.value, self.misses = 0, math.nan, 0
        self._has_value, self._taken = False, 0

    @property
    def should_stop(self) -> bool:
        return self._patience is not None and self.misses >= self._patience

    def take(self, step: int, values: Mapping[str, Any]) -> bool:
        """What was measured after `step`, under the names of a row of metrics (eval_loss and the like); returns whether it is
        the best. Nothing is taken of a row without an evaluation, nor of a step twice.

        Raises UserError where the metric is none of what was measured.
        """
        measured = {key.removeprefix("eval_"): value for key, value in values.items() if key.startswith("eval_")}
        if not measured or step <= self._taken:
            return False
        if self.metric not in measured:
            if not self._is_wanted:
                return False
            raise UserError(
                f"training.metric_for_best_model: expected one of {', '.join(measured)}, which the evaluation gives, found "
                f"{self.metric}"
            )
        self._taken, value = step, measured[self.metric]
        value = math.nan if value is None else float(value)  # rows have null for what is not finite
        improved = not self._has_value or (self._is_better(value) and abs(value - self.value) > self._threshold)
        self.misses = 0 if improved else self.misses + 1
        if not self._has_value:
            self.value, self._has_value = -math.inf if self._greater else math.inf, True
        if not self._is_better(value):
            return False
        self.step, self.value = step, value
        return True

    def take_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self.take(row["step"], row)

    def _is_better(self, value: float) -> bool:
        return value > self.value if self._greater else value < self.value

    def describe(self) -> str:
        return f"the best {self.metric} is {self.value:.4f}, of step {self.step}"

    @property
    def about(self) -> dict[str, Any]:
        """As JSON values."""
        return {"step": self.step, "metric": self.metric, "value": self.value}


def best_directory(output: Path, step: int) -> Path:
    return output / BEST / f"step-{step:08d}"


def read_best(output: Path) -> dict[str, Any] | None:
    """What such a run has left of it; None: the run's result is its last step. Raises UserError when it is damaged."""
    path = output / BEST_FILE
    if not path.is_file():
        return None
    try:
        found = unseal(json.loads(path.read_text(encoding="utf-8")))
        return {"step": int(found["step"]), "metric": str(found["metric"]), "value": float(found["value"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): let the run end once more with --resume, or remove it") from error
