"""The head of a step of several losses: it is read once for all of them.

Each loss runs in a greenlet of its own and does what it does alone. Where it acquires a chunk of the head it waits until all
others are there too, or have ended. Then the chunk is acquired, and one after the other goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from finetune.offload.step.weights import HeadChunk, HeadRows, Key, Weights


class HeadVisits:
    """The chunks of the head, for `TiledHead`: those of `weights`, whoever asks for them."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._parent: greenlet | None = None  # of the losses, while there are several

    def run(self, losses: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """What each of them returns."""
        self._parent = getcurrent()
        results: list[Any] = [None] * len(losses)
        waiting: dict[int, tuple[greenlet, HeadChunk]] = {}  # losses, by their number, and what they wait for

        def go_on(number: int, one: greenlet) -> None:
            found = one.switch()
            if one.dead:
                results[number] = found
                waiting.pop(number, None)
            else:
                waiting[number] = one, found

        try:
            for number, loss in enumerate(losses):
                go_on(number, greenlet(loss))
            while waiting:
                key = min((key for _, key in waiting.values()), key=lambda key: key.index)
                self._weights.acquire(key)
                for number, (one, wanted) in list(waiting.items()):
                    if wanted == key:
                        go_on(number, one)
                self._weights.release(key)
        finally:
            self._parent = None
        return results

    def begin_pass(self) -> None:
        self._weights.begin_pass()

    def enter(self, variant: int) -> None:
        self._weights.enter(variant)

    def acquire(self, key: Key) -> None:
        if self._parent is None:
            self._weights.acquire(key)
        else:
            grad_enabled = torch.is_grad_enabled()
            self._parent.switch(key)
            torch.set_grad_enabled(grad_enabled)

    def release(self, key: Key) -> None:
        if self._parent is None:
            self._weights.release(key)

    @property
    def head_rows(self) -> HeadRows:
        return self._weights.head_rows

    def trains(self, key: Key) -> bool:
        return self._weights.trains(key)

    def add_gradients(self, key: HeadChunk, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weights.add_gradients(key, weight, bias)
