"""The out-of-core optimizer: streams the state of pieces through a few buffers, updates weights in place, writes new versions.

State is read ahead in the order in which gradients will be complete, so that when a unit's backward visit ends its state is
there; its new version is written while other blocks compute (Fuyou, Liao et al. 2024: synchronous, no staleness).

Where there is memory for more buffers than that needs, some pieces keep theirs: they are written at every step all the same,
and not read again. The first that come are kept, and stay: in an order that is the same every step no choice keeps more.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch

from memory.errors import UserError
from memory.slots import Lease, SlotPool, round_up
from offload.residency.io import IOEngine
from offload.update import adafactor, projections
from offload.update import rules as update_rules
from offload.update.rules import Rule, StateFormat, Sums
from offload.update.store import Key, StoredPiece, WorkingStore
from offload.update.trust_ratio import TrustRatios, masters
from offload.update.units import Piece, Segment, UpdateUnit, clipped_reads, missing_ranges
from offload.weights.parameter_map import Read

FACTORS = -1
"""Index of the piece that holds no weights, but what a rule with directions keeps of a unit's matrices."""


class Direction(Protocol):
    def of(self, first: int, count: int) -> torch.Tensor:
        """fp32 [count]: what the elements of a parameter from `first` on move along."""


@dataclass(frozen=True, slots=True)
class Request:
    """One unit's update. trained: local names; others keep their bytes. scale: of the learning rate. undecayed: local names
    of what weight decay leaves alone."""

    unit: UpdateUnit
    trained: frozenset[str]
    rule: Rule
    scale: float = 1.0
    undecayed: frozenset[str] = frozenset()

    def rule_of(self, name: str) -> Rule:
        """Of a parameter."""
        return replace(self.rule, weight_decay=0.0) if name in self.undecayed else self.rule

    def piece_indices(self) -> list[int]:
        return [
            index
            for index, piece in enumerate(self.unit.pieces)
            if any(segment.name in self.trained for segment in piece.segments)
        ]

    def fetches(self) -> list[int]:
        """Pieces in the order in which they are wanted."""
        first = [FACTORS] if self.rule.has_directions else self.piece_indices() if self.rule.name == "lamb" else []
        return [*first, *self.piece_indices()]


@dataclass(frozen=True, slots=True)
class PieceFormat:
    """How a piece lies in a buffer and on disk: weights, masters, state; each part in whole pages.

    whole_masters: masters are fp32 [units], as those of fp16 weights must be, which are no part of them; else they are the
    remainders of bf16 weights, int16 [units].
    """

    whole_masters: bool
    master_offset: int
    master_bytes: int
    state_offset: int
    state_bytes: int
    arrays: dict[str, tuple[int, int]]
    """Name of a state array -> offset in the piece, bytes."""

    @property
    def num_bytes(self) -> int:
        return self.state_offset + self.state_bytes


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is kept beside weights. masters: whether 16-bit weights have an fp32 master; without, every update is rounded
    stochastically, which fp16 weights can't be."""

    state: StateFormat = StateFormat()
    masters: bool = True

    def piece_format(self, unit: UpdateUnit, index: int, rule: Rule) -> PieceFormat:
        if index == FACTORS:
            return PieceFormat(False, 0, 0, 0, factors_of(rule).factor_bytes(unit, rule), {})
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


@dataclass(slots=True)
class _Fetched:
    key: Key
    lease: Lease
    ticket: int | None  # None: there is nothing to read
    stored: StoredPiece | None
    kept: bool = False  # the buffer has held it since it was written


@dataclass(frozen=True, slots=True)
class _Given:
    """What the update of a unit has for all of its pieces. directions, ratios: of the rules that have them."""

    gradients: Mapping[str, torch.Tensor]
    directions: Mapping[str, Direction]
    ratios: TrustRatios | None
    learning_rate: float
    grad_scale: float
    seed: int


