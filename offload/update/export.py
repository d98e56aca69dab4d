"""A checkpoint with the weights of a working store: files, names, shapes and dtypes of the original, written as a stream."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from offload.files.checkpoint import Checkpoint
from offload.residency.io import IOEngine
from offload.update.parts import TrainedParts
from offload.update.rules import checksum
from offload.update.store import StoredPiece, damaged
from offload.update.units import UpdateUnit
from offload.weights.checkpoint_directory import new_checkpoint
from offload.weights.parameter_map import ParameterMap, copies_of

BUFFER_BYTES = 4 << 20


class Move(NamedTuple):
    """`num_bytes` bytes from `image_offset` of a unit's image on belong at `file_offset` of a file of the checkpoint."""

    image_offset: int
    num_bytes: int
    path: Path
    file_offset: int


def export_store(
    checkpoint: Checkpoint,
    sources: ParameterMap,
    trained: TrainedParts,
    data: Path,
    pieces: Mapping[tuple[str, int], StoredPiece],
    directory: Path,
    *,
    side_files: Mapping[Path, Path],
    io_backend: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `checkpoint`, with what `pieces` of the store's file `data` hold in its place, to `directory`.

    side_files: as `new_checkpoint` takes them. The directory appears only once it is whole and durable. Every piece is
    checked against its checksum. Raises UserError when one is damaged, the disk is full or the directory cannot be written.
    """
    stored = {unit.name: list(stored_moves(unit, sources, pieces)) for unit in trained.units}
    covered: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for moves in stored.values():
        for _, move in moves:
            covered[move.path].append((move.file_offset, move.file_offset + move.num_bytes))
    with new_checkpoint(directory, checkpoint, side_files) as temporary, IOEngine(io_backend) as io:
        copier = _Copier(io, checkpoint.num_bytes, progress)
        targets = {path: copier.create(path, temporary / path.name) for path in checkpoint.files}
        for path, target in targets.items():
            copier.copy_rest(path, target, sorted(covered[path]))
        copier.copy_pieces(data, trained, stored, pieces, targets)
        for target in targets.values():
            io.sync(target)


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


def stored_moves(
    unit: UpdateUnit, sources: ParameterMap, pieces: Mapping[tuple[str, int], StoredPiece]
) -> Iterator[tuple[int, Move]]:
    """(index of the piece, move) for what the store has of the unit."""
    moves = list(_moves(unit, sources))
    for index, piece in enumerate(unit.pieces):
        if (unit.name, index) in pieces:
            for move in moves:
                start = max(move.image_offset, piece.start)
                stop = min(move.image_offset + move.num_bytes, piece.start + piece.num_bytes)
                if start < stop:
                    yield index, Move(start, stop - start, move.path, move.file_offset + start - move.image_offset)


class _Copier:
    def __init__(self, io: IOEngine, total_bytes: int, progress: Callable[[int, int], None]) -> None:
        self._io = io
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress
        self._memory = torch.empty(BUFFER_BYTES + 4096, dtype=torch.uint8)
        self._buffer = self._memory[-self._memory.data_ptr() % 4096 :][:BUFFER_BYTES]

    def create(self, old: Path, new: Path) -> int:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            os.posix_fallocate(file.fileno(), 0, old.stat().st_size)
        return self._io.open(new, writable=True)

    def copy_rest(self, old: Path, target: int, covered: Sequence[tuple[int, int]]) -> None:
        """Everything of `old` outside of the covered ranges."""
        source, at = self._io.open(old), 0
        for low, high in [*covered, (old.stat().st_size,) * 2]:
            while at < low:
                num_bytes = min(BUFFER_BYTES, low - at)
                self._transfer(source, at, [(target, at, num_bytes, 0)], num_bytes)
                at += num_bytes
            at = max(at, high)
        self._io.close_file(source)

    def copy_pieces(
        self,
        data: Path,
        trained: TrainedParts,
        moves: Mapping[str, Sequence[tuple[int, Move]]],
        pieces: Mapping[tuple[str, int], StoredPiece],
        targets: Mapping[Path, int],
    ) -> None:
        if not pieces:
            return
        source = self._io.open(data)
        for unit in trained.units:
            writes: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
            for index, move in moves[unit.name]:
                skip = move.image_offset - unit.pieces[index].start
                writes[index].append((targets[move.path], move.file_offset, move.num_bytes, skip))
            for index, parts in writes.items():
                piece, stored = unit.pieces[index], pieces[unit.name, index]

                def check(buffer: torch.Tensor, unit=unit, piece=piece, stored=stored) -> None:
                    if checksum(buffer, buffer.numel()) != stored.weights_sum:
                        raise damaged(data, unit.name, piece, "weights")

                self._transfer(source, stored.offset, parts, piece.num_bytes, check)
        self._io.close_file(source)

    def _transfer(
        self, source: int, offset: int, writes: Sequence[tuple[int, int, int, int]], num_bytes: int, check: Any = None
    ) -> None:
        """writes: (file, offset, bytes, offset in the buffer)."""
        address = self._buffer.data_ptr()
        self._io.wait(self._io.submit_reads([(source, offset, num_bytes, address)]))
        if check is not None:
            check(self._buffer[:num_bytes])
        self._io.wait(self._io.submit_writes([(f, at, size, address + skip) for f, at, size, skip in writes]))
        self._done_bytes += sum(size for _, _, size, _ in writes)
        self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)
