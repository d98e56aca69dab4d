"""Weights whose visits are traced: what a step waits for, computes, and does with a unit once its visit ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from finetune.memory.trace import Trace
from finetune.offload.step.weights import Block, Key, Weights


class TracedWeights:
    """A policy of `finetune.offload.step.weights` like `weights`. On an accelerator, times are those at which the host has
    enqueued."""

    def __init__(self, weights: Weights, trace: Trace) -> None:
        self._weights, self._trace = weights, trace
        self._began: dict[Key, float] = {}
        self._visited: set[Key] = set()
        """Blocks that this step has visited: the next visit is in backward."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def begin(self, order: Sequence[int]) -> None:
        self._visited.clear()
        self._weights.begin(order)

    def acquire(self, key: Key) -> None:
        with self._trace.span("waiting", _name(key)):
            self._weights.acquire(key)
        self._began[key] = time.perf_counter()

    def release(self, key: Key) -> None:
        ended = time.perf_counter()
        words = f"{_name(key)} backward" if key in self._visited else _name(key)
        self._visited.add(key)
        self._trace.add("compute", words, self._began.pop(key), ended)
        self._weights.release(key)
        if (now := time.perf_counter()) - ended > LEAST_SECONDS:
            self._trace.add("compute", f"update {_name(key)}", ended, now)


LEAST_SECONDS = 1e-3  # that letting a unit go takes where it is updated


def _name(key: Key) -> str:
    return f"block {key.index}" if type(key) is Block else f"head {key.index}"
