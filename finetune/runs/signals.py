"""SIGINT, SIGTERM and SIGHUP: asked once, a run stops in order; asked again after a moment, it stops at once.

A wrapper (`timeout`, `srun`, `uv run`, a package runner) often forwards what the terminal has sent to the whole group already.
So a signal that follows another within `REPEAT_SECONDS` is the same request, and is dropped.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

REPEAT_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_last_seconds = -math.inf  # when the newest signal of this process was taken


class Stopped(KeyboardInterrupt):
    """number: of the signal. step: the step whose state is saved, 0 where there is none."""

    def __init__(self, number: int, step: int = 0) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = int(number)
        self.step = step


class StoppedAtOnce(Stopped):
    """It was asked for again: nothing more is to be saved."""


class StopRequest:
    """What the user has asked for while steps run, in order: `ask` for `stop_requests`, `stop_if_asked` wherever a run can
    end."""

    def __init__(self) -> None:
        self._number: int | None = None  # of the signal

    def ask(self, number: int) -> None:
        """From a signal handler: whatever the main thread was about to write, it must not be entered again."""
        self._number = number
        words = (
            f"\n{signal.Signals(number).name}: stopping at the next block, the last whole step is saved.\nA second one after "
            f"{REPEAT_SECONDS:g} s stops at once, and saves nothing more\n"
        )
        with suppress(OSError):
            os.write(2, words.encode())

    def stop_if_asked(self) -> None:
        """Raises Stopped."""
        if self._number is not None:
            raise Stopped(self._number)


def take_signals(ask: Callable[[int], None] | None = None) -> dict[int, Any]:
    """From now on the first signal calls `ask(number)`, between any two operations of the main thread, and the next one raises
    StoppedAtOnce. ask: None raises Stopped. Returns the handlers that were there before.

    SIGHUP stays ignored where it is (`nohup`). In another thread than the main one, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    asked = False

    def take(number: int, frame: Any) -> None:
        global _last_seconds
        nonlocal asked
        now = time.monotonic()
        if now - _last_seconds < REPEAT_SECONDS:
            return
        _last_seconds = now
        if asked:
            raise StoppedAtOnce(number)
        asked = True
        if ask is None:
            raise Stopped(number)
        ask(number)

    numbers = [number for number in _SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, take) for number in numbers}


def ignore_signals() -> None:
    """For the end of a process, where the interpreter would bring the system's own handlers back."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_requests(ask: Callable[[int], None] | None = None) -> Iterator[None]:
    """`take_signals` inside the block."""
    previous = take_signals(ask)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
