"""The stream of optimizer state: pieces with their state pass through a few buffers, ahead of their update and back to disk.

State is read ahead in the order in which gradients will be complete, so that when a unit's backward visit ends its state is
there; its new version is written while other blocks compute (Fuyou, Liao et al. 2024: synchronous, no staleness).

Where there is memory for more buffers than that needs, some pieces keep theirs: they are written at every step all the same,
and not read again. The first that come are kept, and stay: in an order that is the same every step no choice keeps more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from finetune.memory.slots import SlotPool
from finetune.memory.units import round_up
from finetune.offload.residency.io import Extent, IOEngine
from finetune.offload.residency.pieces import Piece, State
from finetune.offload.update.kernels import StateFormat, checksum
from finetune.offload.update.rules.rule import Rule
from finetune.offload.update.store import Key, StoredPiece, WorkingStore, damaged
from finetune.offload.update.units import Piece as ImagePiece
from finetune.offload.update.units import Segment, UpdateUnit, clipped_reads, missing_ranges
from finetune.offload.weights.layout import Read

FACTORS = -1
"""Index of the piece that holds no weights, but what a rule with directions keeps of a unit's matrices."""


@dataclass(frozen=True, slots=True)
class Request:
    """One unit's update."""

    unit: UpdateUnit
    trained: frozenset[str]
    """Local names of what is updated; others keep their bytes."""
    rule: Rule  # the optimizer
    scale: float = 1.0
    """Of the learning rate."""
    undecayed: frozenset[str] = frozenset()
    """Fully qualified names of what weight decay leaves alone, of whatever units."""
    updates: int = 0
    """That have been of the parameter of which the unit is a part, which had nothing to change in the unit, and so no state."""

    def next_update(self, piece: StatePiece) -> int:
        """The number, from 1, of the update of a piece."""
        return max(piece.updates, self.updates) + 1

    def rule_of(self, name: str) -> Rule:
        """Of a parameter."""
        return replace(self.rule, weight_decay=0.0) if self.unit.fqns[name] in self.undecayed else self.rule

    def piece_indices(self) -> list[int]:
        return [
            index
            for index, piece in enumerate(self.unit.pieces)
            if any(segment.name in self.trained for segment in piece.segments)
        ]

    def fetches(self) -> list[int]:
        """Pieces in the order in which they are wanted."""
        factors = [FACTORS] if self.rule.has_directions else []
        return factors + self.rule.passes * self.piece_indices()


@dataclass(frozen=True, slots=True)
class Later:
    """Updates that are known only when their turn has come. units: begins the names of their units."""

    units: str


