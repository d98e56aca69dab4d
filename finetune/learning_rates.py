"""A learning-rate finder: some steps with a rate that grows from each to the next, and what that says.

The range test of Smith (2017, Cyclical Learning Rates, section 3.3). The steps are those of the run from its start, with its
data, method and memory, in a directory of their own that is removed afterwards. Losses are smoothed (an exponential mean, its
bias taken out), because each step has other rows. Two rates are read off the curve up to its lowest point: where it falls
fastest for a change of the rate by a factor; and a tenth of that where it is lowest, beyond which it grows. What is suggested
is the smaller.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.trainer import Trainer

SMOOTHING = 0.8  # of a loss, what comes from those before
STOP_FACTOR = 4.0  # the steps end where a smoothed loss is so many times the lowest
FEWEST_STEPS = 10
LEAST_FALL = 0.01  # of the first loss: less is none


@dataclass(frozen=True, slots=True)
class RateCurve:
    """rates, losses: of each step. suggestion: None where the loss does not fall."""

    rates: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]
    fastest: float | None  # the rate at which the smoothed loss falls fastest
    lowest: float | None  # the rate at which it is lowest

    @property
    def suggestion(self) -> float | None:
        return None if self.fastest is None else min(self.fastest, self.lowest / 10)

    @property
    def values(self) -> dict[str, Any]:
        """As JSON values."""
        steps = [dict(zip(("rate", "loss", "smoothed"), one, strict=True)) for one in self._steps]
        return {"suggestion": self.suggestion, "fastest": self.fastest, "lowest": self.lowest, "steps": steps}

    @property
    def _steps(self) -> list[tuple[float, float, float]]:
        return list(zip(self.rates, self.losses, self.smoothed, strict=True))

    def describe(self, lines: int = 24, width: int = 40) -> str:
        """The curve as text, a line for a few steps, and what follows from it."""
        finite = [x for x in self.smoothed if math.isfinite(x)]
        least, most = min(finite), max(finite)
        text = ["      rate   smoothed loss"]
        every = max(1, -(-len(self.rates) // lines))
        for rate, _, smoothed in self._steps[::every]:
            share = (smoothed - least) / (most - least) if most > least and math.isfinite(smoothed) else 1.0
            text.append(f"{rate:10.2e}   {smoothed:8.4f}  {'#' * max(1, round(share * width))}")
        if self.suggestion is None:
            text.append("The loss does not fall at any of these rates: give other rates (--from, --to) or more steps")
            return "\n".join(text)
        text += [
            f"It falls fastest at {self.fastest:.1e}, and is lowest at {self.lowest:.1e}, a tenth of which is "
            f"{self.lowest / 10:.1e}. The smaller of the two:",
            f"  --learning-rate {self.suggestion:.1e}",
        ]
        return "\n".join(text)


def read_curve(rates: Sequence[float], losses: Sequence[float]) -> RateCurve:
    """rates: rising. losses: as many, of which the last may not be finite."""
    mean, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**count))
    finite = np.array([x for x in smoothed if math.isfinite(x)])
    bottom = int(finite.argmin()) if len(finite) else 0
    fastest = lowest = None
    if bottom >= 2 and finite[bottom] < (1 - LEAST_FALL) * finite[0]:
        slopes = np.gradient(finite, np.log(np.asarray(rates[: len(finite)])))
        at = int(slopes[: bottom + 1].argmin())
        if slopes[at] < 0:
            fastest, lowest = float(rates[at]), float(rates[bottom])
    return RateCurve(list(rates), list(losses), smoothed, fastest, lowest)


def find_learning_rate(config: Config, num_steps: int = 100, least: float = 1e-7, most: float = 1.0) -> RateCurve:
    """Up to `num_steps` steps of the run of `config` from its start, rates from `least` to `most`.

    Nothing is written into `config.output`. Raises UserError for bad input and PlanRefused for budgets that are too small.
    """
    if num_steps < FEWEST_STEPS or not 0 < least < most:
        raise UserError(
            f"expected {FEWEST_STEPS} steps or more and rates above 0, the second above the first, found {num_steps} steps, "
            f"{least:g} and {most:g}"
        )
    rates = np.geomspace(least, most, num_steps).tolist()
    place = config.output.absolute().parent
    while not place.is_dir():
        place = place.parent
    with tempfile.TemporaryDirectory(prefix=".lr-find-", dir=place) as folder:
        found = _take_steps(_of_trial(config, Path(folder), num_steps, most), rates)
    if len(found) < FEWEST_STEPS:
        raise UserError(f"the loss was not a number after {len(found)} steps: lower the rate it begins with, {least:g}")
    return read_curve(rates[: len(found)], found)


def _of_trial(config: Config, output: Path, num_steps: int, rate: float) -> Config:
    training = config.training.model_copy(
        update={
            "max_steps": num_steps, "learning_rate": rate, "lr_scheduler": "constant", "lr_scheduler_kwargs": {},
            "warmup_steps": 0, "warmup_ratio": 0.0, "eval_steps": None, "save_steps": num_steps + 1, "report_to": [],
            "load_best_model_at_end": False, "early_stopping_patience": None,
        }
    )  # fmt: skip
    changes = {"output": output, "training": training, "eval_data": None, "resume": False, "trace": None}
    return config.model_copy(update=changes)


def _take_steps(config: Config, rates: Sequence[float]) -> list[float]:
    """The losses, up to where they have gone up by far."""
    from transformers import TrainerCallback

    losses: list[float] = []

    class Rising(TrainerCallback):
        """Sets the rate of each step; groups with rates of their own keep their ratio to the others."""

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
            self.ratios = [group["lr"] / config.learning_rate for group in optimizer.param_groups]

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
            for group, ratio in zip(optimizer.param_groups, self.ratios, strict=True):
                group["lr"] = rates[state.global_step] * ratio

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> Any:
            if "loss" in logs:
                losses.append(float(logs["loss"]))
                smoothed = read_curve(rates[: len(losses)], losses).smoothed
                control.should_training_stop = not smoothed[-1] <= STOP_FACTOR * min(smoothed)
            return control

    try:
        Trainer(config, [Rising()]).train()
    except UserError:
        if len(losses) < FEWEST_STEPS:  # it is not that the rate has grown too far
            raise
    return losses
