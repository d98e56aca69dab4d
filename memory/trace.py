"""What a step did when: spans of time, written in the form that Perfetto and chrome://tracing read.

A step that ran and the same step as it was predicted go into one file as two processes, each with a track for the disk, the
link, compute and waiting: they lie over one another.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TRACKS = ("disk", "link", "link back", "compute", "waiting")  # from top to bottom; others follow


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time."""

    server: str  # what did it, one of `TRACKS`
    name: str
    start_seconds: float  # since the step began
    seconds: float


class Trace:
    """Spans of the last step that has ended; nothing of earlier ones is kept."""

    def __init__(self) -> None:
        self.spans: tuple[Span, ...] = ()
        self._open: list[Span] = []
        self._started = time.perf_counter()

    def begin_step(self) -> None:
        self._open = []
        self._started = time.perf_counter()

    def add(self, server: str, name: str, start: float, end: float) -> None:
        """start, end: of `time.perf_counter`."""
        if end > self._started:
            self._open.append(Span(server, name, max(0.0, start - self._started), end - max(start, self._started)))

    @contextmanager
    def span(self, server: str, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(server, name, start, time.perf_counter())

    def end_step(self) -> None:
        self.spans, self._open = tuple(self._open), []


def write_trace(path: Path, processes: Mapping[str, Sequence[Span]]) -> None:
    """Replaces `path`, for its user alone. processes: name -> spans. Raises OSError."""
    events: list[dict] = []
    for pid, (process, spans) in enumerate(processes.items(), start=1):
        tracks = dict.fromkeys((*TRACKS, *(span.server for span in spans)))
        numbers = {server: number for number, server in enumerate(tracks, start=1)}
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}})
        for server, tid in numbers.items():
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": server}})
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
        for span in sorted(spans, key=lambda span: span.start_seconds):
            events.append(
                {
                    "ph": "X", "pid": pid, "tid": numbers[span.server], "name": span.name,
                    "ts": span.start_seconds * 1e6, "dur": span.seconds * 1e6,
                }
            )  # fmt: skip
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
