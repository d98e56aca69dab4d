"""A journal applied to a whole checkpoint, as a stream: what `export` writes, and what a run folds into its working store.

The result is a safetensors checkpoint with the files, names and shapes of the original, written in order through a few
buffers: memory does not depend on the model's size. What is no parameter, or not to be moved, is copied as it is.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import torch

from offload.noise import noise
from offload.perturb.folds import Piece, write_checksums
from offload.residency.io import IOEngine
from offload.update.rules import checksum
from offload.weights.checkpoint import Checkpoint, TensorEntry
from offload.weights.checkpoint_directory import new_checkpoint
from offload.weights.formats import Extent, PlainTensor, StoredWeight
from offload.weights.formats.plain import TORCH_DTYPES
from offload.weights.parameter_map import ParameterMap, copies_of

CHUNK_BYTES = 2 << 20  # of the original, per buffer
BUFFERS = 4
BUFFER_BYTES = BUFFERS * 3 * CHUNK_BYTES  # each has room for a chunk and for its fp32 values

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class _Piece(NamedTuple):
    """Bytes [offset, offset + num_bytes) of a file are elements from `first_element` on of the parameter with `key`, which
    has so many columns (0: it has one dimension)."""

    offset: int
    num_bytes: int
    key: int
    first_element: int
    columns: int


class _Chunk(NamedTuple):
    entry: TensorEntry
    offset: int  # in the original file
    num_bytes: int
    new_offset: int
    new_bytes: int


def replay(
    checkpoint: Checkpoint,
    sources: ParameterMap,
    keys: Mapping[str, int],
    kind: noise.Noise,
    groups: Sequence[noise.Group],
    directory: Path,
    *,
    stored_dtypes: Mapping[str, torch.dtype],
    dtype: torch.dtype | None = None,
    steps: str | None = None,
    side_files: Mapping[Path, Path] | None = None,
    io_backend: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `checkpoint` with `groups` applied to `directory`, which appears only once it is whole and durable.

    keys: parameter fqn -> key of its noise; others are copied. stored_dtypes: tensor name -> dtype that rounding rounds to.
    dtype: what moved tensors become; None: what `stored_dtypes` says. steps: the digest of the steps that are in the result,
    kept beside it with checksums (`offload.perturb.folds`); None: neither is. side_files: as `new_checkpoint` takes them.
    progress: bytes of the original done, and of all.
    Raises UserError when the disk is full or the directory cannot be written, IOFailure for failed reads and writes.
    """
    pieces = _pieces(sources, keys)
    moved = {
        entry.name
        for entry in checkpoint.tensors.values()
        if any(p.offset < entry.offset + entry.num_bytes and entry.offset < p.offset + p.num_bytes
               for p in pieces.get(entry.path, ()))
    }  # fmt: skip
    new_dtypes = {name: (dtype or stored_dtypes[name]) if name in moved else None for name in checkpoint.tensors}
    with new_checkpoint(directory, checkpoint, side_files) as temporary, IOEngine(io_backend) as io:
        writer = _Writer(io, pieces, kind, groups, stored_dtypes, checkpoint.num_bytes, progress)
        for path in checkpoint.files:
            entries = sorted((e for e in checkpoint.tensors.values() if e.path == path), key=lambda e: e.offset)
            writer.write_file(path, temporary / path.name, entries, new_dtypes)
        if steps is not None:
            write_checksums(temporary, steps, writer.written)


def moved_sources(sources: ParameterMap, old: Checkpoint, new: Checkpoint) -> ParameterMap:
    """`sources` with every extent in `new`, a replay of `old`: the same names, maybe other dtypes."""
    by_file: dict[Path, list[TensorEntry]] = defaultdict(list)
    for entry in old.tensors.values():
        by_file[entry.path].append(entry)
    known: dict[StoredWeight, StoredWeight] = {}

    def move(source: StoredWeight) -> StoredWeight:
        if source not in known:
            known[source] = source.moved(lambda tensor: _moved(tensor, by_file, new))
        return known[source]

    moved = copy(sources)
    moved.update({name: move(source) for name, source in sources.items()})
    moved.copies = tuple((move(home), move(again)) for home, again in sources.copies)
    return moved


