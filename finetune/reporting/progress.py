"""The live line of a run: one rewritten line on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any, Literal, TextIO

from memory.units import format_seconds

_REDRAW_SECONDS = 0.2
_LOG_STEP_SECONDS = 10.0
_LOG_PHASE_SECONDS = 30.0
_STEPS_AVERAGED = 10

Phase = Literal["forward", "head", "backward", "update", "fold", "evaluate"]


class LastingStream:
    """A text stream whose reader may go away (`| head`, a terminal that is closed): from then on what is written is dropped."""

    def __init__(self, stream: TextIO | None) -> None:
        """stream: None, what Python gives for a descriptor that was closed, drops everything."""
        self._stream: TextIO = stream or open(os.devnull, "w")

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What is still in the buffer goes there too: at the end of the process that would be another error.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())


class Progress:
    """Shows where a run is. `step` after each step, `inside` as often as one likes (a clock is read, rarely more).

    On a terminal the line is redrawn at most five times a second. Elsewhere a step is written when ten seconds have
    passed since the last line (the first and the last always), and the inside of a step when thirty have.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        host_budget_bytes: int,
        device_budget_bytes: int | None = None,
        first_step: int = 0,
        stream: TextIO | None = None,
        name: str = "",
    ) -> None:
        """`first_step`: steps done before this run, when it goes on from an earlier one. `name`: of the run, where it is one of
        several that are shown."""
        self._name = f"{name}: " if name else ""
        self._stream = LastingStream(sys.stderr if stream is None else stream)
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._total_steps = total_steps
        self._host_budget_bytes = host_budget_bytes
        self._device_budget_bytes = device_budget_bytes
        self._recent_seconds: deque[float] = deque(maxlen=_STEPS_AVERAGED)
        self._done_steps = first_step
        self._line = f"{self._name}step {first_step}/{total_steps}"
        self._last_shown = monotonic()
        self._shown = False

    def step(self, row: Mapping[str, Any]) -> None:
        """A step has ended; `row` has the keys of `report.METRIC_KEYS`."""
        self._done_steps = row["step"]
        self._recent_seconds.append(row["seconds"])
        self._line = self._describe(row)
        waited_enough = monotonic() - self._last_shown >= (_REDRAW_SECONDS if self._live else _LOG_STEP_SECONDS)
        if waited_enough or len(self._recent_seconds) == 1 or self._done_steps >= self._total_steps:
            self._show(self._line)

    def inside(self, phase: Phase, done: int, total: int, waiting_for: str | None = None) -> None:
        """`done` of `total` visits of this phase are over; `waiting_for` names the link that is waited for, if any."""
        if monotonic() - self._last_shown < (_REDRAW_SECONDS if self._live else _LOG_PHASE_SECONDS):
            return
        waiting = f", waiting for {waiting_for}" if waiting_for else ""
        self._show(f"{self._line}  | {phase} {done}/{total}{waiting}")

    def message(self, text: str) -> None:
        """A lasting line, above the live one."""
        text = f"{self._name}{text}"
        self._stream.write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
        if self._live:
            self._show(self._line)
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line; what is written next starts on a line of its own."""
        if self._live and self._shown:
            self._show(self._line)
            self._stream.write("\n")
            self._stream.flush()
            self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _describe(self, row: Mapping[str, Any]) -> str:
        seconds = max(row["seconds"], 1e-9)
        disk_gbps = (row["disk_read_bytes"] + row["disk_write_bytes"]) / seconds / 1e9
        parts = [
            f"{self._name}step {row['step']}/{self._total_steps}",
            f"loss {row['loss']:.4f}",
            f"{row['tokens_per_s']:.0f} tok/s",
            f"disk {disk_gbps:.2f} GB/s",
            f"stall {100 * row['stall_seconds'] / seconds:.0f}%",
            f"host {_of_budget(row['host_peak_bytes'], self._host_budget_bytes)}",
        ]
        if self._device_budget_bytes is not None:
            parts.append(f"device {_of_budget(row['device_peak_bytes'], self._device_budget_bytes)}")
        left_steps = self._total_steps - self._done_steps
        parts.append(f"ETA {_clock(left_steps * sum(self._recent_seconds) / len(self._recent_seconds))}")
        return "  ".join(parts)

    def _show(self, line: str) -> None:
        if self._live:
            columns = shutil.get_terminal_size().columns
            self._stream.write(f"\r\x1b[K{line[: columns - 1]}")
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()
        self._last_shown = monotonic()
        self._shown = True


class Ticker:
    """Says now and then how far a long piece of work is."""

    def __init__(self, work: str) -> None:
        self._work = work
        self._started = self._said = monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = monotonic()
        if now - self._said >= _LOG_STEP_SECONDS and 0 < done < total:
            self._said = now
            left = (now - self._started) * (total - done) / done
            say(f"{self._work}: {done / total:.0%}, about {format_seconds(left)} left")


def say(words: str) -> None:
    """A line for who watches, not for who reads the output."""
    print(words, file=LastingStream(sys.stderr), flush=True)


def _of_budget(used_bytes: int, budget_bytes: int) -> str:
    return f"{used_bytes / 2**30:.2f}/{budget_bytes / 2**30:.2f} GiB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours or days else f"{minutes}:{seconds:02}"
    return f"{days}d {clock}" if days else clock
