"""A model's parts with their bytes where a working store has them: what reads a tuned model without training it."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.pieces import new_pool, pass_through
from finetune.offload.update.kernels import checksum
from finetune.offload.update.parts import TrainedParts
from finetune.offload.update.store import Key, StoredPiece, damaged, stored_pieces
from finetune.offload.update.units import UpdateUnit
from finetune.offload.weights.formats import Extent, PlainTensor, StoredWeight
from finetune.offload.weights.parameter_map import ParameterMap, copies_of
from finetune.offload.weights.parts import ModelParts

_Range = tuple[int, int, int]
"""Bytes [start, stop) of a file of the checkpoint, and where the store's file has what they are now."""


class Move(NamedTuple):
    """`num_bytes` bytes from `image_offset` of a unit's image on belong at `file_offset` of a file of the checkpoint."""

    image_offset: int
    num_bytes: int
    path: Path  # of the checkpoint's file
    file_offset: int


@dataclass(frozen=True, slots=True)
class StoredPieces:
    """What a working store has of a model's weights."""

    trained: TrainedParts
    """The units of the pieces."""
    data: Path
    """The store's file."""
    pieces: Mapping[Key, StoredPiece]
    """Where they are in it."""

    @classmethod
    def of(cls, directory: Path, manifest: Mapping[str, Any], trained: TrainedParts) -> StoredPieces:
        """Of the store in `directory`. Raises UserError when its pieces are not those of `trained`."""
        trained.check_layout(directory, manifest["about"])
        return cls(trained, directory / "data", stored_pieces(manifest))

    def of_unit(self, unit: UpdateUnit) -> dict[int, StoredPiece]:
        """By index in the unit, ascending."""
        found = ((index, self.pieces.get((unit.name, index))) for index in range(len(unit.pieces)))
        return {index: stored for index, stored in found if stored is not None}

    def moves(self, unit: UpdateUnit, sources: ParameterMap) -> Iterator[tuple[int, Move]]:
        """(index of the piece, move) for what the store has of the unit."""
        moves = list(_moves(unit, sources))
        for index in self.of_unit(unit):
            piece = unit.pieces[index]
            for move in moves:
                start = max(move.image_offset, piece.start)
                stop = min(move.image_offset + move.num_bytes, piece.start + piece.num_bytes)
                if start < stop:
                    yield index, Move(start, stop - start, move.path, move.file_offset + start - move.image_offset)

    def check_piece(self, unit: UpdateUnit, index: int, weights: torch.Tensor) -> None:
        """Raises UserError unless `weights` (uint8), freshly read, are what was written."""
        if checksum(weights, weights.numel()) != self.pieces[unit.name, index].weights_sum:
            raise damaged(self.data, unit.name, unit.pieces[index], "weights")

    def check(self, io_backend: str = "auto") -> None:
        """Reads the weights of all pieces once. Raises UserError when one is not what was written."""
        if not self.pieces:
            return
        with IOEngine(io_backend) as io:
            file = io.open(self.data)
            pool = new_pool(max(stored.weights_bytes for stored in self.pieces.values()), 1)
            ranges = (
                ((unit, index, stored.weights_bytes), file, stored.offset, stored.weights_bytes)
                for unit in self.trained.units
                for index, stored in self.of_unit(unit).items()
            )
            for (unit, index, num_bytes), piece in pass_through(io, pool, ranges):
                self.check_piece(unit, index, piece.buffer[:num_bytes])


def stored_parts(parts: ModelParts, stored: StoredPieces) -> ModelParts:
    """`parts`, of the original, read from the store where it has pieces."""
    ranges: dict[Path, list[_Range]] = defaultdict(list)
    for unit in stored.trained.units:
        for index, move in stored.moves(unit, parts.sources):
            start = stored.pieces[unit.name, index].offset + move.image_offset - unit.pieces[index].start
            ranges[move.path].append((move.file_offset, move.file_offset + move.num_bytes, start))
    for found in ranges.values():
        found.sort()

    def move(tensor: PlainTensor) -> PlainTensor:
        extents = (one for extent in tensor.extents for one in _placed(extent, ranges.get(extent.path, ()), stored.data))
        return PlainTensor(tensor.dtype, tensor.shape, tuple(extents))

    known: dict[StoredWeight, StoredWeight] = {}
    for source in parts.sources.values():
        if source not in known:
            known[source] = source.moved(move)
    sources = ParameterMap()
    sources.update((name, known[source]) for name, source in parts.sources.items())
    sources.tied, sources.apart = parts.sources.tied, parts.sources.apart
    sources.absent, sources.unused = parts.sources.absent, parts.sources.unused
    return parts.on(parts.checkpoint, sources)


def _moves(unit: UpdateUnit, sources: ParameterMap) -> Iterator[Move]:
    """Where the trained bytes of the image come from in the original, and where it holds them once more: read ranges cut to
    the trained parameters."""
    for name in unit.fqns:
        view = unit.layout.views[name]
        low, high = view.slot_offset, view.end
        for read in unit.layout.reads:
            start, stop = max(low, read.slot_offset), min(high, read.slot_offset + read.num_bytes)
            if start < stop:
                offset = read.file_offset + start - read.slot_offset
                yield Move(start, stop - start, read.path, offset)
                for path, at, num_bytes, skip in copies_of(sources.copies, read.path, offset, stop - start):
                    yield Move(start + skip, num_bytes, path, at)


def _placed(extent: Extent, ranges: Sequence[_Range], data: Path) -> Iterator[Extent]:
    """`extent` cut where it goes from one file to the other."""
    at, end = extent.file_offset, extent.file_offset + extent.num_bytes
    for start, stop, place in ranges[max(0, bisect_right(ranges, (at, end, 0)) - 1) :]:
        if start >= end:
            break
        low, high = max(start, at), min(stop, end)
        if low < high:
            if at < low:
                yield Extent(extent.path, at, low - at, extent.target_offset + at - extent.file_offset)
            yield Extent(data, place + low - start, high - low, extent.target_offset + low - extent.file_offset)
            at = high
    if at < end:
        yield Extent(extent.path, at, end - at, extent.target_offset + at - extent.file_offset)