def _moved(source: PlainTensor, by_file: Mapping[Path, list[TensorEntry]], new: Checkpoint) -> PlainTensor:
    dtype, pieces = source.dtype, []
    for piece in source.extents:
        entry = next(e for e in by_file[piece.path] if e.offset <= piece.file_offset < e.offset + max(e.num_bytes, 1))
        target = new.tensors[entry.name]
        dtype = TORCH_DTYPES[target.dtype]

        def scaled(num_bytes: int, wide: int = dtype.itemsize) -> int:
            return num_bytes // source.dtype.itemsize * wide

        pieces.append(
            Extent(
                target.path,
                target.offset + scaled(piece.file_offset - entry.offset),
                scaled(piece.num_bytes),
                scaled(piece.target_offset),
            )
        )
    return PlainTensor(dtype, source.shape, tuple(pieces))


def _pieces(sources: ParameterMap, keys: Mapping[str, int]) -> dict[Path, list[_Piece]]:
    found: dict[Path, set[_Piece]] = defaultdict(set)
    for name, key in keys.items():
        itemsize, shape = sources[name].dtype.itemsize, sources[name].shape
        columns = shape[-1] if len(shape) > 1 else 0
        for piece in sources[name].extents:
            for path, offset, num_bytes, skip in (
                Extent(piece.path, piece.file_offset, piece.num_bytes, 0),
                *copies_of(sources.copies, piece.path, piece.file_offset, piece.num_bytes),
            ):
                first = (piece.target_offset + skip) // itemsize
                found[path].add(_Piece(offset, num_bytes, key, first, columns))
    return {path: sorted(pieces) for path, pieces in found.items()}


