"""Brings blocks near: a tier's slots, what is in them, and what is fetched ahead.

[Note: tiers]
`HostTier` fetches from disk into host slots. On the CPU a block is used where it lies. With an accelerator a
`DeviceTier` stands on top: it fetches from host slots into device slots, holding the host slot until its copy is done.
Both follow finetune.memory.fetch_policy: resident blocks keep their slots, the others share `lookahead` + 1.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.memory.errors import UserError
from finetune.memory.fetch_policy import next_fetch, victim
from finetune.memory.slots import Lease, SlotPool
from finetune.offload.devices import COMPLETED, Device, Direction, Event
from finetune.offload.residency.pieces import Mover, Piece, State, new_pool
from finetune.offload.weights.layout import BlockLayout, Copy, Read, View, align_views, bind_views, view_slot


class Tier:
    """Slots of one tier and the blocks in them, a `Piece` each. Subclasses say how a block gets into a slot.

    mover: of blocks, from the next farther tier. resident: blocks that keep their slots. lookahead: how many of the others are
    fetched before they are needed.
    """

    def __init__(self, num_blocks: int, mover: Mover, pool: SlotPool, resident: frozenset[int], lookahead: int) -> None:
        if pool.count < min(num_blocks, len(resident) + lookahead + 1):
            raise ValueError(
                f"pool {pool.name!r} has {pool.count} slots, {len(resident)} resident blocks with lookahead {lookahead} "
                f"need {len(resident) + lookahead + 1}"
            )
        self.pool = pool
        self.resident = resident
        self.lookahead = lookahead
        self.stall_seconds = 0.0
        self._pieces = [Piece(f"block {block} in pool {pool.name!r}", mover) for block in range(num_blocks)]
        self._held: set[int] = set()
        """Blocks in a slot, or on their way into or out of one."""
        self._upcoming: deque[int] = deque()

    def begin(self, order: Sequence[int]) -> None:
        """The visits to come, in order; a visit that deviates from it is served too, only later."""
        self._upcoming = deque(order)
        self._fetch_ahead()

    def acquire(self, block: int) -> torch.Tensor:
        """The block's bytes, uint8 [slot_bytes], valid until `release`. Waits for the fetch where it must."""
        if not self._upcoming or self._upcoming[0] != block:
            if block in self._upcoming:
                while self._upcoming[0] != block:
                    self._upcoming.popleft()
            else:
                self._upcoming.appendleft(block)
        piece = self._pieces[block]
        if piece.state is State.AWAY:
            self._make_room(block)
            self._fetch(block)
        self._fetch_ahead()
        if piece.state is State.FETCHING:
            self._arrive(block)
        piece.acquire()
        return piece.buffer

    def slot(self, block: int) -> torch.Tensor:
        """The bytes of a block that is acquired."""
        return self._pieces[block].buffer

    def views(self, block: int) -> dict[str, torch.Tensor]:
        """The tensors of a block that is acquired, by local name; they lie in its slot."""
        raise NotImplementedError

    def release(self, block: int) -> None:
        self._pieces[block].release()
        if self._upcoming and self._upcoming[0] == block:
            self._upcoming.popleft()
        self._fetch_ahead()

    def close(self) -> None:
        """Waits for what is under way; nothing is written to the slots afterwards. Also after a failed step."""
        self._upcoming.clear()
        for block in self._held:
            if self._pieces[block].state is State.FETCHING:
                with contextlib.suppress(UserError):  # the failure that matters was raised before
                    self._arrive(block)

    def give_up(self) -> None:
        """Empties all slots, once what is under way has arrived: the blocks' bytes have moved elsewhere."""
        self._upcoming.clear()
        for block in list(self._held):
            piece = self._pieces[block]
            if piece.state is State.FETCHING:
                self._arrive(block)
            if piece.state is State.READY:
                self._evict(block)

    @contextlib.contextmanager
    def borrow(self, block: int) -> Iterator[dict[str, torch.Tensor] | None]:
        """The tensors of a block that is not in use, by local name, if it is there; None: it is not, and nothing is fetched."""
        if not self.ready(block):
            yield None
            return
        piece = self._pieces[block]
        if piece.state is State.FETCHING:
            self._arrive(block)
        piece.acquire()
        try:
            yield self.views(block)
        finally:
            piece.release()

    def distance(self, block: int) -> int:
        """The smaller, the sooner it can be used: 0 for a block that is there."""
        state = self._pieces[block].state
        return 2 if state is State.AWAY else int(state is State.FETCHING)

    def ready(self, block: int) -> bool:
        """Whether `acquire` would not wait."""
        return self._pieces[block].state is not State.AWAY and self._pieces[block].settled

    def _fetch_ahead(self) -> None:
        while True:
            block = next_fetch(self._upcoming, self._held, self.resident, self.lookahead)
            if block is None or not self._can_fetch(block) or not self._make_room(block, ahead=True):
                return
            self._fetch(block)

    def _make_room(self, block: int, ahead: bool = False) -> bool:
        """Frees a slot where none is free. A fetch ahead never evicts a block that is needed sooner than `block`."""
        if self.pool.free_count:
            return True
        sooner = set(itertools.takewhile(lambda soon: soon != block, self._upcoming)) if ahead else set()
        evicted = self._least_wanted(sooner)
        if evicted is None:
            if ahead:
                return False
            evicted = min(self._streamed(State.FETCHING), default=None)
            if evicted is None:
                raise RuntimeError(f"block {block} needs a slot of pool {self.pool.name!r}, all are in use")
            self._arrive(evicted)
        self._evict(evicted)
        return True

    def _least_wanted(self, sooner: set[int]) -> int | None:
        """Which block gives its slot to another; none of `sooner`. None: there is none."""
        candidates = self._streamed(State.READY) - sooner
        return victim(self._upcoming, candidates) if candidates else None

    def _streamed(self, state: State) -> set[int]:
        return {block for block in self._held if self._pieces[block].state is state and block not in self.resident}

    def _fetch(self, block: int) -> None:
        lease = self.pool.lease()
        self._pieces[block].fetch(lease, self._extents(block, lease))
        self._held.add(block)

    def _arrive(self, block: int) -> None:
        self.stall_seconds += self._pieces[block].arrive(lambda: self._check(block))

    def _evict(self, block: int) -> None:
        piece = self._pieces[block]
        lease = piece.lease
        piece.leave()
        self._held.discard(block)
        self._emptied(lease)

    def _can_fetch(self, block: int) -> bool:
        return True

    def _extents(self, block: int, lease: Lease) -> Sequence[Any]:
        """What the mover is to read into the block's slot."""
        raise NotImplementedError

    def _check(self, block: int) -> None:
        """Raises when what has arrived in the block's slot is not what it should be."""

    def _emptied(self, lease: Lease) -> None:
        """A block has left this slot."""


