"""A sweep: several LoRA runs over one base, which one read of its blocks serves. See docs/methods.md.

Each run ends as if it had run alone, bit for bit, in a directory of its own under the sweep's output.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.adapters.merging import can_merge
from finetune.adapters.side_by_side import Attached
from finetune.config import Config
from finetune.config.sweep import check_together
from finetune.data.tensor_rows import TensorRows
from finetune.memory.errors import UserError
from finetune.memory.meter import MemoryMeter
from finetune.memory.trace import Trace
from finetune.methods.base import make_method
from finetune.micro_batch_choice import settle_full_steps
from finetune.nearest_plans import nearest_named
from finetune.objectives.base import make_objective, objective_class
from finetune.one_run import ReadyRun, Run, check_start, full_shape, get_ready, identity_of, take_rows
from finetune.planned_run import PlannedRun
from finetune.prediction import with_prediction
from finetune.quantization.base import is_quantized
from finetune.reporting.ending import describe_result
from finetune.reporting.progress import LastingStream, Progress, fitted, say
from finetune.runs.directory import RunDirectory
from finetune.runs.disk import check_disk
from finetune.runs.signals import StopRequest, stop_requests
from finetune.session import Session
from finetune.sweeps.outcomes import (
    FAILED,
    FINISHED,
    STOPPED,
    WAITING,
    Outcome,
    print_table,
    ranked,
    read_outcomes,
    write_outcomes,
)
from finetune.sweeps.places import Prospect, describe_places, plan_places
from finetune.sweeps.seats import Seat, SharedBase
from finetune.sweeps.together import ModelOfRun, Together
from finetune.trainer import Trainer
from finetune.training.traces import write_traces

MakeCallbacks = Callable[[str], Sequence[Any]]
"""Given a run's name: Transformers `TrainerCallback` objects of its own."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """planned: of a step of all runs that step together, `together` of them, of `total`."""

    planned: PlannedRun
    together: int
    total: int
    words: str  # how many fit

    def describe(self) -> str:
        return f"{self.words}\n{self.planned.describe()}"

    @property
    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {"runs": self.total, "together": self.together, **self.planned.values}


class Sweep:
    """LoRA runs that differ in anything but the base, the machine and the budgets.

    configs: by name, which is that of a directory under their `output`, the same in all. own: by name, what a run has of its
    own, for the table.
    """

    def __init__(
        self, configs: Mapping[str, Config], own: Mapping[str, Mapping[str, Any]] | None = None,
        make_callbacks: MakeCallbacks = lambda name: (),
    ) -> None:  # fmt: skip
        check_together(configs)
        self.base = next(iter(configs.values()))
        self.output: Path = self.base.output
        self.configs = {
            name: config.model_copy(update={"output": self.output / name, "trace": None}) for name, config in configs.items()
        }
        self._own = own or {}
        self._make_callbacks = make_callbacks

    def plan(self) -> SweepPlan:
        """How many runs fit together with rows of full length, what would live where, and how long a step takes. Reads no data.
        Raises PlanRefused where not even one fits."""
        shared = Session(SharedBase(self.base), only_plan=True)
        try:
            objective_class(self.base).check_model(shared.parts)
            found = _Found(shared)
            for name, config in self.configs.items():
                seat = Seat(shared, make_method(config), only_plan=True)
                config, _ = settle_full_steps(config, seat)
                with nearest_named(seat, lambda config, seat=seat: seat.plan(full_shape(config, seat), elsewhere=True)):
                    planned = seat.plan(full_shape(config, seat), elsewhere=True)
                found.add(name, seat, replace(planned, num_steps=config.training.max_steps))
            return found.plan(elsewhere=True)
        finally:
            shared.close()

    def train(self) -> list[Outcome]:
        """Runs all to the ends of their schedules, those that wait as places become free, and prints the table of them. With
        `resume`, runs that have ended are left as they are, and the others go on from their states.

        Ctrl-C, SIGTERM and SIGHUP end the step at its next block, save the states of all runs and raise KeyboardInterrupt.
        Raises UserError for bad input, PlanRefused where not even one run fits; and, after the others have ended, UserError
        when runs have failed.
        """
        for config in (self.base, *self.configs.values()):
            check_start(config)
        if self.base.quantize is not None and not is_quantized(self.base):
            Trainer(self.base).plan()  # refuses before that work what it would refuse after it
        with stop_requests():
            return _Process(self.base, self.configs, self._own, self._make_callbacks).run()


