"""`training.compute_metrics`: a user's function of what the model predicts for held-out text.

It is called as Transformers' Trainer calls it with `preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)`:
with an `EvalPrediction` whose predictions [rows, T] are the likeliest token after each position, and whose label_ids [rows, T]
are the labels, not shifted: predictions[:, :-1] stand against label_ids[:, 1:]. Both are int32 and in the order of the data.
Only what predicts a label is computed: elsewhere both are -100. Logits are never kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from finetune.config.function_names import name_of_function
from finetune.data.cache import MASKED
from finetune.memory.errors import UserError
from finetune.objectives.rewards import load_reward

KEY = "training.compute_metrics"
_OWN = ("loss", "perplexity", "tokens", "examples", "accuracy", "seconds")  # names of what is measured anyway


def load_metrics(word: str | Callable[..., Any] | None) -> Callable[..., Any] | None:
    """FILE.py:FUNCTION, MODULE:FUNCTION or a function. Raises UserError."""
    return load_reward(word, KEY) if isinstance(word, str) else word


def prediction_bytes(rows: int, longest: int) -> int:
    """Of the predictions and labels of so many rows."""
    return 2 * 4 * rows * longest


class Predictions:
    """Of one pass over the rows. order: which row of the data comes first, second, ..."""

    def __init__(self, order: Sequence[int], longest: int) -> None:
        self._order = order
        self._tokens = np.full((len(order), longest), MASKED, np.int32)
        self._labels = self._tokens.copy()
        self._taken = 0

    def take(self, positions: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> None:
        """Of the next row: the labels of what follows these positions, and what is likeliest there."""
        row = self._order[self._taken]
        self._tokens[row, positions], self._labels[row, positions + 1] = predicted, labels
        self._taken += 1

    def measure(self, function: Callable[..., Any]) -> dict[str, float]:
        """What the function makes of them. Raises UserError when it fails, or returns anything but names and numbers."""
        from transformers import EvalPrediction

        name = name_of_function(function)
        try:
            found = dict(function(EvalPrediction(predictions=self._tokens, label_ids=self._labels)))
            values = {str(key).removeprefix("eval_"): value for key, value in found.items()}
            numbers = {key: float(value) for key, value in values.items() if isinstance(value, Real) or np.ndim(value) == 0}
        except Exception as error:  # the user's code raises what it likes
            raise UserError(f"{KEY}: {name} failed: {type(error).__name__}: {error}") from error
        wrong = [key for key in values if key not in numbers or not math.isfinite(numbers[key]) or key in _OWN]
        if wrong:
            raise UserError(
                f"{KEY}: expected finite numbers from {name}, under other names than {', '.join(_OWN)}, found {wrong[0]}: "
                f"{str(values[wrong[0]])[:60]}"
            )
        return numbers