class HostTier(Tier):
    """Disk to host slots, through the I/O engine.

    layouts: per block, the reads that fill a slot. io: an finetune.offload.residency.io.IOEngine, which the tier does not
    close.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        io: Any,
        pool: SlotPool,
        resident: frozenset[int],
        lookahead: int,
    ) -> None:
        super().__init__(len(layouts), io, pool, resident, lookahead)
        self._io = io
        self._files: dict[Any, int] = {}
        self.move_to(layouts)

    def layout(self, block: int) -> BlockLayout:
        """How the block lies in a slot."""
        return self.layouts[block]

    def views(self, block: int) -> dict[str, torch.Tensor]:
        return bind_views(self.slot(block), self.layout(block))

    def settle(self, block: int) -> None:
        """Waits for a fetch of the block that is under way: it may have been fetched ahead for a tier that has it already."""
        if self._pieces[block].state is State.FETCHING:
            self._arrive(block)

    def replace(self, block: int, image: torch.Tensor) -> None:
        """The block is what `image` holds from now on; a slot that has it gets the new bytes. It must not be on its way."""
        piece = self._pieces[block]
        if piece.state is State.FETCHING:
            raise RuntimeError(f"{piece.name} is fetched while it is updated")
        if piece.state is not State.AWAY:
            size = self.layout(block).num_bytes
            piece.lease.buffer[:size].copy_(image[:size])

    def move_to(self, layouts: Sequence[BlockLayout]) -> None:
        """From now on blocks are read from other places. No slot may hold one: see `give_up`."""
        for piece in self._pieces:
            piece.expect(State.AWAY)
        for file in self._files.values():
            self._io.close_file(file)
        self._files = {}
        self.layouts = list(layouts)
        self._reads = [[] for _ in layouts]
        for block, layout in enumerate(layouts):
            self.read_from(block, layout.reads)

    def read_from(self, block: int, reads: Sequence[Read]) -> None:
        """From its next fetch on, these fill the block's slot."""
        self._reads[block] = [(self._file(r.path), r.file_offset, r.num_bytes, r.slot_offset) for r in reads]

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = self._io.open(path)
        return self._files[path]

    def _extents(self, block: int, lease: Lease) -> Sequence[Any]:
        address = lease.address
        return [(file, at, num_bytes, address + slot_offset) for file, at, num_bytes, slot_offset in self._reads[block]]


class PassingTier(HostTier):
    """Disk to one buffer from the allocator of tensors, for blocks that are visited in order, once a pass: it is there from the
    first acquired one to the end of the last, and nothing is fetched ahead.

    slot_bytes: of the largest block.
    """

    def __init__(self, layouts: Sequence[BlockLayout], io: Any, slot_bytes: int) -> None:
        super().__init__(layouts, io, new_pool(slot_bytes, 1), frozenset(), 0)
        self._slot_bytes = slot_bytes
        self.pool: SlotPool | None = None

    def begin(self, order: Sequence[int]) -> None:
        """Nothing is on its way yet."""

    def acquire(self, block: int) -> torch.Tensor:
        if self.pool is None:
            self.pool = new_pool(self._slot_bytes, 1)
        return super().acquire(block)

    def release(self, block: int) -> None:
        super().release(block)
        if block == len(self._pieces) - 1:
            self.give_up()
            self.pool = None


