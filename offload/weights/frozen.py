"""Weights as they are stored."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.offload.step.weights import HeadRows, Key
from finetune.offload.weights.streamed_parts import Room, StreamedParts, read_edges


class FrozenWeights:
    """A policy of `finetune.offload.step.weights`: there is one variant of the weights, and they are not trained."""

    def __init__(self, room: Room) -> None:
        head = room.parts.head
        self._streamed = StreamedParts(room, room.parts.layouts, () if head is None else head.layouts)
        for edge, stored in read_edges(room.io, room.parts.edges):
            edge.install(edge.source.decode(stored, edge.dtype).to(room.device.torch_device))

    @property
    def stall_seconds(self) -> float:
        return self._streamed.stall_seconds

    @property
    def head_rows(self) -> HeadRows:
        return self._streamed.head_rows

    def begin_pass(self) -> None:
        self._streamed.begin_head()

    def begin(self, order: Sequence[int]) -> None:
        self._streamed.begin(order)

    def enter(self, variant: int) -> None:
        """Nothing to change."""

    def acquire(self, key: Key) -> None:
        self._streamed.bind(key, self._streamed.acquire(key))

    def release(self, key: Key) -> None:
        self._streamed.unbind(key)
        self._streamed.release(key)

    def trains(self, key: Key) -> bool:
        return False
