"""Bytes that move between a file and a buffer, and the one machine that says where they are.

Blocks of a tier, optimizer state, block inputs and gradients on disk, chunks of a checkpoint that is copied: all are pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch

from finetune.memory.slots import Lease, Slab, SlotPool
from finetune.memory.units import PAGE_BYTES, round_up

T = TypeVar("T")


class State(Enum):
    """Where a piece is. Only `Piece` changes it."""

    AWAY = "away"  # where it comes from, and nowhere else
    FETCHING = "fetching"  # on its way into a buffer
    READY = "ready"  # in a buffer, nobody uses it
    IN_USE = "in use"  # between `acquire` and `release` or `write`
    WRITING = "writing"  # on its way out of a buffer


class Mover(Protocol):
    """Moves bytes: an `finetune.offload.residency.io.IOEngine`, or what copies between host and device."""

    def submit_reads(self, extents: Sequence[Any]) -> Any:
        """Starts to fill a buffer; returns a ticket."""

    def submit_writes(self, extents: Sequence[Any]) -> Any: ...

    def wait(self, ticket: Any) -> float:
        """Seconds that the host has waited. What the transfer failed with is raised, at every call."""

    def done(self, ticket: Any) -> bool: ...


class Piece:
    """Some bytes, which are fetched into a buffer, used there, and maybe written from there.

    Every change is checked against the state that it leaves, before anything moves; any other raises RuntimeError. Who makes
    them:

        leaves   enters   by      Tier            StateStream   SpillingActivations  LaneActivations  GradientSpill pass_through
        AWAY     FETCHING fetch   _fetch          _fetch        _start_read                           peek          itself
        FETCHING READY    arrive  _arrive         take          _restore             load             peek          itself
        READY    IN_USE   acquire acquire, borrow take, _fetch  _restore             load                           itself
        IN_USE   READY    release release, borrow put_back      _free                load                           itself
        IN_USE   WRITING  write                   write         _spill                                put           its caller
        WRITING  READY    written                 _finish_write _finish, _start_read                  _finish       itself
        READY    AWAY     leave   _evict          _empty        _finish, _free       load, begin_step peek, _finish itself

    `arrive` and `written` wait; `settle` is either of them, for who gives up a piece wherever it is. When a transfer fails, the
    piece stays as it was, and to wait again raises again. The buffer is the piece's from `fetch` to `leave`; from `acquire` to
    `release` or `write`, and only then, it is its user's.

    name: for messages. io: what moves it. state: AWAY, or IN_USE for what is made in memory. lease: of its buffer, where a pool
    lends it.
    """

    __slots__ = ("name", "io", "state", "lease", "ticket")

    def __init__(self, name: str, io: Mover, state: State = State.AWAY, lease: Lease | None = None) -> None:
        self.name = name
        self.io = io
        self.state = state
        self.lease = lease
        self.ticket: Any = None  # of what is under way, or came last

    @property
    def buffer(self) -> torch.Tensor:
        """The bytes of the slot, uint8; nobody's but who has acquired the piece."""
        self.expect(State.IN_USE)
        return self.lease.buffer

    def fetch(self, lease: Lease | None, extents: Sequence[Any]) -> None:
        """extents: what fills the buffer; none: nothing is there to be read."""
        self.expect(State.AWAY)
        self.ticket = self.io.submit_reads(extents)
        self.lease, self.state = lease, State.FETCHING

    def arrive(self, check: Callable[[], None] = lambda: None) -> float:
        """Returns the seconds that it waited. check: raises when what has arrived is not what it should be."""
        self.expect(State.FETCHING)
        seconds = self.io.wait(self.ticket)
        check()
        self.state = State.READY
        return seconds

    def acquire(self) -> None:
        self.expect(State.READY)
        self.state = State.IN_USE

    def release(self) -> None:
        self.expect(State.IN_USE)
        self.state = State.READY

    def write(self, extents: Sequence[Any]) -> None:
        """extents: what of the buffer goes where."""
        self.expect(State.IN_USE)
        self.ticket = self.io.submit_writes(extents)
        self.state = State.WRITING

    def written(self) -> float:
        """Returns the seconds that it waited."""
        self.expect(State.WRITING)
        seconds = self.io.wait(self.ticket)
        self.state = State.READY
        return seconds

    def leave(self) -> None:
        """Gives the buffer back."""
        self.expect(State.READY)
        self.state = State.AWAY
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    def settle(self) -> float:
        """Waits for what is under way, if anything is; returns the seconds."""
        if self.state is State.FETCHING:
            return self.arrive()
        return self.written() if self.state is State.WRITING else 0.0

    @property
    def settled(self) -> bool:
        """Whether `settle` would not wait."""
        return self.state not in (State.FETCHING, State.WRITING) or self.io.done(self.ticket)

    def expect(self, expected: State) -> None:
        if self.state is not expected:
            raise RuntimeError(f"{self.name}: expected {expected.value}, it is {self.state.value}")


def pass_through(io: Mover, pool: SlotPool, ranges: Iterable[tuple[T, int, int, int]]) -> Iterator[tuple[T, Piece]]:
    """Reads ranges of files through the slots of `pool`, in order, as far ahead as there are slots.

    ranges: (what the caller wants to know of it, file, offset, bytes). Each comes as a piece in use, the caller's until it asks
    for the next one; it may `write` the piece meanwhile. When no more come, everything is written.
    Raises ValueError for a range that is larger than a slot.
    """
    coming, ahead, writing = iter(ranges), deque[tuple[T, Piece]](), deque[Piece]()

    def finish_oldest() -> None:
        piece = writing.popleft()
        piece.written()
        piece.leave()

    following = next(coming, None)
    while following or ahead:
        while following and pool.free_count:
            item, file, offset, num_bytes = following
            if num_bytes > pool.slot_bytes:
                raise ValueError(f"{num_bytes} bytes for a slot of {pool.slot_bytes}")
            piece, lease = Piece(f"bytes {offset} to {offset + num_bytes} of a file", io), pool.lease()
            piece.fetch(lease, [(file, offset, num_bytes, lease.address)])
            ahead.append((item, piece))
            following = next(coming, None)
        if not ahead:  # all slots are being written
            finish_oldest()
            continue
        item, piece = ahead.popleft()
        piece.arrive()
        piece.acquire()
        yield item, piece
        if piece.state is State.WRITING:
            writing.append(piece)
        else:
            piece.release()
            piece.leave()
        while writing and writing[0].settled:
            finish_oldest()
    while writing:
        finish_oldest()


def new_pool(slot_bytes: int, count: int) -> SlotPool:
    """For `pass_through`: page-aligned slots, from the allocator of tensors."""
    size = round_up(slot_bytes)
    memory = torch.empty(size * count + PAGE_BYTES, dtype=torch.uint8)
    return Slab(memory[-memory.data_ptr() % PAGE_BYTES :]).carve("buffers", size, count)
