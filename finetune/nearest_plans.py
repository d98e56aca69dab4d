"""What would fit in place of a plan that is refused: the mildest value of every key that helps, each found by planning with it.

What does not fit does not fit when it is larger: of each key, the largest value that fits is searched. What leaves the run's
numbers as they are comes first, then what changes how they are rounded, what is trained on, and how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.plan import SPREAD_BYTES, PlanRefused
from finetune.memory.units import MIB, format_mib, format_seconds, round_up
from finetune.methods.base import make_method
from finetune.micro_batch_choice import sizes, with_micro_batch_size
from finetune.objectives.base import objective_class
from finetune.offload.sizing.calibration import Rates, try_rates
from finetune.planned_run import SHORTEST_ROW, PlannedRun
from finetune.prediction import count_step, described_device, predict_step
from finetune.sequence_chunk_choice import chunk_sizes
from finetune.session import Session

MOST_PLANS = 4
ROW_STEP = 16  # tokens: rows are shortened by multiples
OTHER_METHODS = ("lora", "zo")  # that need little: tried where the run has another
_COUNTS = ("resident_blocks", "kept_graphs", "lookahead", "expert_slots")  # keys of `engine`, the less the smaller

Plan = Callable[[Config], PlannedRun]
"""The plan of the session for a configuration that differs from its own in budgets, batch or engine; raises PlanRefused."""


class Knobs(NamedTuple):
    """What may be changed beside budgets, engine and micro-batches."""

    rows_can_be_cut: bool = True
    method_can_be_another: bool = True


@dataclass(frozen=True, slots=True)
class NearPlan:
    """A plan that fits."""

    changes: Mapping[str, Any]  # of the configuration: values by dotted keys
    least_bytes: int  # of host memory, that it works in
    least_device_bytes: int | None  # None: the device computes in host memory
    seconds: float | None  # predicted of a step; None: the model's files cannot be read

    @property
    def words(self) -> str:
        """As the user types it, and what that takes."""
        device = "" if self.least_device_bytes is None else f" and {format_mib(self.least_device_bytes)} on the device"
        seconds = "" if self.seconds is None else f", about {format_seconds(self.seconds)} a step"
        typed = " ".join(_typed(key, value) for key, value in self.changes.items())
        return f"{typed}: {format_mib(self.least_bytes)}{device}{seconds}"


def _with_nearest(session: Session, plan: Plan, refused: PlanRefused, knobs: Knobs) -> PlanRefused:
    before = session.config, session.process_bytes
    try:
        session.process_bytes = session.process_bytes or session.planner.process_bytes
        search = _Search(session, plan, refused, knobs)
        return refused.with_nearest([found.words for found in search.run()])
    finally:
        session.settle(before[0])
        session.process_bytes = before[1]


@contextlib.contextmanager
def nearest_named(session: Session, plan: Plan, knobs: Knobs = Knobs()) -> Iterator[None]:
    """Inside, a refused plan says what would fit. Takes the time of some plans. session: whose plan it is, not open."""
    try:
        yield
    except PlanRefused as refused:
        raise _with_nearest(session, plan, refused, knobs) from None


class _Search:
    def __init__(self, session: Session, plan: Plan, refused: PlanRefused, knobs: Knobs) -> None:
        self._session, self._plan, self._refused, self._knobs = session, plan, refused, knobs
        self._config = with_micro_batch_size(session.config, session.config.training.least_micro_batch_size)
        limits = session.planner.limits
        # The process is not as large at every start.
        self._budgets = {"host_memory": limits.host_bytes - SPREAD_BYTES}
        if limits.device_bytes is not None:
            self._budgets["device_memory"] = limits.device_bytes
        self._rates: Rates | None = None

    def run(self) -> list[NearPlan]:
        """The best first."""
        found: list[NearPlan] = []
        for kind in (self._more_memory, self._engine, self._chunks, self._batch, self._method):
            with contextlib.suppress(UserError):  # what a change would be refused for otherwise
                found += kind()
            if len(found) >= MOST_PLANS or kind == self._engine and self._config.resume:
                break  # a run that goes on keeps its numbers
        return found[:MOST_PLANS]

    def _try(self, changes: Mapping[str, Any]) -> NearPlan | None:
        """None: it does not fit."""
        session, config = self._session, _changed(self._config, self._budgets | dict(changes))
        session.settle(config)
        try:
            planned = self._plan(config)
        except PlanRefused:
            return None
        return self._near(session, changes, planned)

    def _near(self, session: Session, changes: Mapping[str, Any], planned: PlannedRun) -> NearPlan:
        return NearPlan(changes, *session.planner.least_bytes(planned.needs), self._seconds(session, planned))

    def _seconds(self, session: Session, planned: PlannedRun) -> float | None:
        device = described_device(session)
        if device is not None:
            return count_step(session, planned, device).seconds
        if self._rates is None:
            self._rates = try_rates(session.parts, session.device, max(16, min(2048, planned.shape.rows)))
        return predict_step(planned, self._rates).seconds if self._rates else None

    def _largest(self, key: str, values: list[Any], **also: Any) -> NearPlan | None:
        """With the last of the `values`, from small to large, that fits; None: not even the first one does."""
        best, low, high = self._try({key: values[0]} | also), 0, len(values)
        while best is not None and high - low > 1:
            middle = (low + high) // 2
            near = self._try({key: values[middle]} | also)
            best, low, high = (best, low, middle) if near is None else (near, middle, high)
        return best

    def _more_memory(self) -> Iterator[NearPlan]:
        changes: dict[str, Any] = {}
        refused, session = self._refused, self._session
        for _ in self._budgets:
            spread = SPREAD_BYTES if refused.key == "host_memory" else 0
            budget = round_up(refused.smallest_bytes + spread, MIB)
            if budget > session.planner.most_bytes(refused.key):
                return
            changes[refused.key] = f"{budget // MIB}MiB"
            config = _changed(self._config, self._budgets | changes)
            session.settle(config)
            try:
                planned = self._plan(config)
            except PlanRefused as error:  # the other tier is too small too
                refused = error
                continue
            yield self._near(session, changes, planned)
            return

    def _engine(self) -> list[NearPlan]:
        """The fastest first."""
        engine, found = self._config.engine, []
        for name in _COUNTS:
            least = 1 if name == "expert_slots" else 0
            value = getattr(engine, name)
            if value is not None and value > least:
                found.append(self._largest(f"engine.{name}", list(range(least, value))))
        if engine.activations == "host":
            found.append(self._try({"engine.activations": "disk"}))
        return sorted(filter(None, found), key=lambda near: near.seconds or 0.0)

    def _chunks(self) -> Iterator[NearPlan]:
        """Of texts: the same numbers, rounded otherwise."""
        before, length = self._config.engine.sequence_chunk, self._config.dataset.sequence_length
        sizes = chunk_sizes(before if isinstance(before, int) else length)
        near = self._largest("engine.sequence_chunk", sizes) if sizes else None
        if near is not None:
            yield near

    def _batch(self) -> Iterator[NearPlan]:
        training, key = self._config.training, "training.micro_batch_size"
        rows = min(training.least_micro_batch_size, training.batch_size)
        fewer = sizes(rows)[:-1]
        near = self._largest(key, fewer) if fewer else None
        if near is not None:
            yield near
        lengths = list(range(SHORTEST_ROW, self._config.dataset.sequence_length, ROW_STEP))
        if not lengths or not self._knobs.rows_can_be_cut:
            return
        shorter = self._largest("dataset.sequence_length", lengths)
        if shorter is None and near is None and fewer:
            shorter = self._largest("dataset.sequence_length", lengths, **{key: 1})
        if shorter is not None:
            yield shorter

    def _method(self) -> Iterator[NearPlan]:
        config = self._config
        for name in OTHER_METHODS:
            if name == config.method or not self._knobs.method_can_be_another:
                continue
            try:
                other = _checked(config, {"method": name})
                session = Session(make_method(_changed(other, self._budgets)), only_plan=True)
            except UserError:  # what is set does not go with it
                continue
            session.process_bytes = self._session.process_bytes
            try:
                shape = objective_class(other).full_shape(other, session, other.dataset.sequence_length)
                yield self._near(session, {"method": name}, session.plan(shape, elsewhere=True))
                return
            except PlanRefused:
                continue
            finally:
                session.close()


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """changes: values by dotted keys, that go with the rest."""
    update: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            before = update.get(section, getattr(config, section))
            update[section] = before.model_copy(update={name: value})
        else:
            update[name] = value
    return config.model_copy(update=update)


def _checked(config: Config, changes: Mapping[str, Any]) -> Config:
    """Raises ConfigError where they do not go with the rest."""
    return Config(**{key: getattr(config, key) for key in config.model_fields_set} | dict(changes))


_FLAGS = {"training.micro_batch_size": "--micro-batch-size", "dataset.sequence_length": "--sequence-length"}


def _typed(key: str, value: Any) -> str:
    if key.startswith("engine."):
        return f"--set {key}={value}"
    return f"{_FLAGS.get(key, '--' + key.replace('_', '-'))} {value}"
