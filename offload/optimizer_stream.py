"""The out-of-core optimizer: streams the state of pieces through a few buffers, updates weights in place, writes new versions.

State is read ahead in the order in which gradients will be complete, so that when a unit's backward visit ends its state is
there; its new version is written while other blocks compute (Fuyou, Liao et al. 2024: synchronous, no staleness).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memory.errors import UserError
from memory.slab import Lease, SlotPool, round_up
from offload import update_rules
from offload.block_store import Read
from offload.io import IOEngine
from offload.update_rules import Rule, StateFormat, Sums
from offload.update_units import Piece, UpdateUnit, clipped_reads, missing_ranges
from offload.working_store import Key, StoredPiece, WorkingStore


@dataclass(frozen=True, slots=True)
class Request:
    """One unit's update. trained: local names; others keep their bytes. scale: of the learning rate."""

    unit: UpdateUnit
    trained: frozenset[str]
    rule: Rule
    scale: float = 1.0

    def piece_indices(self) -> list[int]:
        return [
            index
            for index, piece in enumerate(self.unit.pieces)
            if any(segment.name in self.trained for segment in piece.segments)
        ]


@dataclass(frozen=True, slots=True)
class PieceFormat:
    """How a piece lies in a buffer and on disk: weights, remainders of masters, state; each part in whole pages."""

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
    stochastically."""

    state: StateFormat = StateFormat()
    masters: bool = True

    def piece_format(self, unit: UpdateUnit, index: int, rule: Rule) -> PieceFormat:
        piece = unit.pieces[index]
        master_bytes = round_up(2 * piece.units) if self.masters and unit.itemsize == 2 else 0
        start = piece.num_bytes + master_bytes
        arrays, end = {}, start
        for name, num_bytes in self.state.array_bytes(rule, piece.units).items():
            arrays[name] = (end, num_bytes)
            end += round_up(num_bytes, 64)
        return PieceFormat(piece.num_bytes, master_bytes, start, round_up(end - start), arrays)


@dataclass(slots=True)
class _Fetched:
    key: Key
    lease: Lease
    ticket: int | None  # None: there is nothing to read
    stored: StoredPiece | None


class OptimizerStream:
    """pool: buffers, each for the largest piece. seed: of stochastic rounding. Not thread-safe."""

    def __init__(
        self, io: IOEngine, store: WorkingStore, pool: SlotPool, *, keeping: Keeping, seed: int, threads: int
    ) -> None:
        self._io = io
        self._store = store
        self._pool = pool
        self._keeping = keeping
        self._seed = seed
        self._threads = threads
        self._coming: deque[tuple[Request, int]] = deque()
        self._fetched: deque[_Fetched] = deque()
        self._writing: dict[Key, tuple[Lease, int]] = {}  # oldest first
        self.stall_seconds = 0.0

    def begin(self, requests: Sequence[Request]) -> None:
        """The updates of the step, in order; what does not come in the end is passed over."""
        self._coming = deque((request, index) for request in requests for index in request.piece_indices())
        self._fetch_ahead()

    def update(
        self, request: Request, image: torch.Tensor, gradients: Mapping[str, torch.Tensor],
        learning_rate: float, grad_scale: float, step: int,
    ) -> Sums:  # fmt: skip
        """Updates the trained parameters of a unit in place, in its image (uint8), and starts to write their new version.

        gradients: local name -> contiguous gradient, fp32 or bf16. step: of the run, from 1; it seeds stochastic rounding.
        """
        change_sq = weight_sq = 0.0
        for index in request.piece_indices():
            if not any(segment.name in gradients for segment in request.unit.pieces[index].segments):
                continue
            fetched = self._take(request, index)
            sums = self._update_piece(request, index, fetched, image, gradients, learning_rate, grad_scale, step)
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

    def _update_piece(
        self, request: Request, index: int, fetched: _Fetched, image: torch.Tensor,
        gradients: Mapping[str, torch.Tensor], learning_rate: float, grad_scale: float, step: int,
    ) -> Sums:  # fmt: skip
        unit, piece, stored = request.unit, request.unit.pieces[index], fetched.stored
        layout = self._format(request, index)
        buffer = fetched.lease.buffer[: layout.num_bytes]
        master = buffer[layout.master_offset : layout.master_offset + layout.master_bytes]
        state = buffer[layout.state_offset :]
        updates = 0
        if stored is not None and stored.master_bytes:
            self._check(unit, piece, master, stored.master_sum, "master weights")
        else:
            master.zero_()
        if stored is not None and stored.state_bytes:
            self._check(unit, piece, state, stored.state_sum, "optimizer state")
            updates = stored.updates
        else:
            state.zero_()
        weights = image[piece.start : piece.start + piece.num_bytes]
        segments = [
            update_rules.Segment(
                (segment.offset - piece.start) // unit.itemsize, segment.count,
                image.data_ptr() + segment.offset, segment.view.dtype,
                gradients[segment.name].view(-1)[segment.first_element :].data_ptr(), gradients[segment.name].dtype,
                copy=buffer.data_ptr() + segment.offset - piece.start,
                element=_first_element(unit.fqns[segment.name]) + segment.first_element,
            )
            for segment in piece.segments
            if segment.name in request.trained and segment.name in gradients
        ]  # fmt: skip
        sums = update_rules.update(
            request.rule, updates + 1, learning_rate * request.scale, segments,
            {name: buffer[start : start + num_bytes] for name, (start, num_bytes) in layout.arrays.items()}, piece.units,
            state_format=self._keeping.state, remainder=master if layout.master_bytes else 0, gradient_scale=grad_scale,
            rounding="stochastic" if not self._keeping.masters else "nearest", seed=self._seed + step, threads=self._threads,
        )  # fmt: skip
        if piece.others or len(segments) < len(piece.segments):
            buffer[: piece.num_bytes].copy_(weights)  # else only gaps between weights are not what is in the slot
        key = (unit.name, index)
        offset, state_offset = self._store.place(key, layout.state_offset, layout.state_bytes)
        parts = (buffer[: piece.num_bytes], master, state)
        weights_sum, master_sum, state_sum = (self._sum(part) for part in parts)
        address = fetched.lease.address
        extents = [(self._store.file, offset, layout.state_offset, address)]
        if layout.state_bytes:
            extents.append((self._store.file, state_offset, layout.state_bytes, address + layout.state_offset))
        ticket = self._io.submit_writes(extents)
        self._store.put(
            key,
            StoredPiece(
                offset, piece.num_bytes, layout.master_bytes, state_offset, layout.state_bytes,
                weights_sum, master_sum, state_sum, updates + 1,
            ),
        )  # fmt: skip
        self._writing[key] = (fetched.lease, ticket)
        return sums

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
            while not self._pool.free_count:
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
            if not self._pool.free_count:
                # With nothing read ahead the next update would wait for a read: better to wait for a write now.
                if self._fetched or not self._writing:
                    return
                self._finish_write(next(iter(self._writing)))
            self._fetch(*self._coming.popleft())

    def _fetch(self, request: Request, index: int) -> None:
        key = (request.unit.name, index)
        if key in self._writing:
            self._finish_write(key)
        lease, stored = self._pool.lease(), self._store.pieces.get(key)
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
        fetched.lease.release()

    def _finish_write(self, key: Key) -> None:
        lease, ticket = self._writing[key]
        self.stall_seconds += self._io.wait(ticket)
        del self._writing[key]
        lease.release()

    def _sum(self, part: torch.Tensor) -> int:
        return update_rules.checksum(part, part.numel(), self._threads) if part.numel() else 0

    def _check(self, unit: UpdateUnit, piece: Piece, part: torch.Tensor, expected: int, what: str) -> None:
        if self._sum(part) != expected:
            raise damaged(self._store.path, unit.name, piece, what)


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


def damaged(data: Path, name: str, piece: Piece, what: str) -> UserError:
    return UserError(
        f"{data}: the {what} of {name}, bytes {piece.start} to {piece.start + piece.num_bytes} of the unit, are not "
        "what was written (checksum): the disk or memory is faulty. Nothing was trained on them. Restore the store from a "
        "copy, or begin again with another --output"
    )


def _first_element(fqn: str) -> int:
    """Where a parameter's elements begin in the sequence of random bits: far from those of others."""
    return int.from_bytes(hashlib.blake2b(fqn.encode(), digest_size=3).digest(), "little") << 40
