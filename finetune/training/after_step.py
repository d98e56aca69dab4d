"""What follows a step where it is due: an evaluation, and saving the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.methods.base import Method
from finetune.reporting.report import MetricsWriter
from finetune.runs.best import BEST_FILE
from finetune.training.callbacks import CALLBACK_STATE, Callbacks
from finetune.training.kept_best import KeptBest


class AfterStep:
    """Evaluates and saves as `callbacks` ask, and after the last step; no step is evaluated or saved twice.

    evaluate: measures the model after so many steps, under the names of `finetune.evaluate`; None: there is no data for it.
    saved_step: the newest that is durable. evaluation: the last one's values.
    """

    def __init__(
        self, method: Method, callbacks: Callbacks, metrics: MetricsWriter,
        evaluate: Callable[[int], dict[str, float]] | None,
    ) -> None:  # fmt: skip
        self._method = method
        self._callbacks = callbacks
        self._metrics = metrics
        self._evaluate = evaluate
        self._evaluated_step = self._left_step = -1
        self._exported = callbacks.exported()
        self.saved_step = method.first_step
        self.evaluation: dict[str, float] | None = None
        self.best = callbacks.best
        (method.config.output / BEST_FILE).unlink(missing_ok=True)  # the run goes on
        self._kept = KeptBest(method, self.best) if method.config.training.load_best_model_at_end else None

    def settle(self, step: int, last: bool) -> None:
        """Does what is due now. What the last step leaves is there before it is evaluated, which may take long."""
        callbacks = self._callbacks
        if last:
            self.leave(step)
        if callbacks.should_evaluate or last and self._evaluate is not None:
            self.evaluate(step)
        if callbacks.should_save:
            self.save(step)
            callbacks.saved()
        if (exported := callbacks.exported()) != self._exported:
            self._metrics.amend({CALLBACK_STATE: exported})
            self._exported = exported

    def leave(self, step: int) -> None:
        """The state, and what is for the user in the output directory, are as after `step`."""
        self.save(step)
        if step > self._left_step:
            self._method.finish(step)
            self._left_step = step

    def finish(self, step: int) -> None:
        """What is due after `step`, the last one, and was not done yet."""
        self.leave(step)
        if self._evaluate is not None:
            self.evaluate(step)
        if self._kept is not None:
            self._kept.finish()

    def save(self, step: int) -> None:
        if step > self.saved_step:
            self._method.save(step)
            self.saved_step = step

    def evaluate(self, step: int) -> None:
        """The values go to the step's row of metrics as eval_loss and the like."""
        if self._evaluated_step < step:
            self.evaluation, self._evaluated_step = self._evaluate(step), step
            values: dict[str, Any] = {f"eval_{key}": value for key, value in self.evaluation.items()}
            is_best = self.best.take(step, values)
            if is_best and self._kept is not None:
                self._kept.keep()
            self._metrics.amend(values)
            self._callbacks.evaluated(values)
            if is_best and self._kept is not None:  # so that no resumed run begins before it
                self.save(step)
                self._kept.forget_others()