class _Found:
    """What the runs of a sweep ask for, as they are looked at."""

    def __init__(self, shared: Session) -> None:
        self._shared = shared
        self._prospects: list[Prospect] = []
        self._heaviest: Attached | None = None

    def add(self, name: str, seat: Seat, planned: PlannedRun, ready: ReadyRun | None = None) -> None:
        held_out = None if ready is None else ready.held_out
        measured = None if held_out is None or held_out.shape is planned.shape else held_out.shape
        one = Prospect.of(name, seat, planned, measured)
        if not self._prospects or one.visit.flops > max(other.visit.flops for other in self._prospects):
            self._heaviest = seat.attached
        self._prospects.append(one)

    def plan(self, elsewhere: bool = False) -> SweepPlan:
        gc.collect()  # what seats have left: plans count what the process holds
        together, planned = plan_places(self._shared, self._prospects, self._heaviest, elsewhere)
        words = describe_places(together, self._prospects, planned)
        self._heaviest.put_on()
        bare, self._shared.model = self._shared.model, self._heaviest.model
        planned = with_prediction(self._shared, planned, needs_rates=not elsewhere)
        self._shared.model = bare
        self._heaviest.take_off()
        return SweepPlan(planned, together, len(self._prospects), words)


class _RunOfSweep:
    """One run among others, see `finetune.sweeps.together`. go: what it does."""

    def __init__(self, config: Config, callbacks: Sequence[Any], outcome: Outcome) -> None:
        self.config = config
        self.callbacks = callbacks
        self.outcome = outcome
        self.directory = RunDirectory(config.output)
        self.ready: ReadyRun | None = None
        self.about: dict[str, Any] = {}
        self.attached: Attached | None = None
        self.error: Exception | None = None
        self.go: Callable[[_RunOfSweep], None] | None = None
        self.when_ended: Callable[[], None] | None = None

    def run(self) -> None:
        self.outcome.state = STOPPED  # unless it comes to its end
        self.go(self)
        self.outcome.state = FINISHED

    def ended(self) -> None:
        self.attached = self.ready = None
        gc.collect()  # its adapter and optimizer go, for who comes next
        self.outcome.take(self.config.output)
        if self.error is not None:
            self.outcome.state, self.outcome.error = FAILED, " ".join(str(self.error).split())
        self.directory.close()
        self.when_ended()