class OptimizerStream:
    """pool: buffers, each for the largest piece. kept_pieces: how many of them may be kept; `MIN_STATE_SLOTS` of
    `memory.plan` are left at least. seed: of stochastic rounding and projections. Not thread-safe."""

    def __init__(
        self, io: IOEngine, store: WorkingStore, pool: SlotPool, *, keeping: Keeping, seed: int, threads: int,
        kept_pieces: int = 0,
    ) -> None:  # fmt: skip
        self._io = io
        self._store = store
        self._pool = pool
        self._keeping = keeping
        self._seed = seed
        self._threads = threads
        self._coming: deque[tuple[Request, int]] = deque()
        self._fetched: deque[_Fetched] = deque()
        self._writing: dict[Key, tuple[Lease, int]] = {}  # oldest first
        self._kept_pieces = kept_pieces
        self._keys_kept: set[Key] = set()
        self._kept: dict[Key, Lease] = {}  # of these, the ones that nobody uses
        self.stall_seconds = 0.0

    def begin(self, requests: Sequence[Request]) -> None:
        """The updates of the step, in order; what does not come in the end is passed over."""
        self._coming = deque((request, index) for request in requests for index in request.fetches())
        if requests:
            coming = {(request.unit.name, index) for request, index in self._coming}
            for key in self._kept.keys() - coming:
                self._kept.pop(key).release()
                self._keys_kept.discard(key)
        self._fetch_ahead()

    def update(
        self, request: Request, image: torch.Tensor, gradients: Mapping[str, torch.Tensor],
        learning_rate: float, grad_scale: float, step: int,
    ) -> Sums:  # fmt: skip
        """Updates the trained parameters of a unit in place, in its image (uint8), and starts to write their new version.

        gradients: local name -> contiguous gradient, fp32 or bf16. step: of the run, from 1; it seeds stochastic rounding.
        """
        indices = [index for index in request.piece_indices() if _segments(request, index, gradients)]
        if not indices:
            return Sums(0.0, 0.0)
        directions: Mapping[str, Direction] = {}
        ratios: TrustRatios | None = None
        if request.rule.has_directions:
            directions = self._observe(request, gradients, grad_scale)
        elif request.rule.name == "lamb":
            ratios = self._trust(request, indices, image, gradients, grad_scale)
        given = _Given(gradients, directions, ratios, learning_rate * request.scale, grad_scale, self._seed + step)
        change_sq = weight_sq = 0.0
        for index in indices:
            fetched = self._take(request, index)
            sums = self._update_piece(request, index, fetched, image, given)
            change_sq, weight_sq = change_sq + sums.change_sq, weight_sq + sums.weight_sq
            self._fetch_ahead()
        return Sums(change_sq, weight_sq)

    def settle(self, name: str) -> None:
        """Waits until no write of unit `name` is under way."""
        for key in [key for key in self._writing if key[0] == name]:
            self._finish_write(key)

    def drain(self) -> None:
        """Waits for all writes; what was fetched and not used is given up."""
        self._coming.clear()
        while self._fetched:
            self._drop(self._fetched.popleft())
        for key in list(self._writing):
            self._finish_write(key)

    def _observe(
        self, request: Request, gradients: Mapping[str, torch.Tensor], grad_scale: float
    ) -> Mapping[str, Direction]:
        """Takes the gradients into the unit's factors, and starts to write these."""
        fetched = self._take(request, FACTORS)
        _, state, updates = self._checked(request, FACTORS, fetched, None)
        gradients = {name: grad for name, grad in gradients.items() if name in request.trained}
        directions = factors_of(request.rule).directions(
            request.unit, request.rule, state, gradients, grad_scale, self._seed
        )
        self._write(request, FACTORS, fetched, updates + 1)
        self._fetch_ahead()
        return directions

    def _trust(
        self, request: Request, indices: Sequence[int], image: torch.Tensor, gradients: Mapping[str, torch.Tensor],
        grad_scale: float,
    ) -> TrustRatios:  # fmt: skip
        """Of all parameters in these pieces; nothing is changed."""
        ratios = TrustRatios()
        for index in indices:
            piece, layout, fetched = request.unit.pieces[index], self._format(request, index), self._take(request, index)
            master, _, updates = self._checked(request, index, fetched, image)
            dtype = torch.float32 if self._keeping.state.name == "float32" else torch.bfloat16
            state = {
                name: fetched.lease.buffer[start : start + num_bytes].view(dtype)
                for name, (start, num_bytes) in layout.arrays.items()
            }
            for segment in _segments(request, index, gradients):
                units, weights = _units(request.unit, piece, segment), _weights(image, segment)
                remainder = None
                if layout.whole_masters and weights.itemsize == 2:
                    weights = master.view(torch.float32)[units]
                elif layout.master_bytes and weights.itemsize == 2:
                    remainder = master.view(torch.int16)[units]
                gradient = gradients[segment.name].view(-1)[segment.first_element :][: segment.count]
                ratios.add(
                    segment.name, request.rule_of(segment.name), masters(weights, remainder), gradient, grad_scale,
                    state["first"][units], state["second"][units], updates + 1,
                )  # fmt: skip
            self._leave(fetched)
            self._fetch_ahead()
        return ratios

    def _update_piece(
        self, request: Request, index: int, fetched: _Fetched, image: torch.Tensor, given: _Given
    ) -> Sums:
        unit, piece = request.unit, request.unit.pieces[index]
        layout = self._format(request, index)
        buffer = fetched.lease.buffer[: layout.num_bytes]
        master, _, updates = self._checked(request, index, fetched, image)
        found = _segments(request, index, given.gradients)
        moved_along, segments, rounded = [], [], []
        for segment in found:
            along = given.gradients[segment.name].view(-1)[segment.first_element :]
            if given.directions:
                along = given.directions[segment.name].of(segment.first_element, segment.count)
            moved_along.append(along)  # it must live as long as its address is used
            units, weights = _units(unit, piece, segment), _weights(image, segment)
            copy = buffer.data_ptr() + segment.offset - piece.start
            if layout.whole_masters and weights.itemsize == 2:
                masters_of = master.view(torch.float32)[units]
                rounded.append((weights, masters_of))
                weights, copy = masters_of, 0
            segments.append(
                update_rules.Segment(
                    units.start, segment.count, weights.data_ptr(), weights.dtype, along.data_ptr(), along.dtype, copy=copy,
                    element=_first_element(unit.fqns[segment.name]) + segment.first_element,
                )
            )  # fmt: skip
        # With 8 bit a block of state on the border of two of these is rounded in each.
        together: dict[tuple[Rule, float], list[update_rules.Segment]] = defaultdict(list)
        for s, segment in zip(segments, found, strict=True):
            ratio = 1.0 if given.ratios is None else given.ratios[segment.name]
            together[request.rule_of(segment.name), ratio].append(s)
        change_sq = weight_sq = 0.0
        for (rule, ratio), part in together.items():
            sums = update_rules.update(
                rule, updates + 1, given.learning_rate * ratio, part,
                {name: buffer[start : start + num_bytes] for name, (start, num_bytes) in layout.arrays.items()}, piece.units,
                state_format=self._keeping.state,
                remainder=master if layout.master_bytes and not layout.whole_masters else 0,
                gradient_scale=1.0 if given.directions else given.grad_scale,
                rounding="nearest" if self._keeping.masters else "stochastic", seed=given.seed, threads=self._threads,
            )  # fmt: skip
            change_sq, weight_sq = change_sq + sums.change_sq, weight_sq + sums.weight_sq
        for weights, masters_of in rounded:
            weights.copy_(masters_of)
        if piece.others or rounded or len(segments) < len(piece.segments):
            # Else only gaps between weights are not what is in the slot.
            buffer[: piece.num_bytes].copy_(image[piece.start : piece.start + piece.num_bytes])
        self._write(request, index, fetched, updates + 1)
        return Sums(change_sq, weight_sq)

    def _checked(
        self, request: Request, index: int, fetched: _Fetched, image: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Masters and state of a piece that was fetched, bytes; for what was never written zeros, and masters that are the
        weights of `image`. Third: earlier updates."""
        unit, stored, layout = request.unit, fetched.stored, self._format(request, index)
        piece = None if index == FACTORS else unit.pieces[index]
        master = fetched.lease.buffer[layout.master_offset : layout.state_offset]
        state = fetched.lease.buffer[layout.state_offset : layout.num_bytes]
        updates = 0
        if stored is None or not stored.master_bytes:
            master.zero_()
            if layout.whole_masters:
                for segment in piece.segments:
                    master.view(torch.float32)[_units(unit, piece, segment)].copy_(_weights(image, segment))
        elif not fetched.kept:
            self._check(unit, piece, master, stored.master_sum, "master weights")
        if stored is None or not stored.state_bytes:
            state.zero_()
        else:
            updates = stored.updates
            if not fetched.kept:
                self._check(unit, piece, state, stored.state_sum, "optimizer state")
        return master, state, updates

    def _write(self, request: Request, index: int, fetched: _Fetched, updates: int) -> None:
        """Starts to write the new version of a piece, which is in the buffer."""
        layout, key = self._format(request, index), (request.unit.name, index)
        offset, state_offset = self._store.place(key, layout.state_offset, layout.state_bytes)
        bounds = (0, layout.master_offset, layout.state_offset, layout.num_bytes)
        sums = [self._sum(fetched.lease.buffer[low:high]) for low, high in pairwise(bounds)]
        address = fetched.lease.address
        extents = [
            (self._store.file, offset, layout.state_offset, address),
            (self._store.file, state_offset, layout.state_bytes, address + layout.state_offset),
        ]
        ticket = self._io.submit_writes([extent for extent in extents if extent[2]])
        self._store.put(
            key,
            StoredPiece(
                offset, layout.master_offset, layout.master_bytes, state_offset, layout.state_bytes, *sums, updates
            ),
        )
        self._writing[key] = (fetched.lease, ticket)

    def _format(self, request: Request, index: int) -> PieceFormat:
        return self._keeping.piece_format(request.unit, index, request.rule)

    def _take(self, request: Request, index: int) -> _Fetched:
        """The piece with its state in a buffer, read ahead or now; what was read ahead for others before it is given up."""
        key = (request.unit.name, index)
        while self._fetched and self._fetched[0].key != key and any(f.key == key for f in self._fetched):
            self._drop(self._fetched.popleft())
        if not self._fetched or self._fetched[0].key != key:
            if any(r.unit.name == key[0] and i == index for r, i in self._coming):
                while (self._coming[0][0].unit.name, self._coming[0][1]) != key:
                    self._coming.popleft()
                self._coming.popleft()
            while self._fetched:
                self._drop(self._fetched.popleft())
            while not self._pool.free_count and key not in self._kept:
                self._finish_write(next(iter(self._writing)))
            self._fetch(request, index)
        fetched = self._fetched.popleft()
        if fetched.ticket is not None:
            self.stall_seconds += self._io.wait(fetched.ticket)
        return fetched

    def _fetch_ahead(self) -> None:
        for key in [key for key, (_, ticket) in self._writing.items() if self._io.done(ticket)]:
            self._finish_write(key)
        while self._coming:
            request, index = self._coming[0]
            key = request.unit.name, index
            if request.rule.name == "lamb" and any(fetched.kept and fetched.key == key for fetched in self._fetched):
                return  # it takes a piece twice: that comes back
            if self._pool.free_count or key in self._kept:
                self._fetch(*self._coming.popleft())
            elif self._fetched or not self._writing:
                return
            else:  # with nothing read ahead the next update would wait for a read: better to wait for a write now
                self._finish_write(next(iter(self._writing)))

    def _fetch(self, request: Request, index: int) -> None:
        key = (request.unit.name, index)
        if key in self._writing:
            self._finish_write(key)
        stored = self._store.pieces.get(key)
        if key in self._kept:
            self._fetched.append(_Fetched(key, self._kept.pop(key), None, stored, kept=True))
            return
        lease = self._pool.lease()
        layout, ticket = self._format(request, index), None
        if stored is not None:
            file, address = self._store.file, lease.address
            parts = [
                (file, stored.offset + stored.weights_bytes, stored.master_bytes, address + layout.master_offset),
                (file, stored.state_offset, stored.state_bytes, address + layout.state_offset),
            ]
            if extents := [part for part in parts if part[2]]:
                ticket = self._io.submit_reads(extents)
        self._fetched.append(_Fetched(key, lease, ticket, stored))

    def _drop(self, fetched: _Fetched) -> None:
        if fetched.ticket is not None:
            self._io.wait(fetched.ticket)
        self._leave(fetched)

    def _leave(self, fetched: _Fetched) -> None:
        """It was not changed."""
        if fetched.kept:
            self._give_back(fetched.key, fetched.lease)
        else:
            fetched.lease.release()

    def _finish_write(self, key: Key) -> None:
        lease, ticket = self._writing[key]
        self.stall_seconds += self._io.wait(ticket)
        del self._writing[key]
        self._give_back(key, lease)

    def _give_back(self, key: Key, lease: Lease) -> None:
        """A buffer that holds the newest version of a piece, which may keep it."""
        if key not in self._keys_kept and len(self._keys_kept) < self._kept_pieces:
            self._keys_kept.add(key)
        if key in self._kept:  # lamb takes a piece twice, and has read it a second time meanwhile
            self._kept.pop(key).release()
        if key in self._keys_kept:
            self._kept[key] = lease
        else:
            lease.release()

    def _sum(self, part: torch.Tensor) -> int:
        return update_rules.checksum(part, part.numel(), self._threads) if part.numel() else 0

    def _check(self, unit: UpdateUnit, piece: Piece | None, part: torch.Tensor, expected: int, what: str) -> None:
        if self._sum(part) != expected:
            raise damaged(self._store.path, unit.name, piece, what)


def factors_of(rule: Rule) -> ModuleType:
    """The module of a rule that has directions."""
    return adafactor if rule.name == "adafactor" else projections


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
            if update_rules.checksum(part, part.numel(), threads) != stored.weights_sum:
                raise damaged(store.path, unit.name, piece, "weights")


def damaged(data: Path, name: str, piece: Piece | None, what: str) -> UserError:
    """piece: None for the factors."""
    where = f", bytes {piece.start} to {piece.start + piece.num_bytes} of the unit," if piece else ""
    return UserError(
        f"{data}: the {what} of {name}{where} are not what was written (checksum): the disk or memory is faulty. "
        "Nothing was trained on them. Restore the store from a "
        "copy, or begin again with another --output"
    )


def _segments(request: Request, index: int, gradients: Mapping[str, torch.Tensor]) -> list[Segment]:
    """Of a piece, what is updated."""
    segments = request.unit.pieces[index].segments
    return [segment for segment in segments if segment.name in request.trained and segment.name in gradients]


def _units(unit: UpdateUnit, piece: Piece, segment: Segment) -> slice:
    """Where the state of a segment's elements is in the piece's arrays."""
    first = (segment.offset - piece.start) // unit.itemsize
    return slice(first, first + segment.count)


def _weights(image: torch.Tensor, segment: Segment) -> torch.Tensor:
    return image[segment.offset : segment.end].view(segment.view.dtype)


def _first_element(fqn: str) -> int:
    """Where a parameter's elements begin in the sequence of random bits: far from those of others."""
    return int.from_bytes(hashlib.blake2b(fqn.encode(), digest_size=3).digest(), "little") << 40
