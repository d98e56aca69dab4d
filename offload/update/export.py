"""A checkpoint with the weights of a working store: files, names, shapes and dtypes of the original, written as a stream."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from finetune.offload.files.checkpoint import Checkpoint
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.pieces import new_pool, pass_through
from finetune.offload.update.stored_parts import Move, StoredPieces
from finetune.offload.update.units import UpdateUnit
from finetune.offload.weights.checkpoint_directory import new_checkpoint
from finetune.offload.weights.parameter_map import ParameterMap

BUFFER_BYTES = 4 << 20


class _Range(NamedTuple):
    """Bytes of an open file, and where they go. piece: which one they are, if they are of the store."""

    file: int
    offset: int  # in that file
    num_bytes: int  # that are read
    writes: Sequence[tuple[int, int, int, int]]
    """(file, offset in it, bytes, offset in the range)"""
    piece: tuple[UpdateUnit, int] | None = None


def export_store(
    checkpoint: Checkpoint,
    sources: ParameterMap,
    stored: StoredPieces,
    directory: Path,
    *,
    side_files: Mapping[Path, Path],
    io_backend: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `checkpoint`, with what is `stored` in its place, to `directory`.

    side_files: as `new_checkpoint` takes them. The directory appears only once it is whole and durable. Every piece is
    checked against its checksum. Raises UserError when one is damaged, the disk is full or the directory cannot be written.
    """
    moves = {unit.name: list(stored.moves(unit, sources)) for unit in stored.trained.units}
    covered: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for of_unit in moves.values():
        for _, move in of_unit:
            covered[move.path].append((move.file_offset, move.file_offset + move.num_bytes))
    with new_checkpoint(directory, checkpoint, side_files) as temporary, IOEngine(io_backend) as io:
        targets = {path: _create(io, path, temporary / path.name) for path in checkpoint.files}
        rests = (_rest(io, path, target, sorted(covered[path])) for path, target in targets.items())
        ranges = chain(chain.from_iterable(rests), _stored(io, stored, moves, targets))
        coming = ((part, part.file, part.offset, part.num_bytes) for part in ranges)
        done_bytes = 0
        for part, piece in pass_through(io, new_pool(BUFFER_BYTES, 1), coming):
            if part.piece is not None:
                stored.check_piece(*part.piece, piece.buffer[: part.num_bytes])
            address = piece.lease.address
            piece.write([(target, at, num_bytes, address + skip) for target, at, num_bytes, skip in part.writes])
            done_bytes += sum(num_bytes for _, _, num_bytes, _ in part.writes)
            progress(min(done_bytes, checkpoint.num_bytes), checkpoint.num_bytes)
        for target in targets.values():
            io.sync(target)


def _create(io: IOEngine, old: Path, new: Path) -> int:
    """A file as large as `old`, open for writing."""
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        os.posix_fallocate(file.fileno(), 0, old.stat().st_size)
    return io.open(new, writable=True)


def _rest(io: IOEngine, path: Path, target: int, covered: Sequence[tuple[int, int]]) -> Iterator[_Range]:
    """Everything of a file outside of the covered ranges."""
    file, at, file_bytes = io.open(path), 0, path.stat().st_size
    for low, high in [*covered, (file_bytes, file_bytes)]:
        while at < low:
            num_bytes = min(BUFFER_BYTES, low - at)
            yield _Range(file, at, num_bytes, [(target, at, num_bytes, 0)])
            at += num_bytes
        at = max(at, high)
    io.close_file(file)


def _stored(
    io: IOEngine, stored: StoredPieces, moves: Mapping[str, Sequence[tuple[int, Move]]], targets: Mapping[Path, int]
) -> Iterator[_Range]:
    """All pieces of the store."""
    if not stored.pieces:
        return
    file = io.open(stored.data)
    for unit in stored.trained.units:
        writes: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        for index, move in moves[unit.name]:
            skip = move.image_offset - unit.pieces[index].start
            writes[index].append((targets[move.path], move.file_offset, move.num_bytes, skip))
        for index, parts in writes.items():
            piece = stored.pieces[unit.name, index]
            yield _Range(file, piece.offset, piece.weights_bytes, parts, (unit, index))
    io.close_file(file)
