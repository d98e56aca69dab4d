"""Predicted time of a step: the engine's own schedule, with clocks in place of disks, links and processors.

Four servers run beside each other: the disk, the link to a device, the link back, and compute; each does one thing after the
other. When a block is fetched, and whose slot it takes, is the rule that the engine has too (`finetune.memory.fetch_policy`). A
fetch begins when its server is free and a slot can be had; a visit begins when its block is there and the visit before it is
over. Beside a device, an update waits for what it copies there and back, as the engine does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

from finetune.memory.fetch_policy import next_fetch, victim
from finetune.memory.trace import Span

MOST_PIECES = 4096  # that updates are simulated in


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of what moves bytes, in bytes a second."""

    read: float  # from disk
    write: float = inf  # to disk; reads wait meanwhile
    copy: float = inf  # to a device
    copy_back: float = inf  # from it


@dataclass(frozen=True, slots=True)
class Ring:
    """Slots of one tier for blocks: `resident` ones keep theirs, the others share `lookahead` + 1."""

    resident: frozenset[int]
    lookahead: int


@dataclass(frozen=True, slots=True)
class Update:
    """Of one unit of weights, in pieces that pass through buffers with their state."""

    pieces: int
    read_bytes: int  # of all pieces, from disk
    write_bytes: int  # of all pieces, to disk
    seconds: float  # of all pieces
    to_host_bytes: int = 0  # from a device, before the first piece: weights and gradients
    to_device_bytes: int = 0  # after the last piece: weights


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step does, in its order."""

    block_bytes: Sequence[int]  # read from disk where no slot has the block
    forward_seconds: Sequence[float]  # of a visit of each block, by all lanes
    backward_seconds: Sequence[float] = ()  # the same; empty: a step of forward passes only
    lowest: int = 0  # the block where backward ends
    lanes: int = 1  # micro-batches, which a visit takes one after the other
    visit_bytes: Sequence[int] = ()  # read in every visit of each block, which waits for them: experts
    input_bytes: int = 0  # of a lane's block input, which goes to disk for backward; 0: it stays in memory
    input_slots: int = 1  # through which those go
    waiting_bytes: int = 0  # of a lane's hidden states, which are on disk between visits, as their gradients are; 0: in memory
    waiting_slots: int = 1  # through which those go
    head_passes: int = 1  # over the chunks of the head, by some of the lanes each
    begin_seconds: float = 0.0  # before the first visit
    chunks: int = 0  # of the head
    chunk_bytes: int = 0  # of each, from disk
    chunk_slots: int = 1  # as many as chunks: they stay
    head_seconds: float = 0.0  # head and loss, by all lanes, after the last forward visit
    end_update: Update | None = None  # of embedding, head and what else is no block, after the head
    updates: dict[int, Update] = field(default_factory=dict)  # of blocks, after their backward visits
    state_buffers: int = 1  # through which pieces pass
    kept_pieces: int = 0  # that stay in memory, and are only written
    end_seconds: float = 0.0  # after the last visit


@dataclass(frozen=True, slots=True)
class StepTime:
    """Of one step in the steady state."""

    seconds: float  # from one step's begin to the next one's
    stall_seconds: float  # that compute waits for bytes
    read_bytes: int  # from disk
    write_bytes: int = 0  # to disk
    busy_seconds: dict[str, float] = field(default_factory=dict)  # by server: disk, link, link back, compute
    spans: tuple[Span, ...] = ()

    @property
    def slowest(self) -> str:
        """The server that is busy longest."""
        return max(self.busy_seconds, key=self.busy_seconds.__getitem__)


def simulate_step(work: StepWork, speeds: Speeds, host: Ring, device: Ring | None = None) -> StepTime:
    """One step after a warm-up step. device: of the tier above the host's; None: compute is in host memory."""
    return _Simulation(work, speeds, host, device).run()


class _Server:
    """What does one thing after the other."""

    def __init__(self, name: str, spans: list[Span]) -> None:
        self.name = name
        self.free_at = 0.0
        self.busy_seconds = 0.0
        self._spans = spans

    def serve(self, seconds: float, not_before: float, name: str) -> float:
        """When it is done."""
        start = max(self.free_at, not_before)
        self.free_at = start + seconds
        self.busy_seconds += seconds
        if seconds:
            self._spans.append(Span(self.name, name, start, seconds))
        return self.free_at

    def serve_now(self, seconds: float, now: float, name: str) -> float:
        """The same of what is there, before what has yet to come."""
        free_at, self.free_at = self.free_at, now
        done = self.serve(seconds, now, name)
        self.free_at = max(free_at, done)
        return done