class _Copies:
    """Copies of a device, in the shape of disk I/O. What waits for them is compute; the host goes on."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def submit_reads(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor, Direction, Event | None]]) -> Event:
        """(target, source, direction, what must have happened before). The event covers all of them."""
        event: Event = COMPLETED
        for target, source, direction, after in copies:
            event = self._device.copy_async(target, source, direction, after=after)
        return event

    def wait(self, event: Event) -> float:
        self._device.wait(event)
        return 0.0

    def done(self, event: Event) -> bool:
        return event.query()


class DeviceTier(Tier):
    """Host slots to device slots, where tensors are aligned. Drives the host tier; a host slot is held until the copy out of it
    is done."""

    def __init__(
        self, host: HostTier, device: Device, pool: SlotPool, resident: frozenset[int], lookahead: int
    ) -> None:
        self._copies = _Copies(device)
        super().__init__(len(host.layouts), self._copies, pool, resident, lookahead)
        self._host = host
        self._device = device
        self._host_held: dict[int, Event] = {}  # block -> the copy that still reads its host slot, oldest first
        self._last_use: dict[int, Event] = {}  # slot index -> the compute that still reads its old bytes
        self._alignments: dict[int, tuple[dict[str, View], tuple[Copy, ...]]] = {}

    def views(self, block: int) -> dict[str, torch.Tensor]:
        return view_slot(self.slot(block), self._aligned(block)[0])

    def begin(self, order: Sequence[int]) -> None:
        # A block that stays on the device is not asked of the host again.
        self._host.begin([b for b in order if b not in self.resident or self._pieces[b].state is State.AWAY])
        super().begin(order)

    def give_up(self) -> None:
        super().give_up()
        self._free_host_slots(keep=0)
        self._host.give_up()

    def move_to(self, layouts: Sequence[BlockLayout]) -> None:
        self._host.move_to(layouts)
        self._alignments = {}

    def image(self, block: int, buffer: torch.Tensor) -> torch.Tensor:
        """The bytes of an acquired block, copied into `buffer`, in host memory, once compute has come so far; it is then on no
        way from the disk, and `replace` may follow."""
        self._host.settle(block)
        copies = self._between(block, self.slot(block), buffer, Direction.D2H, self._device.record())
        self._device.synchronize(self._copies.submit_reads(copies))
        return buffer

    def replace(self, block: int, image: torch.Tensor) -> None:
        """An acquired block is what `image`, in host memory, holds from now on, here and in the host tier."""
        copies = self._between(block, self.slot(block), image, Direction.H2D, self._device.record())
        event = self._copies.submit_reads(copies)
        self._device.wait(event)
        self._device.synchronize(event)  # `image` is written again soon
        self._host.replace(block, image)

    def distance(self, block: int) -> int:
        near = super().distance(block)
        return near if near < 2 else near + self._host.distance(block)

    @property
    def host_stall_seconds(self) -> float:
        return self._host.stall_seconds

    def close(self) -> None:
        super().close()
        for event in self._host_held.values():
            self._device.synchronize(event)
        self._host.close()

    def _fetch_ahead(self) -> None:
        self._free_host_slots(keep=self._host.lookahead)
        super()._fetch_ahead()

    def _can_fetch(self, block: int) -> bool:
        return self._host.ready(block)

    def _fetch(self, block: int) -> None:
        super()._fetch(block)
        self._host_held[block] = self._pieces[block].ticket

    def _extents(self, block: int, lease: Lease) -> Sequence[Any]:
        self._free_host_slots(keep=self._host.lookahead)
        source = self._host.acquire(block)
        return self._between(block, lease.buffer, source, Direction.H2D, self._last_use.pop(lease.index, None))

    def _check(self, block: int) -> None:
        for _, offset, num_bytes in self._aligned(block)[1]:
            self._device.check_readable(self._pieces[block].lease.buffer[offset : offset + num_bytes])

    def _aligned(self, block: int) -> tuple[dict[str, View], tuple[Copy, ...]]:
        if block not in self._alignments:
            self._alignments[block] = align_views(self._host.layout(block))
        return self._alignments[block]

    def _between(
        self, block: int, slot: torch.Tensor, host: torch.Tensor, direction: Direction, after: Event | None
    ) -> list[tuple[torch.Tensor, torch.Tensor, Direction, Event | None]]:
        """The copies between a slot of this tier and one as the host tier has them."""
        copies = []
        for host_offset, offset, num_bytes in self._aligned(block)[1]:
            there, here = slot[offset : offset + num_bytes], host[host_offset : host_offset + num_bytes]
            target, source = (there, here) if direction is Direction.H2D else (here, there)
            copies.append((target, source, direction, after))
        return copies

    def _emptied(self, lease: Lease) -> None:
        self._last_use[lease.index] = self._device.record()
        self._device.release(lease.buffer)

    def _free_host_slots(self, keep: int) -> None:
        """Releases host slots whose copies are done, and waits for the oldest until at most `keep` are held."""
        for block, event in list(self._host_held.items()):
            if len(self._host_held) > keep:
                started = time.perf_counter()
                self._device.synchronize(event)
                self.stall_seconds += time.perf_counter() - started
            elif not event.query():
                return
            del self._host_held[block]
            self._host.release(block)