class _Process:
    """A sweep from its rows to its table."""

    def __init__(
        self, base: Config, configs: Mapping[str, Config], own: Mapping[str, Mapping[str, Any]], make_callbacks: MakeCallbacks
    ) -> None:
        self._base = base
        before = read_outcomes(base.output) if base.resume else {}
        self._runs: list[_RunOfSweep] = []
        for name, config in configs.items():
            outcome = Outcome(name, str(config.output), dict(own.get(name, {})))
            earlier = before.get(name)
            if earlier is not None and earlier.state == FINISHED and (config.output / "adapter").is_dir():
                outcome = earlier
            callbacks = Trainer(config, make_callbacks(name)).callbacks
            self._runs.append(_RunOfSweep(config, callbacks, outcome))
        self._stop = StopRequest()
        self._plan: SweepPlan | None = None
        self._progress: Progress | None = None  # of the run that began last
        self._said: set[str] = set()

    def run(self) -> list[Outcome]:
        self._shared = Session(SharedBase(self._base))
        try:
            objective_class(self._base).check_model(self._shared.parts)
            waiting = self._look()
            if waiting:
                self._train(waiting)
        finally:
            self._shared.close()
            for one in self._runs:
                one.directory.close()
        outcomes = ranked([one.outcome for one in self._runs])
        print_table(outcomes, LastingStream(sys.stdout))
        if outcomes[0].state == FINISHED:
            is_text = self._shared.parts.head is not None
            words = f"\n{describe_result(Path(outcomes[0].output), True, is_text, can_merge(self._base))}"
            print(fitted(words, sys.stdout), file=LastingStream(sys.stdout), flush=True)
        failed = [one for one in outcomes if one.state == FAILED]
        if failed:
            words = "; ".join(f"{one.name}: {one.error}" for one in failed)
            raise UserError(f"{len(failed)} of {len(outcomes)} runs failed: {words}")
        return outcomes

    def _look(self) -> list[_RunOfSweep]:
        """Prepares the data of all runs and plans them; returns those that are to be done."""
        found, waiting = _Found(self._shared), []
        for one in self._runs:
            method = make_method(one.config)
            try:
                seat = Seat(self._shared, method, only_plan=True)
                data = take_rows(seat, one.directory, self._base.output, self._say_once)
                if isinstance(data, TensorRows):
                    raise UserError("expected rows of text in a sweep, found samples of tensors: start this run by itself")
                one.ready = get_ready(seat, method, data, one.directory, self._base.output)
                one.config, num_steps = seat.config, one.ready.batches.num_steps
                if one.outcome.state == FINISHED and one.outcome.num_steps == num_steps:
                    self._begin(one)  # refuses where it is another run
                    one.directory.close()
                    continue
            except UserError as error:
                raise _named(one.outcome.name, error) from None
            one.outcome.state, one.outcome.num_steps = WAITING, num_steps
            found.add(one.outcome.name, seat, one.ready.planned, one.ready)
            waiting.append(one)
        if waiting:
            self._plan = found.plan()
            check_disk(self._base, self._plan.planned.plan, sum(one.directory.earlier_bytes for one in waiting))
        return waiting

    def _say_once(self, line: str) -> None:
        """Runs over the same rows say the same of them."""
        if line not in self._said:
            self._said.add(line)
            say(line)

    def _begin(self, one: _RunOfSweep) -> None:
        try:
            identity = identity_of(one.config, self._shared.parts, one.ready)
            one.about = one.directory.begin(identity, one.ready.batches.num_steps)
        except UserError as error:
            raise _named(one.outcome.name, error) from None

    def _train(self, waiting: Sequence[_RunOfSweep]) -> None:
        plan, shared = self._plan, self._shared
        say(plan.describe())
        for one in waiting:
            self._begin(one)
            one.go, one.when_ended = self._go, self._write
        trace = None if self._base.trace is None else Trace()
        streamed = shared.open(plan.planned, self._base.output / "scratch", self._inside, trace=trace)
        for note in [*shared.notes, *streamed.notes]:
            say(note)
        try:
            with stop_requests(self._stop.ask):
                Together(streamed, plan.together).run(waiting)
        except Exception:
            for one in waiting:
                if isinstance(one.error, UserError):
                    raise _named(one.outcome.name, one.error) from None
            raise
        finally:
            self._write()
        if trace is not None:
            write_traces(self._base.trace, plan.planned, trace)

    def _go(self, one: _RunOfSweep) -> None:
        """A run, in its greenlet."""
        shared, config, ready, name = self._shared, one.config, one.ready, one.outcome.name
        streamed, planned = shared.streamed, self._plan.planned
        method = make_method(config)
        method.num_steps, method.about = ready.batches.num_steps, one.about
        seat = Seat(shared, method)
        one.attached = seat.attached
        seat.move_in()
        objective = make_objective(config, seat, ready.data)
        adapted = streamed.adapted(seat.model, seat.attached.put_on)
        seat.streamed = ModelOfRun(streamed, adapted, objective.make_loss(shared.parts.model, streamed.head))
        method.opened(seat)
        budgets = {key: getattr(planned.plan, key) for key in ("host_budget_bytes", "device_budget_bytes")}
        self._progress = Progress(ready.batches.num_steps, name=name, **budgets)
        meter = MemoryMeter().start()
        run = Run(
            seat, method, replace(ready, objective=objective), planned, meter, self._progress, self._stop.stop_if_asked
        )
        run.say([*one.directory.notes, *ready.notes, *seat.notes])
        try:
            run.go(one.callbacks)
        finally:
            meter.stop()
            run.progress.close()

    def _inside(self, phase: str, done: int, total: int) -> None:
        self._stop.stop_if_asked()
        if self._progress is not None:
            self._progress.inside(phase, done, total)

    def _write(self) -> None:
        """sweep.json, as things are."""
        plan, streamed = self._plan, self._shared.streamed
        about = {
            "together": plan.together,
            "disk_read_bytes": streamed.traffic().read_bytes,
            "host_budget_bytes": plan.planned.plan.host_budget_bytes,
            "predicted_host_peak_bytes": plan.planned.plan.host_peak_bytes,
        }
        write_outcomes(self._base.output, [one.outcome for one in self._runs], about)


def _named(name: str, error: UserError) -> UserError:
    return UserError(f"{name}: {error}")