class _Disk(_Server):
    def __init__(self, spans: list[Span], speeds: Speeds) -> None:
        super().__init__("disk", spans)
        self._speeds = speeds
        self.read_bytes = self.write_bytes = 0
        self.written_at = 0.0  # when all that was to be written so far is

    def read(self, num_bytes: float, not_before: float, name: str) -> float:
        self.read_bytes += num_bytes
        return self.serve(num_bytes / self._speeds.read, not_before, f"read {name}")

    def write(self, num_bytes: float, not_before: float, name: str) -> float:
        self.write_bytes += num_bytes
        self.written_at = self.serve(num_bytes / self._speeds.write, not_before, f"write {name}")
        return self.written_at


class _Staging:
    """Host slots below a device's tier: each is held until the copy out of it is done."""

    def __init__(self, sizes: Sequence[int], ring: Ring, disk: _Disk) -> None:
        self._sizes, self._disk, self._resident = sizes, disk, ring.resident
        self._free_at = [0.0] * (ring.lookahead + 1)
        self._arrival: dict[int, float] = {}

    def fetch(self, block: int) -> float:
        """When the block is in a host slot: read ahead as early as there was one."""
        if block in self._arrival:
            return self._arrival[block]
        begin = 0.0 if block in self._resident else heappop(self._free_at)
        arrival = self._disk.read(self._sizes[block], begin, f"block {block}")
        if block in self._resident:
            self._arrival[block] = arrival
        return arrival

    def copied(self, block: int, when: float) -> None:
        if block not in self._resident:
            heappush(self._free_at, when)


class _Blocks:
    """The tier that compute reads."""

    def __init__(self, order: list[int], sizes: Sequence[int], ring: Ring, fetch) -> None:
        """order: of all visits. fetch: of (block, now); when it is there."""
        self._order, self._ring, self._fetch = order, ring, fetch
        self._slots = len(ring.resident) + min(ring.lookahead + 1, len(sizes) - len(ring.resident))
        self._arrival: dict[int, float] = {}  # blocks in slots, and on their way

    def acquire(self, position: int, now: float) -> float:
        """When the block of that visit is there."""
        block = self._order[position]
        self._fetch_ahead(position, now, block)
        return self._arrival[block]

    def release(self, position: int, now: float) -> None:
        self._fetch_ahead(position + 1, now, None)

    def _fetch_ahead(self, position: int, now: float, in_use: int | None) -> None:
        upcoming, ring = self._order[position:], self._ring
        while (block := next_fetch(upcoming, set(self._arrival), ring.resident, ring.lookahead)) is not None:
            if len(self._arrival) >= self._slots:
                soon = set(upcoming[: upcoming.index(block)])
                candidates = {b for b in self._arrival if b not in ring.resident and b != in_use and b not in soon}
                if not candidates:
                    return
                del self._arrival[victim(upcoming, candidates)]
            self._arrival[block] = self._fetch(block, now)


class _Buffered:
    """Things that are read in a known order through a few buffers, as far ahead as there are any. What has no bytes is there
    already, in a place of its own."""

    def __init__(self, disk: _Disk, free_at: list[float], items: Iterable[tuple[str, float]]) -> None:
        """free_at: when each buffer is free, a heap, which is changed. items: name and bytes of each."""
        self._disk = disk
        self._free_at = free_at
        self._items = deque(items)
        self._arrivals: deque[tuple[float, bool]] = deque()  # and whether a buffer has it
        self._buffered = False

    def ahead(self, now: float) -> None:
        while self._items and (not self._items[0][1] or (self._free_at and self._free_at[0] <= now)):
            self._read(now)

    def take(self, now: float) -> float:
        """When the next one is there."""
        self.ahead(now)
        if not self._arrivals:
            self._read(now)
        arrival, self._buffered = self._arrivals.popleft()
        return arrival

    def give_back(self, when: float) -> None:
        """What was taken last is needed until then."""
        if self._buffered:
            heappush(self._free_at, when)

    def _read(self, now: float) -> None:
        name, num_bytes = self._items.popleft()
        arrival = self._disk.read(num_bytes, max(now, heappop(self._free_at)), name) if num_bytes else 0.0
        self._arrivals.append((arrival, bool(num_bytes)))