@dataclass(frozen=True, slots=True)
class PieceFormat:
    """How a piece lies in a buffer and on disk: weights, masters, state; each part in whole pages. Offsets are in the piece."""

    whole_masters: bool
    """Masters are fp32 [units], as those of fp16 weights must be, which are no part of them; else they are the remainders of
    bf16 weights, int16 [units]."""
    master_offset: int
    """Also the bytes of the weights."""
    master_bytes: int  # 0: no masters are kept
    state_offset: int
    """Also the bytes of weights and masters."""
    state_bytes: int
    arrays: dict[str, tuple[int, int]]
    """Name of a state array -> offset in the piece, bytes."""

    @property
    def num_bytes(self) -> int:
        return self.state_offset + self.state_bytes


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is kept beside weights."""

    state: StateFormat = StateFormat()
    """Of the optimizer."""
    masters: bool = True
    """Whether 16-bit weights have an fp32 master; without, every update is rounded stochastically, which fp16 weights can't
    be."""

    def piece_format(self, unit: UpdateUnit, index: int, rule: Rule) -> PieceFormat:
        if index == FACTORS:
            return PieceFormat(False, 0, 0, 0, round_up(rule.factor_bytes(unit)), {})
        piece = unit.pieces[index]
        whole = self.masters and any(segment.view.dtype == torch.float16 for segment in piece.segments)
        each = 4 if whole else 2 if self.masters and unit.itemsize == 2 else 0
        master_bytes = round_up(each * piece.units)
        start = piece.num_bytes + master_bytes
        arrays, end = {}, start
        for name, num_bytes in self.state.array_bytes(rule, piece.units).items():
            arrays[name] = (end, num_bytes)
            end += round_up(num_bytes, 64)
        return PieceFormat(whole, piece.num_bytes, master_bytes, start, round_up(end - start), arrays)


class StatePiece(Piece):
    """A piece of a unit with its optimizer state in a buffer, laid out as `format` says.

    index: FACTORS for what belongs to no piece. stored: what the store had of it when it was asked for; None: nothing. kept:
    whether the buffer stays its own between updates.
    """

    __slots__ = ("unit", "index", "format", "stored", "kept")

    def __init__(self, io: IOEngine, unit: UpdateUnit, index: int) -> None:
        super().__init__(f"piece {index} of {unit.name}", io)
        self.unit = unit
        self.index = index
        self.format: PieceFormat | None = None
        self.stored: StoredPiece | None = None
        self.kept = False

    @property
    def key(self) -> Key:
        return self.unit.name, self.index

    @property
    def place(self) -> ImagePiece | None:
        """In the unit's image."""
        return None if self.index == FACTORS else self.unit.pieces[self.index]

    @property
    def has_masters(self) -> bool:
        """Whether they have ever been written."""
        return self.stored is not None and self.stored.master_bytes > 0

    @property
    def updates(self) -> int:
        """How often the state has been updated."""
        return self.stored.updates if self.stored is not None and self.stored.state_bytes else 0

    def masters(self, dtype: torch.dtype) -> torch.Tensor:
        """[units] fp32 masters, int16 remainders, or bytes."""
        return self.buffer[self.format.master_offset : self.format.state_offset].view(dtype)

    @property
    def all_state(self) -> torch.Tensor:
        """Bytes."""
        return self.buffer[self.format.state_offset : self.format.num_bytes]

    def arrays(self) -> dict[str, torch.Tensor]:
        """Bytes of each array of the state, by name."""
        return {name: self.buffer[start : start + size] for name, (start, size) in self.format.arrays.items()}

    def units_of(self, segment: Segment) -> slice:
        """Where masters and state of a segment's elements are in the arrays."""
        first = (segment.offset - self.place.start) // self.unit.itemsize
        return slice(first, first + segment.count)


