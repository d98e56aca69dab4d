"""A model's parts with their bytes where a working store has them: what reads a tuned model without training it."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from offload.residency.io import IOEngine
from offload.update.export import stored_moves
from offload.update.parts import TrainedParts
from offload.update.rules import checksum
from offload.update.store import StoredPiece, damaged
from offload.weights.formats import Extent, PlainTensor, StoredWeight
from offload.weights.parameter_map import ParameterMap
from offload.weights.parts import ModelParts

_Range = tuple[int, int, int]
"""Bytes [start, stop) of a file of the checkpoint, and where the store's file has what they are now."""


def stored_parts(
    parts: ModelParts, trained: TrainedParts, data: Path, pieces: Mapping[tuple[str, int], StoredPiece]
) -> ModelParts:
    """`parts`, of the original, read from the store's file `data` where it has pieces. trained: the units of the pieces."""
    ranges: dict[Path, list[_Range]] = defaultdict(list)
    for unit in trained.units:
        for index, move in stored_moves(unit, parts.sources, pieces):
            start = pieces[unit.name, index].offset + move.image_offset - unit.pieces[index].start
            ranges[move.path].append((move.file_offset, move.file_offset + move.num_bytes, start))
    for found in ranges.values():
        found.sort()

    def move(tensor: PlainTensor) -> PlainTensor:
        extents = (one for extent in tensor.extents for one in _placed(extent, ranges.get(extent.path, ()), data))
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


def check_pieces(
    trained: TrainedParts, data: Path, pieces: Mapping[tuple[str, int], StoredPiece], io_backend: str = "auto"
) -> None:
    """Reads the weights of all pieces once. Raises UserError when one is not what was written."""
    with IOEngine(io_backend) as io:
        file = io.open(data) if pieces else -1
        for unit in trained.units:
            for index, piece in enumerate(unit.pieces):
                if (stored := pieces.get((unit.name, index))) is not None:
                    buffer = torch.empty(stored.weights_bytes, dtype=torch.uint8)
                    io.wait(io.submit_reads([(file, stored.offset, buffer.numel(), buffer.data_ptr())]))
                    if checksum(buffer, buffer.numel()) != stored.weights_sum:
                        raise damaged(data, unit.name, piece, "weights")


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
