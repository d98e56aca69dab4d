"""The live line of a run: one rewritten line on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any, TextIO

from finetune.memory.units import format_seconds

_REDRAW_SECONDS = 0.2
_LOG_STEP_SECONDS = 10.0
_LOG_PHASE_SECONDS = 30.0
_STEPS_AVERAGED = 10

_SHOWN = ("step", "eta", "inside", "loss", "memory", "host", "tokens", "disk", "stall")  # parts of a line, in their order
_WORTH = ("step", "eta", "inside", "memory", "loss", "host", "tokens", "stall", "disk")  # where not all have room


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
    """Shows where a run is, or where a measurement is, which has no steps. `step` after each step, `inside` as often as one
    likes (a clock is read, rarely more).

    On a terminal the line is redrawn at most five times a second, with as much as its width has room for. Elsewhere a step is
    written when ten seconds have passed since the last line (the first and the last always), and the inside of a step when
    thirty have.
    """

    def __init__(
        self,
        total_steps: int | None,
        *,
        host_budget_bytes: int,
        device_budget_bytes: int | None = None,
        step_seconds: float | None = None,
        peak_bytes: Callable[[], int] | None = None,
        stream: TextIO | None = None,
        name: str = "",
    ) -> None:
        """total_steps: None: there are none. step_seconds: as predicted, until steps were measured. peak_bytes: of host memory,
        asked for whenever a line is written. name: of the run, where it is one of several that are shown."""
        self._name = f"{name}: " if name else ""
        self._stream = LastingStream(sys.stderr if stream is None else stream)
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._total_steps = total_steps
        self._host_budget_bytes = host_budget_bytes
        self._device_budget_bytes = device_budget_bytes
        self._predicted_seconds = step_seconds
        self._peak_bytes = peak_bytes
        self._recent_seconds: deque[float] = deque(maxlen=_STEPS_AVERAGED)
        self._done_steps = 0
        self._row: Mapping[str, Any] = {}
        self._work = self._inside = ""
        self._work_share = 0.0
        self._last_shown = self._step_began = self._work_began = monotonic()
        self._shown = False

    def begin_at(self, step: int) -> None:
        """So many steps were done by earlier processes."""
        self._done_steps = step
        self._step_began = monotonic()

    def step(self, row: Mapping[str, Any]) -> None:
        """A step has ended; `row` has the keys of `report.METRIC_KEYS`."""
        self._done_steps, self._row, self._inside = row["step"], row, ""
        self._recent_seconds.append(row["seconds"])
        self._step_began = monotonic()
        waited_enough = monotonic() - self._last_shown >= (_REDRAW_SECONDS if self._live else _LOG_STEP_SECONDS)
        if waited_enough or len(self._recent_seconds) == 1 or self._done_steps >= self._total_steps:
            self._show()

    def inside(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` visits (of a fold: bytes) of this phase are over."""
        self._inside = f"{phase} {done / max(1, total):.0%}" if phase == "fold" else f"{phase} {done}/{total}"
        self._show_now_and_then()

    def work(self, words: str, done: int, total: int) -> None:
        """From now on steps wait for something else, of which `done` of `total` is over; all of it: they go on."""
        if not self._work:
            self._work_began = monotonic()
        self._work, self._inside, self._work_share = f"{words} {done}/{total}", "", done / max(1, total)
        self._show_now_and_then()
        if done >= total:
            self._step_began += monotonic() - self._work_began
            self._work = ""

    def message(self, text: str) -> None:
        """A lasting line, above the live one."""
        text = fitted(f"{self._name}{text}", self._stream)
        self._stream.write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
        if self._live:
            self._show()
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line; what is written next starts on a line of its own. Of a measurement it goes away."""
        if self._total_steps is None:
            self.clear()
        elif self._live and self._shown:
            self._inside = self._work = ""
            self._show()
            self._stream.write("\n")
            self._stream.flush()
            self._shown = False

    def clear(self) -> None:
        """Takes the live line away: what is written next stands in its place."""
        if self._live and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show_now_and_then(self) -> None:
        if monotonic() - self._last_shown >= (_REDRAW_SECONDS if self._live else _LOG_PHASE_SECONDS):
            self._show()

    def _show(self) -> None:
        parts = self._parts()
        if self._live:
            columns = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{_fitting(parts, columns)}")
        else:
            self._stream.write("  ".join(parts[name] for name in _SHOWN if name in parts) + "\n")
        self._stream.flush()
        self._last_shown = monotonic()
        self._shown = True

    def _parts(self) -> dict[str, str]:
        """What there is to say, by the names of `_SHOWN`."""
        row, parts = self._row, {}
        if self._total_steps is not None:
            parts["step"] = f"{self._name}step {self._done_steps}/{self._total_steps}"
        if (left := self._seconds_left()) is not None:
            is_predicted = self._total_steps is not None and not self._recent_seconds
            parts["eta"] = f"ETA {'~' * is_predicted}{_clock(left)}"
        if inside := ", ".join(filter(None, [self._work, self._inside])):
            parts["inside"] = inside
        peak_bytes = max(row.get("host_peak_bytes", 0), self._peak_bytes() if self._peak_bytes else 0)
        if peak_bytes:
            parts["memory"] = f"host {_of_budget(peak_bytes, self._host_budget_bytes)}"
        if row:
            seconds = max(row["seconds"], 1e-9)
            disk_gbps = (row["disk_read_bytes"] + row["disk_write_bytes"]) / seconds / 1e9
            parts["loss"] = f"loss {row['loss']:.4f}"
            parts["tokens"] = f"{row['tokens_per_s']:.0f} tok/s"
            parts["disk"] = f"disk {disk_gbps:.2f} GB/s"
            parts["stall"] = f"stall {100 * row['stall_seconds'] / seconds:.0f}%"
            if self._device_budget_bytes is not None:
                parts["host"] = parts["memory"]
                parts["memory"] = f"device {_of_budget(row['device_peak_bytes'], self._device_budget_bytes)}"
        return parts

    def _seconds_left(self) -> float | None:
        """None: nothing is known of it yet."""
        if self._total_steps is None:
            waited, share = monotonic() - self._work_began, self._work_share
            return waited * (1 - share) / share if share else None
        recent = self._recent_seconds
        seconds = sum(recent) / len(recent) if recent else self._predicted_seconds
        if seconds is None:
            return None
        left_steps = self._total_steps - self._done_steps
        under_way = 0.0 if self._work or not left_steps else min(seconds, monotonic() - self._step_began)
        return left_steps * seconds - under_way


def _fitting(parts: Mapping[str, str], columns: int) -> str:
    """As many of the parts as so many columns have room for, those of the most worth first."""
    room, chosen = columns, set()
    for name in _WORTH:
        if name in parts and len(parts[name]) <= room:
            chosen.add(name)
            room -= len(parts[name]) + 2
    return "  ".join(parts[name] for name in _SHOWN if name in chosen)


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


def fitted(text: str, stream: Any) -> str:
    """`text`, with lines that are too long for a terminal broken between words. stream: where it will be written."""
    if not stream.isatty():
        return text
    columns, lines = shutil.get_terminal_size().columns, []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())] + "  "
        wrapped = textwrap.wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += wrapped if len(line) > columns else [line]
    return "\n".join(lines)


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
