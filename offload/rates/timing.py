"""How long something takes, found by doing it again and again for a moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from finetune.offload.devices import Device

_GROUP_SECONDS = (
    2e-3  # of calls that are timed together: longer than the clock, and than what waiting for a device costs
)
_LEAST_GROUPS = 3


def seconds_of(call: Callable[[], object], device: Device, seconds: float) -> float:
    """The median of what a call takes, its work on the device included. seconds: for how long it is called, about; at least
    four times, the first of which does not count."""

    def group(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        device.synchronize(device.record())
        return time.perf_counter() - started

    spent = group(1)  # kernels are loaded, clocks are up
    calls, last = 1, group(1)
    while last < min(_GROUP_SECONDS, seconds):
        spent, calls = spent + last, 2 * calls
        last = group(calls)
    groups = [last]
    while len(groups) < _LEAST_GROUPS or spent + sum(groups) < seconds:
        groups.append(group(calls))
    return statistics.median(groups) / calls
