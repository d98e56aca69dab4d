"""The steps of a run, from where it is to the end of its schedule, and what is kept when they end before that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from finetune.data import BatchPlan
from finetune.memory.errors import UserError
from finetune.memory.meter import MemoryMeter
from finetune.methods.base import Method, StepResult
from finetune.objectives.errors import StepNotKept
from finetune.offload.streamed_model import Traffic
from finetune.reporting.progress import Progress
from finetune.reporting.report import MetricsWriter
from finetune.runs.signals import StoppedAtOnce
from finetune.runs.writes import WRITTEN, WriteCount
from finetune.session import Session
from finetune.training.after_step import AfterStep
from finetune.training.callbacks import Callbacks


class TrainingLoop:
    """stop_if_asked: raises `finetune.runs.signals.Stopped` where the user wants the run to end.

    step: updates done in all. losses, step_seconds: of the steps done here.
    """

    def __init__(
        self,
        session: Session,
        method: Method,
        batches: BatchPlan,
        meter: MemoryMeter,
        progress: Progress,
        stop_if_asked: Callable[[], None],
    ) -> None:
        self._session = session
        self._method = method
        self._batches = batches
        self._meter = meter
        self._progress = progress
        self._stop_if_asked = stop_if_asked
        self.first_step = self.step = method.first_step
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self._started = time.perf_counter()
        self._first_traffic = self._traffic = session.streamed.traffic()

    def run(self, callbacks: Callbacks, after: AfterStep, metrics: MetricsWriter, writes: WriteCount) -> None:
        """Raises KeyboardInterrupt when asked to stop and UserError when a step cannot be done, with what is done saved."""
        batches = self._batches
        batch = self.step + batches.skipped(metrics.last_row)
        with self._kept(after):
            self._do_what_was_left(batch, callbacks, after, metrics)
            while batch < batches.num_steps and not callbacks.should_stop:
                writes.check_next()
                callbacks.step_begin()
                row = self._do_step(batch) | {WRITTEN: writes.total_bytes}
                batch += 1
                metrics.write(row)
                self._progress.step(row)
                callbacks.step_end(row)
                after.settle(self.step, last=batch == batches.num_steps or callbacks.should_stop)
                if callbacks.should_end_epoch:
                    batch += -batch % batches.steps_per_epoch
                    metrics.amend({"epoch": batches.epoch(batch)})
                if batch % batches.steps_per_epoch == 0 or batch >= batches.num_steps or callbacks.should_stop:
                    callbacks.epoch_end()
                    after.settle(self.step, last=batch >= batches.num_steps or callbacks.should_stop)
                self._traffic = self._session.streamed.traffic()
                self._stop_if_asked()
        after.finish(self.step)
        metrics.amend({WRITTEN: writes.total_bytes})
        callbacks.train_end(self.training_loss, self.seconds)

    def _do_what_was_left(self, batch: int, callbacks: Callbacks, after: AfterStep, metrics: MetricsWriter) -> None:
        """An evaluation that was due after the step that the run goes on from, where a process was ended before or in it."""
        row = metrics.last_row
        if row is not None and row["step"] == self.step:
            callbacks.resumed(row, ends_epoch=batch % self._batches.steps_per_epoch == 0)
            after.settle(self.step, last=False)
            self._traffic = self._session.streamed.traffic()

    @property
    def training_loss(self) -> float:
        """Mean of the losses, NaN where there is none."""
        return float(np.mean(self.losses)) if self.losses else float("nan")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def moved_per_step(self) -> dict[str, float]:
        """Evaluations in mid-run included; under the names of the metrics."""
        return _difference(self._first_traffic, self._traffic, max(1, len(self.losses)))

    def _do_step(self, batch: int) -> dict[str, Any]:
        """The row of metrics of the next step. batch: of the plan of batches, further than the step where epochs were cut."""
        started = time.perf_counter()
        with self._session.streamed.step_traced():
            result: StepResult = self._method.step(self.step, self._batches.step(batch))
        self.step += 1
        seconds = time.perf_counter() - started
        before, self._traffic = self._traffic, self._session.streamed.traffic()
        self._meter.sample()
        self.losses.append(result.loss)
        self.step_seconds.append(seconds)
        return {
            "step": self.step,
            "epoch": self._batches.epoch(batch + 1),
            "loss": result.loss,
            "tokens": result.tokens,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            **result.more,
            "seconds": seconds,
            "tokens_per_s": result.tokens / seconds,
            **_difference(before, self._traffic),
            "host_peak_bytes": self._meter.peak_bytes,
            "device_peak_bytes": self._session.device.peak_bytes(),
        }

    @contextmanager
    def _kept(self, after: AfterStep) -> Iterator[None]:
        """Whatever ends the steps inside the block, what they did is kept where that is possible, and the user is told."""
        try:
            yield
        except StoppedAtOnce as stop:
            stop.step = after.saved_step
            raise
        except StepNotKept as error:
            left = self._method.rescue(self.step)
            if self.step:
                self._method.finish(self.step)
            else:
                left = f"Nothing was trained. {self._session.faulty_weight()}"
            raise UserError(f"{error}. {left}") from None
        except KeyboardInterrupt as stop:
            stop.step = self.step
            if self.step:
                after.leave(self.step)
                self._progress.message(f"stopped; the state after step {self.step} is saved in {self._session.config.output}")
            raise
        except Exception as error:
            left = self._method.rescue(self.step)
            if isinstance(error, OSError):
                place = f"{error.filename}: " if error.filename else ""
                raise UserError(f"{place}{error.strerror or error}. Make room, or mend it. {left}") from error
            if left not in str(error):
                self._progress.message(left)
            raise


def _difference(first: Traffic, last: Traffic, steps: int = 1) -> dict[str, float]:
    """Bytes moved and seconds stalled between two readings, per step, under the names of the metrics."""
    return {
        "disk_read_bytes": (last.read_bytes - first.read_bytes) // steps,
        "disk_write_bytes": (last.write_bytes - first.write_bytes) // steps,
        "stall_seconds": (last.stall_seconds - first.stall_seconds) / steps,
    }