class StateStream:
    """Brings pieces with their state into buffers, in the order of a step, and writes them.

    pool: buffers, each for the largest piece. kept_pieces: how many of them may be kept; `MIN_STATE_SLOTS` of
    `finetune.offload.sizing.needs` are left at least. threads: of checksums. Not thread-safe.
    """

    def __init__(
        self, io: IOEngine, store: WorkingStore, pool: SlotPool, *, keeping: Keeping, threads: int, kept_pieces: int = 0
    ) -> None:
        self.keeping = keeping
        self.stall_seconds = 0.0
        self._io = io
        self._store = store
        self._pool = pool
        self._threads = threads
        self._coming: deque[tuple[Request, int] | Later] = deque()  # of the step, for which nothing is done yet
        self._pieces: dict[Key, StatePiece] = {}  # whatever has a buffer; READY: kept, and not asked for
        self._ahead: deque[StatePiece] = deque()  # asked for: FETCHING, or IN_USE if it was kept
        self._writing: deque[StatePiece] = deque()  # oldest first
        self._may_keep = kept_pieces

    def begin(self, requests: Sequence[Request | Later]) -> None:
        """The updates of the step, in order; what does not come in the end is passed over."""
        self._pass_over_ahead()
        self._coming = deque(_fetches(requests))
        if requests:
            coming = {(one[0].unit.name, one[1]) for one in self._coming if not isinstance(one, Later)}
            later = tuple(one.units for one in self._coming if isinstance(one, Later))
            for piece in list(self._pieces.values()):
                if piece.state is State.READY and piece.key not in coming and not piece.unit.name.startswith(later):
                    self._empty(piece)
        self.fetch_ahead()

    def now(self, later: Later, requests: Sequence[Request]) -> None:
        """These are what `later` stands for; what comes before it is passed over."""
        while later in self._coming and self._coming.popleft() != later:
            pass
        self._coming.extendleft(reversed(list(_fetches(requests))))
        self.fetch_ahead()

    def take(self, request: Request, index: int) -> StatePiece:
        """The piece, in use until `write` or `put_back`, read ahead or now; what was read ahead for others before it is passed
        over. What the store has none of is zeros. Raises UserError for bytes that are not what was written."""
        key = (request.unit.name, index)
        while self._ahead and self._ahead[0].key != key and any(piece.key == key for piece in self._ahead):
            self._pass_over(self._ahead.popleft())
        if not self._ahead or self._ahead[0].key != key:
            place = next((place for place, one in enumerate(self._coming) if _is(one, key)), None)
            for _ in range(0 if place is None else place + 1):
                self._coming.popleft()
            self._pass_over_ahead()
            while not self._pool.free_count and not self._is_kept(key):
                self._finish_write(self._writing[0])
            self._fetch(request, index)
        piece = self._ahead.popleft()
        if piece.state is State.FETCHING:
            self.stall_seconds += piece.arrive()
            piece.acquire()
        self._fill(piece)
        return piece

    def write(self, piece: StatePiece, updates: int) -> None:
        """Starts to write the new version of a piece that was taken, whose state has been updated so often now."""
        layout, buffer = piece.format, piece.buffer
        offset, state_offset = self._store.place(piece.key, layout.state_offset, layout.state_bytes)
        bounds = (0, layout.master_offset, layout.state_offset, layout.num_bytes)
        sums = [self._sum(buffer[low:high]) for low, high in pairwise(bounds)]
        address = buffer.data_ptr()
        extents = [
            (self._store.file, offset, layout.state_offset, address),
            (self._store.file, state_offset, layout.state_bytes, address + layout.state_offset),
        ]
        piece.write([extent for extent in extents if extent[2]])
        self._store.put(
            piece.key,
            StoredPiece(
                offset, layout.master_offset, layout.master_bytes, state_offset, layout.state_bytes, *sums, updates
            ),
        )
        self._writing.append(piece)

    def put_back(self, piece: StatePiece) -> None:
        """A piece that was taken and not changed."""
        piece.release()
        if not piece.kept:
            self._empty(piece)

    def fetch_ahead(self) -> None:
        """Finishes what is written, and asks for what comes next."""
        for piece in [piece for piece in self._writing if piece.settled]:
            self._finish_write(piece)
        while self._coming and not isinstance(self._coming[0], Later):
            request, index = self._coming[0]
            key = (request.unit.name, index)
            if self._is_kept(key):
                self._fetch(*self._coming.popleft())
            elif key in self._pieces and self._pieces[key].state is not State.WRITING:
                return  # wanted twice, and not yet used for the first time
            elif self._pool.free_count:
                self._fetch(*self._coming.popleft())
            elif self._ahead or not self._writing:
                return
            else:  # with nothing read ahead the next update would wait for a read: better to wait for a write now
                self._finish_write(self._writing[0])

    def settle(self, name: str) -> None:
        """Waits until no write of unit `name` is under way."""
        for piece in [piece for piece in self._writing if piece.unit.name == name]:
            self._finish_write(piece)

    def drain(self) -> None:
        """Waits for all writes; what was fetched and not used is given up."""
        self._coming.clear()
        self._pass_over_ahead()
        while self._writing:
            self._finish_write(self._writing[0])

    def _fetch(self, request: Request, index: int) -> None:
        """There is a free buffer, or the piece has one."""
        key = (request.unit.name, index)
        piece = self._pieces.get(key)
        if piece is not None and piece.state is State.WRITING:
            self._finish_write(piece)
        layout, stored = self.keeping.piece_format(request.unit, index, request.rule), self._store.pieces.get(key)
        if key in self._pieces:
            piece.acquire()
        else:
            piece, lease = StatePiece(self._io, request.unit, index), self._pool.lease()
            piece.fetch(lease, self._extents(stored, layout, lease.address) if stored is not None else [])
            self._pieces[key] = piece
        piece.format, piece.stored = layout, stored
        self._ahead.append(piece)

    def _extents(self, stored: StoredPiece, layout: PieceFormat, address: int) -> list[Extent]:
        """Weights are not read: they are in a slot."""
        masters = stored.offset + stored.weights_bytes
        extents = [
            (self._store.file, masters, stored.master_bytes, address + layout.master_offset),
            (self._store.file, stored.state_offset, stored.state_bytes, address + layout.state_offset),
        ]
        return [extent for extent in extents if extent[2]]

    def _fill(self, piece: StatePiece) -> None:
        """Checks what was read, and makes zeros of what there was none of."""
        stored, masters, state = piece.stored, piece.masters(torch.uint8), piece.all_state
        if not piece.has_masters:
            masters.zero_()
        elif not piece.kept and self._sum(masters) != stored.master_sum:
            raise damaged(self._store.path, piece.unit.name, piece.place, "master weights")
        if stored is None or not stored.state_bytes:
            state.zero_()
        elif not piece.kept and self._sum(state) != stored.state_sum:
            raise damaged(self._store.path, piece.unit.name, piece.place, "optimizer state")

    def _finish_write(self, piece: StatePiece) -> None:
        self.stall_seconds += piece.written()
        self._writing.remove(piece)
        if not piece.kept and self._may_keep:
            self._may_keep -= 1
            piece.kept = True
        if not piece.kept:
            self._empty(piece)

    def _is_kept(self, key: Key) -> bool:
        """Whether a buffer has the piece, and nobody has asked for it."""
        return key in self._pieces and self._pieces[key].state is State.READY

    def _pass_over_ahead(self) -> None:
        while self._ahead:
            self._pass_over(self._ahead.popleft())

    def _pass_over(self, piece: StatePiece) -> None:
        """It was asked for, and is not needed."""
        if piece.state is State.FETCHING:
            piece.settle()
            self._empty(piece)
        else:
            self.put_back(piece)

    def _empty(self, piece: StatePiece) -> None:
        """Gives its buffer to others."""
        piece.leave()
        del self._pieces[piece.key]
        self._may_keep += piece.kept

    def _sum(self, part: torch.Tensor) -> int:
        return checksum(part, part.numel(), self._threads) if part.numel() else 0


