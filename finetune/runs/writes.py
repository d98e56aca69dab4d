"""What a run writes to disk in all its steps and saves, and its limit `max_writes`: an SSD wears by what is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import psutil

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.plan import Plan
from finetune.memory.units import format_bytes, parse_bytes

WRITTEN = "written_bytes"  # in metrics: by the run so far, with saves and with what it did before it was resumed


def check_writes(config: Config, plan: Plan, step_bytes: int, num_steps: int, earlier_bytes: int = 0) -> None:
    """Raises UserError when `num_steps` more steps would write more than is left of `max_writes`.

    step_bytes: of a step, without what is saved after it. earlier_bytes: written already.
    """
    limit = _limit(config)
    save_bytes = plan.disk_parts.get("resumable states", 0) // (config.training.kept_states + 1)
    interval = _save_interval(config, num_steps)
    need = num_steps * step_bytes + -(-num_steps // interval) * save_bytes
    if limit is None or earlier_bytes + need <= limit:
        return
    of_step = step_bytes + save_bytes / interval
    steps = int(max(0, limit - earlier_bytes - save_bytes) / of_step)
    spent = f", of which {format_bytes(earlier_bytes)} are used" if earlier_bytes else ""
    words = f"enough for about {steps} steps: lower --max-steps" if steps else "not enough for one step: leave it out"
    raise UserError(
        f"max_writes: {num_steps} steps would write about {format_bytes(int(need))} to disk, {format_bytes(int(of_step))} a "
        f"step; {format_bytes(limit)} are allowed{spent}, {words}, raise --max-writes, or choose a method that writes less "
        "(finetune plan --compare)"
    )


def _save_interval(config: Config, num_steps: int) -> int:
    """Steps from one saved state to the next, at least: a better evaluation saves one too. Of epochs, as many as there are in a
    run that their number ends; else a state after every step is counted."""
    options = config.training
    epoch = 1 if options.max_steps else max(1, int(num_steps / options.epochs))
    steps = [options.save_steps, *([options.eval_steps] if options.load_best_model_at_end and options.eval_steps else [])]
    return min(epoch if one == "epoch" else one for one in steps)


class WriteCount:
    """Counts what this process writes, on top of what the run had written when it was left.

    rows: of the metrics of the run that goes on, those after the step that it goes on from among them: what they wrote is
    written.
    """

    def __init__(self, config: Config, rows: Iterable[Mapping[str, Any]]) -> None:
        self._limit = _limit(config)
        self.earlier_bytes = max((row.get(WRITTEN, 0) for row in rows), default=0)
        self._start = self._before = _written_by_process()
        self._largest = 0  # between two checks: a step, and what it may have saved

    @property
    def total_bytes(self) -> int:
        return self.earlier_bytes + _written_by_process() - self._start

    def check_next(self) -> None:
        """Raises UserError unless there is room for another step and a save, each as large as the largest so far."""
        now = _written_by_process()
        self._largest, self._before = max(self._largest, now - self._before), now
        if self._limit is not None and self.total_bytes + 2 * self._largest > self._limit:
            raise UserError(
                f"max_writes: {format_bytes(self.total_bytes)} of {format_bytes(self._limit)} are written, and a step writes "
                f"up to {format_bytes(self._largest)}: raise --max-writes and go on with --resume"
            )


def _limit(config: Config) -> int | None:
    return None if config.max_writes is None else parse_bytes(config.max_writes)


def _written_by_process() -> int:
    return psutil.Process().io_counters().write_bytes
