"""What Transformers' learning rate schedules take and refuse, known without importing Transformers.

The classes are the arguments of the schedules in `transformers.optimization`, beside the optimizer and the numbers of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Positive = Annotated[float, Field(gt=0)]
_Rate = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Shape = Literal["linear", "cosine", "1-sqrt"]


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Cosine(_Arguments):
    num_cycles: _Positive = 0.5


class _Restarts(_Arguments):
    num_cycles: Annotated[int, Field(ge=1)] = 1


class _Polynomial(_Arguments):
    lr_end: _Rate = 1e-7
    power: _Positive = 1.0


class _InverseSqrt(_Arguments):
    timescale: _Positive | None = None


class _MinLr(_Cosine):
    min_lr: _Rate | None = None
    min_lr_rate: _Share | None = None


class _WarmupMinLr(_MinLr):
    warmup_lr_rate: _Share | None = None


class _WarmupStableDecay(_Cosine):
    num_decay_steps: Annotated[int, Field(ge=0)]
    num_stable_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_type: _Shape = "linear"
    decay_type: _Shape = "cosine"
    min_lr_ratio: _Share = 0.0


SCHEDULES: dict[str, type[BaseModel]] = {
    "linear": _Arguments,
    "cosine": _Cosine,
    "cosine_with_restarts": _Restarts,
    "polynomial": _Polynomial,
    "constant": _Arguments,
    "constant_with_warmup": _Arguments,
    "inverse_sqrt": _InverseSqrt,
    "cosine_with_min_lr": _MinLr,
    "cosine_warmup_with_min_lr": _WarmupMinLr,
    "warmup_stable_decay": _WarmupStableDecay,
}


def argument_problems(schedule: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """What the schedule would not take, a line each."""
    kind = SCHEDULES[schedule]
    try:
        kind.model_validate(dict(arguments))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            name = str(problem["loc"][0])
            if problem["type"] == "missing":
                yield f"expected lr_scheduler_kwargs.{name} with lr_scheduler {schedule}, found none"
            elif problem["type"] == "extra_forbidden":
                takes = ", ".join(kind.model_fields) or "nothing"
                others = [other for other, its in SCHEDULES.items() if name in its.model_fields]
                hint = f"; {name} is of {', '.join(others)}" if others else ""
                yield f"expected lr_scheduler_kwargs to hold {takes} with lr_scheduler {schedule}, found {name}{hint}"
            else:
                expected = problem["msg"].removeprefix("Input should be ")
                yield f"expected lr_scheduler_kwargs.{name} to be {expected}, found {problem['input']!r}"
    if kind in (_MinLr, _WarmupMinLr):
        given = [name for name in ("min_lr", "min_lr_rate") if arguments.get(name) is not None]
        if len(given) != 1:
            found = "both" if given else "none"
            yield f"expected lr_scheduler_kwargs.min_lr or .min_lr_rate with lr_scheduler {schedule}, found {found}"


def rate_problem(schedule: str, arguments: Mapping[str, Any], learning_rate: float) -> str | None:
    """Why the schedule cannot begin at `learning_rate`; arguments: without problems of their own."""
    end = 1e-7 if schedule == "polynomial" else None
    end = arguments.get("lr_end" if schedule == "polynomial" else "min_lr", end)
    if end is None or end < learning_rate or (end == learning_rate > 0 and schedule != "polynomial"):
        return None
    name = "lr_end" if schedule == "polynomial" else "min_lr"
    return (
        f"expected training.learning_rate above the {name} of lr_scheduler {schedule}, {end:g}, found {learning_rate:g}: "
        f"lower training.lr_scheduler_kwargs.{name}"
    )


def warmup_steps(steps: int, ratio: float, num_steps: int) -> int:
    """Of a run of `num_steps`: `steps`, else the ratio's share of them, rounded up as Transformers rounds it."""
    return steps or math.ceil(num_steps * ratio)


def length_problem(schedule: str, arguments: Mapping[str, Any], warmup: int, num_steps: int) -> str | None:
    """Why a run of `num_steps` is too short for the schedule."""
    if schedule == "polynomial" and warmup >= num_steps:
        return f"expected a warm-up shorter than the run with lr_scheduler polynomial, found {warmup} of {num_steps} steps"
    if schedule == "warmup_stable_decay" and arguments.get("num_stable_steps") is None:
        decay = arguments["num_decay_steps"]
        if warmup + decay > num_steps:
            return (
                f"expected warm-up and lr_scheduler_kwargs.num_decay_steps of at most {num_steps} steps together, which the "
                f"run has, found {warmup} and {decay}"
            )
    return None


def warmup_note(schedule: str, warmup: int, num_steps: int) -> str | None:
    """What one may not expect of a warm-up."""
    if warmup and schedule == "constant":
        return (
            f"lr_scheduler constant has no warm-up: the {warmup} steps of warm-up are left out; "
            "constant_with_warmup has them"
        )
    if warmup >= num_steps > 0:
        return f"the warm-up of {warmup} steps is not over when the run ends after {num_steps}"
    return None