def _fetches(requests: Iterable[Request | Later]) -> Iterator[tuple[Request, int] | Later]:
    for request in requests:
        if isinstance(request, Later):
            yield request
        else:
            yield from ((request, index) for index in request.fetches())


def _is(coming: tuple[Request, int] | Later, key: Key) -> bool:
    return not isinstance(coming, Later) and (coming[0].unit.name, coming[1]) == key


def stored_reads(unit: UpdateUnit, store: WorkingStore) -> list[Read]:
    """What fills a slot with the newest weights of `unit`: pieces of the store, and the original's bytes where it has none."""
    stored = {i: store.pieces[unit.name, i] for i in range(len(unit.pieces)) if (unit.name, i) in store.pieces}
    reads = [Read(store.path, found.offset, found.weights_bytes, unit.pieces[i].start) for i, found in stored.items()]
    for start, stop in missing_ranges(unit.pieces, stored):
        reads += clipped_reads(unit.layout.reads, start, stop)
    return reads


def check_weights(unit: UpdateUnit, store: WorkingStore, image: torch.Tensor, threads: int) -> None:
    """Raises UserError unless `image`, freshly read, holds what the store's pieces of `unit` held when they were written."""
    for index, piece in enumerate(unit.pieces):
        stored = store.pieces.get((unit.name, index))
        if stored is not None:
            part = image[piece.start : piece.start + piece.num_bytes]
            if checksum(part, part.numel(), threads) != stored.weights_sum:
                raise damaged(store.path, unit.name, piece, "weights")