class _Simulation:
    def __init__(self, work: StepWork, speeds: Speeds, host: Ring, device: Ring | None) -> None:
        self._work, self._speeds = work, speeds
        self._spans: list[Span] = []
        self._disk, self._link = _Disk(self._spans, speeds), _Server("link", self._spans)
        self._back, self._compute = _Server("link back", self._spans), _Server("compute", self._spans)
        self._stall_seconds = 0.0
        self._state_free_at = [0.0] * max(1, work.state_buffers)
        sizes, blocks = work.block_bytes, len(work.block_bytes)
        self._order = list(range(blocks))
        if work.backward_seconds:
            self._order += range(blocks - 1, work.lowest - 1, -1)
        order = 2 * self._order + list(range(blocks))
        if device is None:
            self._blocks = _Blocks(order, sizes, host, lambda b, now: self._disk.read(sizes[b], now, f"block {b}"))
            return
        staging = _Staging(sizes, host, self._disk)

        def fetch(block: int, now: float) -> float:
            copied = self._link.serve(sizes[block] / speeds.copy, max(now, staging.fetch(block)), f"block {block}")
            staging.copied(block, copied)
            return copied

        self._blocks = _Blocks(order, sizes, device, fetch)

    def run(self) -> StepTime:
        self._step(0)
        start, stall = self._compute.free_at, self._stall_seconds
        servers = (self._disk, self._link, self._back, self._compute)
        before = {server.name: server.busy_seconds for server in servers}
        read_bytes, write_bytes, spans = self._disk.read_bytes, self._disk.write_bytes, len(self._spans)
        self._step(1)
        return StepTime(
            self._compute.free_at - start,
            self._stall_seconds - stall,
            int(self._disk.read_bytes - read_bytes),
            int(self._disk.write_bytes - write_bytes),
            {server.name: server.busy_seconds - before[server.name] for server in servers},
            tuple(Span(s.server, s.name, s.start_seconds - start, s.seconds) for s in self._spans[spans:]),
        )

    def _step(self, number: int) -> None:
        work, first = self._work, number * len(self._order)
        chunks_stay = number > 0 and work.chunk_slots >= work.chunks
        chunk_bytes = 0 if chunks_stay else work.chunk_bytes
        reads = [chunk for _ in range(work.head_passes) for chunk in range(work.chunks)]
        head = _Buffered(self._disk, [0.0] * work.chunk_slots, ((f"head {chunk}", chunk_bytes) for chunk in reads))
        head.ahead(self._now)
        state = self._open_state(number)
        state.ahead(self._now)
        self._run("begin", work.begin_seconds)
        slots = [0.0] * (work.waiting_slots if work.waiting_bytes else work.input_slots)
        waiting = self._open_waiting(f"hidden states before block {block}" for block in self._order[: len(work.block_bytes)])
        for position in range(len(work.block_bytes)):
            self._visit_forward(first + position, slots, waiting)
        if work.waiting_bytes:
            self._wait(self._disk.read(work.lanes * work.waiting_bytes, self._now, "final hidden states"))
        for chunk in reads:
            self._wait(head.take(self._now))
            self._run(f"head {chunk}", work.head_seconds / len(reads))
            head.give_back(self._now)
        if not work.chunks:
            self._run("head", work.head_seconds)
        if work.end_update is not None:
            self._update("ends", work.end_update, state)
        backward = self._order[len(work.block_bytes) :]
        names = (f"input of block {block}" for block in backward for _ in range(work.lanes))
        inputs = _Buffered(self._disk, [0.0] * work.input_slots, ((name, work.input_bytes) for name in names))
        gradients = self._open_waiting(f"gradients behind block {block}" for block in backward)
        for position in range(len(work.block_bytes), len(self._order)):
            self._visit_backward(first + position, inputs, state, (gradients, slots))
        if self._disk.write_bytes and (work.updates or work.end_update):
            self._wait(self._disk.written_at)  # before the step is committed
        self._run("end", work.end_seconds)

    def _open_waiting(self, names: Iterable[str]) -> _Buffered:
        """What all lanes read in visits, where they are on disk between these."""
        work = self._work
        items = ((name, work.waiting_bytes) for name in names for _ in range(work.lanes))
        return _Buffered(self._disk, [0.0] * work.waiting_slots, items)

    def _write_behind(self, num_bytes: int, slots: list[float], name: str) -> None:
        self._wait(heappop(slots))
        self._copy_back(num_bytes, name)
        heappush(slots, self._disk.write(num_bytes, self._now, name))

    def _visit_forward(self, position: int, slots: list[float], waiting: _Buffered) -> None:
        work = self._work
        block = self._arrive(position)
        for lane in range(work.lanes):
            if work.waiting_bytes:  # they are the block's input, and written once
                self._wait(waiting.take(self._now))
                self._copy(work.waiting_bytes, f"hidden states before block {block}")
            elif work.input_bytes and work.backward_seconds:
                self._write_behind(work.input_bytes, slots, f"input of block {block}")
            self._run(f"block {block}, lane {lane}", work.forward_seconds[block] / work.lanes)
            if work.waiting_bytes:
                waiting.give_back(self._now)
                self._write_behind(work.waiting_bytes, slots, f"hidden states behind block {block}")
        self._blocks.release(position, self._now)

    def _visit_backward(
        self, position: int, inputs: _Buffered, state: _Buffered, waiting: tuple[_Buffered, list[float]]
    ) -> None:
        """waiting: gradients that come back, and slots of those that are written."""
        work, (gradients, slots) = self._work, waiting
        if work.input_bytes:
            inputs.ahead(self._now)
        block = self._arrive(position)
        for lane in range(work.lanes):
            if work.input_bytes:
                self._wait(inputs.take(self._now))
                self._copy(work.input_bytes, f"input of block {block}")
            if work.waiting_bytes:
                self._wait(gradients.take(self._now))
                self._copy(work.waiting_bytes, f"gradients behind block {block}")
            self._run(f"block {block} backward, lane {lane}", work.backward_seconds[block] / work.lanes)
            if work.input_bytes:
                inputs.give_back(self._now)
            if work.waiting_bytes:
                gradients.give_back(self._now)
                self._write_behind(work.waiting_bytes, slots, f"gradients before block {block}")
        if block in work.updates:
            self._update(f"block {block}", work.updates[block], state)
        self._blocks.release(position, self._now)

    def _arrive(self, position: int) -> int:
        """The block that is visited, once it is there, and what else its visit reads."""
        block = self._order[position % len(self._order)]
        self._wait(self._blocks.acquire(position, self._now))
        if self._work.visit_bytes and (num_bytes := self._work.visit_bytes[block]):
            self._wait(self._disk.read(num_bytes, self._now, f"experts of block {block}"))
        return block

    def _open_state(self, number: int) -> _Buffered:
        work = self._work
        coming = [work.end_update] if work.end_update is not None else []
        coming += [work.updates[block] for block in self._order[len(work.block_bytes) :] if block in work.updates]
        items, kept = [], work.kept_pieces if number else 0
        for update in coming:
            pieces = self._pieces(update)
            for piece in range(pieces):
                items.append((f"state, piece {piece}", 0.0 if kept > 0 else update.read_bytes / pieces))
                kept -= update.pieces / pieces
        return _Buffered(self._disk, self._state_free_at, items)

    def _pieces(self, update: Update) -> int:
        """That it is simulated in."""
        total = sum(u.pieces for u in self._work.updates.values()) + 1
        return max(1, min(update.pieces, update.pieces * MOST_PIECES // total))

    def _update(self, name: str, update: Update, state: _Buffered) -> None:
        pieces = self._pieces(update)
        self._copy_back(update.to_host_bytes, name)
        for piece in range(pieces):
            self._wait(state.take(self._now))
            self._run(f"update {name}", update.seconds / pieces)
            state.give_back(self._disk.write(update.write_bytes / pieces, self._now, f"{name}, piece {piece}"))
            state.ahead(self._now)
        self._copy(update.to_device_bytes, name)

    @property
    def _now(self) -> float:
        return self._compute.free_at

    def _run(self, name: str, seconds: float) -> None:
        self._compute.serve(seconds, 0.0, name)

    def _copy(self, num_bytes: float, name: str) -> None:
        """Compute waits for it."""
        self._wait(self._link.serve_now(num_bytes / self._speeds.copy, self._now, name))

    def _copy_back(self, num_bytes: float, name: str) -> None:
        self._wait(self._back.serve_now(num_bytes / self._speeds.copy_back, self._now, name))

    def _wait(self, until: float) -> None:
        if until > self._now:
            self._stall_seconds += until - self._now
            self._compute.free_at = until
