"""Measured memory of this process: what the kernel counts, not what we believe.

`host_bytes` is anonymous plus shared memory, the part that cannot be dropped and that a budget must hold, and of mapped
files as much as a step runs of libraries' code. The kernel takes the rest of them back when it needs to, and what goes
through the page cache. But a limit of the kernel counts all pages, and code that has no room is read again and again.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

CODE_BYTES = 20 << 20
"""Pages of mapped files that a step of LoRA touches: 18 to 24 MiB by the kernel's own marks (`Referenced` in smaps, some of
them private copies that count as anonymous)."""

_STATUS = Path("/proc/self/status")


def host_bytes() -> int:
    """Resident anonymous and shared memory of this process now, and at most CODE_BYTES of mapped files. Exact on Linux to what
    the kernel counts per thread batch (some hundred KiB); elsewhere the unique or resident set, file pages included, an upper
    estimate."""
    if sys.platform.startswith("linux"):
        rss = _resident()
        return rss["RssAnon"] + rss["RssShmem"] + min(rss["RssFile"], CODE_BYTES)
    import psutil

    memory = psutil.Process().memory_full_info()
    return getattr(memory, "uss", memory.rss)


class MemoryMeter:
    """Peak of `host_bytes` over a time.

    The kernel keeps a peak for the whole resident set only (VmHWM, file pages included), so this one is sampled: exact
    at every `sample` call and every `interval_seconds` between, blind to a peak that comes and goes within one
    interval. Sample where memory is known to be highest. One reading costs about 30 microseconds.
    """

    def __init__(self, interval_seconds: float = 0.02) -> None:
        self._interval_seconds = interval_seconds
        self._lock = threading.Lock()
        self._peak_bytes = 0
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> MemoryMeter:
        """Begins sampling in the background; a second call does nothing."""
        if self._thread is None:
            self.sample()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stop,), name="memory-meter", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> int:
        """Ends sampling after a last sample; returns the peak. Safe to call twice."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = self._stop = None
            self.sample()
        return self.peak_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest sample since the meter was made or since `reset_peak`; 0 before the first."""
        return self._peak_bytes

    def sample(self) -> int:
        """Reads memory now, counts it for the peak, returns it."""
        now = host_bytes()
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, now)
        return now

    def reset_peak(self) -> None:
        """The peak begins again from what is resident now."""
        with self._lock:
            self._peak_bytes = host_bytes()

    def __enter__(self) -> MemoryMeter:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(self._interval_seconds):
            self.sample()


def _resident() -> dict[str, int]:
    with _STATUS.open("rb") as file:
        lines = [line.split() for line in file if line.startswith(b"Rss")]
    return {words[0].rstrip(b":").decode(): int(words[1]) * 1024 for words in lines}
