"""What fits, and what it would cost another way: the longest row, the largest batch, the least memory; each method's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.memory.units import format_bytes, format_seconds
from finetune.methods.base import make_method
from finetune.methods.registry import METHODS
from finetune.micro_batch_choice import settle_full_steps, with_micro_batch_size
from finetune.objectives.base import objective_class
from finetune.planned_run import PlannedRun
from finetune.prediction import predict_step, with_prediction
from finetune.session import Session

TOKENS = 16  # of which the longest row is a multiple
MOST_TOKENS = 1 << 20
MOST_ROWS = 1 << 12
MOST_BATCH = 1 << 14


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits in the budgets, each with everything else as it is configured; 0: nothing does. In bytes where it is memory."""

    sequence_length: int  # tokens of a row
    micro_batch_size: int  # rows that compute together
    batch_size: int  # rows of a step
    host_bytes: int  # the least that a run works in
    device_bytes: int | None  # None: the device computes in host memory

    def describe(self) -> str:
        device = "" if self.device_bytes is None else f" and {format_bytes(self.device_bytes)} on the device"
        return (
            f"with everything else as it is, rows may have up to {self.sequence_length} tokens, micro-batches up to "
            f"{self.micro_batch_size} rows, batches up to {self.batch_size} rows\n"
            f"the least memory that this run works in: {format_bytes(self.host_bytes)}{device}"
        )


def find_limits(config: Config, planned: PlannedRun) -> Limits:
    """Of steps with text. planned: as it is configured. Raises UserError, as a plan does."""
    if planned.choice is not None:
        config = with_micro_batch_size(config, planned.choice.size)
    session = Session(make_method(config), only_plan=True)
    session.process_bytes = planned.process_bytes
    try:
        objective_class(config).check_model(session.parts)
        return _find_limits(config, session)
    finally:
        session.close()


def _find_limits(config: Config, session: Session) -> Limits:
    made_for = getattr(session.parts.model.config.get_text_config(), "max_position_embeddings", None)

    def fits(tokens: int = 0, **training: int) -> bool:
        changed = config.model_copy(update={"training": config.training.model_copy(update=training)})
        try:
            shape = objective_class(config).full_shape(changed, session, tokens or config.dataset.sequence_length)
            session.plan(shape, elsewhere=True)
        except PlanRefused:
            return False
        return True

    shape = objective_class(config).full_shape(config, session, config.dataset.sequence_length)
    host_bytes, device_bytes = session.least_memory(shape)
    return Limits(
        TOKENS * largest(lambda n: fits(TOKENS * n), (made_for or MOST_TOKENS) // TOKENS),
        largest(lambda n: fits(micro_batch_size=n, batch_size=max(n, config.training.batch_size)), MOST_ROWS),
        largest(lambda n: fits(batch_size=n), MOST_BATCH),
        host_bytes,
        device_bytes,
    )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all smaller ones do; 0: none."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class MethodCost:
    """Of a step with one method."""

    method: str
    planned: PlannedRun | None  # with a prediction; None: it does not run so
    reason: str = ""  # why not, in words
    least_bytes: int = 0  # of host memory, 0: not known

    @property
    def values(self) -> dict[str, Any]:
        """By name, for JSON."""
        found: dict[str, Any] = {"method": self.method}
        if self.planned is None:
            return found | {"refused": self.reason, "least_host_bytes": self.least_bytes or None}
        step = predict_step(self.planned, self.planned.rates, self.planned.timing) if self.planned.rates else None
        return found | {
            "host_peak_bytes": self.planned.plan.host_peak_bytes,
            "least_host_bytes": self.least_bytes,
            "step_seconds": step and step.seconds,
            "tokens_per_second": step and self.planned.step_tokens / step.seconds,
            "disk_read_bytes": step and step.read_bytes,
            "disk_write_bytes": step and step.write_bytes,
        }


def compare_methods(config: Config, planned: PlannedRun) -> list[MethodCost]:
    """Every method with this model, batch and budgets, and what else is configured for it, less other adapters where none is
    named. planned: as it is configured."""
    configs = [config.model_copy(update={"method": method}) for method in METHODS]
    return [_cost(one, planned) for one in configs if one.adapter_kind != "adapter" or one.adapter.type is not None]


def _cost(config: Config, like: PlannedRun) -> MethodCost:
    sections = config.preference, config.adapter
    if problems := [conflict.problem for section in sections for conflict in section.conflicts_with(config)]:
        return MethodCost(config.method, None, problems[0])
    try:
        session = Session(make_method(config), only_plan=True)
    except UserError as error:
        return MethodCost(config.method, None, _first_line(error))
    session.process_bytes = like.process_bytes
    try:
        config = settle_full_steps(config, session)[0]
        shape = objective_class(config).full_shape(config, session, config.dataset.sequence_length)
        planned = with_prediction(session, session.plan(shape, elsewhere=True))
        return MethodCost(config.method, planned, least_bytes=session.least_memory(shape)[0])
    except PlanRefused as refused:
        return MethodCost(config.method, None, "does not fit", refused.smallest_bytes)
    except UserError as error:
        return MethodCost(config.method, None, _first_line(error))
    finally:
        session.close()


def describe_costs(costs: Sequence[MethodCost]) -> str:
    """A table."""
    rows = [("method", "least memory", "planned", "a step", "tokens/s", "read a step", "written a step")]
    for cost in costs:
        found = cost.values
        if cost.planned is None:
            least = format_bytes(cost.least_bytes) if cost.least_bytes else ""
            rows.append((cost.method, least, cost.reason))
            continue
        seconds = found["step_seconds"]
        rows.append(
            (
                cost.method,
                format_bytes(found["least_host_bytes"]),
                format_bytes(found["host_peak_bytes"]),
                *(
                    ("", "", "", "")
                    if seconds is None
                    else (
                        format_seconds(seconds),
                        f"{found['tokens_per_second']:.0f}",
                        format_bytes(found["disk_read_bytes"]),
                        format_bytes(found["disk_write_bytes"]),
                    )
                ),
            )
        )
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in whole) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 or len(row) < len(rows[0]) and i > 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    )


def _first_line(error: UserError) -> str:
    return str(error).splitlines()[0]