class _Writer:
    """Reads, moves and writes chunks of one file after the other, `BUFFERS` of them under way."""

    def __init__(
        self,
        io: IOEngine,
        pieces: Mapping[Path, list[_Piece]],
        kind: noise.Noise,
        groups: Sequence[noise.Group],
        stored_dtypes: Mapping[str, torch.dtype],
        total_bytes: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._io = io
        self._pieces = pieces
        self._kind = kind
        self._groups = groups
        self._stored_dtypes = stored_dtypes
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress
        self.written: dict[str, list[Piece]] = defaultdict(list)
        self._buffer = torch.empty(BUFFER_BYTES + 4096, dtype=torch.uint8)
        start = -self._buffer.data_ptr() % 4096
        self._buffers = self._buffer[start : start + BUFFER_BYTES].split(3 * CHUNK_BYTES)

    def write_file(
        self, old: Path, new: Path, entries: Sequence[TensorEntry], new_dtypes: Mapping[str, torch.dtype | None]
    ) -> None:
        header, offsets = _header(entries, new_dtypes)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(header)
        self._note(new, 0, torch.frombuffer(bytearray(header), dtype=torch.uint8))
        source, target = self._io.open(old), self._io.open(new, writable=True)
        chunks = deque(_chunks(entries, offsets, new_dtypes))
        pieces = self._pieces.get(old, [])
        reading: deque[tuple[_Chunk, torch.Tensor, int]] = deque()
        writing: deque[tuple[torch.Tensor, int]] = deque()
        free = list(self._buffers)
        first_piece = 0
        while chunks or reading:
            while chunks and free:
                chunk, buffer = chunks.popleft(), free.pop()
                ticket = self._io.submit_reads([(source, chunk.offset, chunk.num_bytes, buffer.data_ptr())])
                reading.append((chunk, buffer, ticket))
            if not reading:
                buffer, ticket = writing.popleft()
                self._io.wait(ticket)
                free.append(buffer)
                continue
            chunk, buffer, ticket = reading.popleft()
            self._io.wait(ticket)
            while (
                first_piece < len(pieces) and pieces[first_piece].offset + pieces[first_piece].num_bytes <= chunk.offset
            ):
                first_piece += 1
            result = buffer[CHUNK_BYTES : CHUNK_BYTES + chunk.new_bytes]
            self._fill(chunk, buffer[: chunk.num_bytes], result, pieces, first_piece, new_dtypes[chunk.entry.name])
            self._note(new, chunk.new_offset, result)
            ticket = self._io.submit_writes([(target, chunk.new_offset, chunk.new_bytes, result.data_ptr())])
            writing.append((buffer, ticket))
            while writing and (self._io.done(writing[0][1]) or not free and not chunks):
                buffer, ticket = writing.popleft()
                self._io.wait(ticket)
                free.append(buffer)
            self._done_bytes += chunk.num_bytes
            self._progress(self._done_bytes, self._total_bytes)
        for _, ticket in writing:
            self._io.wait(ticket)
        self._io.sync(target)
        self._io.close_file(target)
        self._io.close_file(source)

    def _note(self, path: Path, offset: int, written: torch.Tensor) -> None:
        self.written[path.name].append((offset, written.numel(), checksum(written, written.numel())))

    def _fill(
        self,
        chunk: _Chunk,
        read: torch.Tensor,
        result: torch.Tensor,
        pieces: Sequence[_Piece],
        first_piece: int,
        new_dtype: torch.dtype | None,
    ) -> None:
        if new_dtype is None:
            result.copy_(read)
            return
        old, new = read.view(TORCH_DTYPES[chunk.entry.dtype]), result.view(new_dtype)
        new.copy_(old)
        end = chunk.offset + chunk.num_bytes
        for index in range(first_piece, len(pieces)):
            piece = pieces[index]
            if piece.offset >= end:
                break
            low, high = max(piece.offset, chunk.offset), min(piece.offset + piece.num_bytes, end)
            if low < high:
                first, last = (low - chunk.offset) // old.itemsize, (high - chunk.offset) // old.itemsize
                parameter = noise.Parameter(piece.key, piece.columns, self._stored_dtypes[chunk.entry.name])
                at = piece.first_element + (low - piece.offset) // old.itemsize
                noise.move(self._kind, parameter, old[first:last], self._groups, [noise.Target(new[first:last])], at)


def _header(
    entries: Sequence[TensorEntry], new_dtypes: Mapping[str, torch.dtype | None]
) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, padded to whole pages, and where each tensor begins in the file."""
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for entry in entries:
        dtype = new_dtypes[entry.name]
        num_bytes = entry.num_bytes if dtype is None else _scaled(entry, entry.num_bytes, dtype)
        starts[entry.name] = end
        table[entry.name] = {
            "dtype": entry.dtype if dtype is None else _NAMES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + num_bytes],
        }
        end += num_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    size = -(-(len(text) + 8) // 4096) * 4096
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8), {k: size + v for k, v in starts.items()}


def _chunks(
    entries: Sequence[TensorEntry], offsets: Mapping[str, int], new_dtypes: Mapping[str, torch.dtype | None]
) -> Iterator[_Chunk]:
    for entry in entries:
        dtype = new_dtypes[entry.name]
        for start in range(0, entry.num_bytes, CHUNK_BYTES):
            num_bytes = min(CHUNK_BYTES, entry.num_bytes - start)
            new_start, new_bytes = (
                (start, num_bytes)
                if dtype is None
                else (_scaled(entry, start, dtype), _scaled(entry, num_bytes, dtype))
            )
            yield _Chunk(entry, entry.offset + start, num_bytes, offsets[entry.name] + new_start, new_bytes)


def _scaled(entry: TensorEntry, num_bytes: int, dtype: torch.dtype) -> int:
    return num_bytes // TORCH_DTYPES[entry.dtype].itemsize * dtype.itemsize
