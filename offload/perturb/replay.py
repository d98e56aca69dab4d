"""A journal applied to a whole checkpoint, as a stream: what `export` writes, and what a run folds into its working store.

The result is a safetensors checkpoint with the files, names and shapes of the original, written in order through a few
buffers: memory does not depend on the model's size. What is no parameter, or not to be moved, is copied as it is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from finetune.offload.files.checkpoint import Checkpoint, TensorEntry
from finetune.offload.files.safetensors_files import file_header, write_new
from finetune.offload.noise import noise
from finetune.offload.perturb.folds import WrittenRange, write_checksums
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.pieces import new_pool, pass_through
from finetune.offload.update.kernels import checksum
from finetune.offload.weights.checkpoint_directory import new_checkpoint
from finetune.offload.weights.formats import Extent, PlainTensor, StoredWeight
from finetune.offload.weights.formats.plain import DTYPE_NAMES, TORCH_DTYPES
from finetune.offload.weights.parameter_map import ParameterMap, copies_of

CHUNK_BYTES = 2 << 20  # of the original, per buffer
BUFFERS = 4
BUFFER_BYTES = BUFFERS * 3 * CHUNK_BYTES  # each has room for a chunk and for its fp32 values


@dataclass(frozen=True, slots=True)
class Changes:
    """What steps make of a checkpoint."""

    sources: ParameterMap
    """Where parameters are in it."""
    keys: Mapping[str, int]
    """Fully qualified name -> key of its noise, of every parameter that changes."""
    noise: noise.Noise  # its kind
    groups: Sequence[noise.Group]
    """What is added, in order."""
    stored_dtypes: Mapping[str, torch.dtype]
    """Name of a tensor in the files -> dtype that the groups' rounding rounds to."""
    dtype: torch.dtype | None = None
    """What tensors that change are written as; None: as `stored_dtypes` says."""
    least: float | None = None
    """As in `noise.Parameter`."""

    def changed(self, checkpoint: Checkpoint) -> Checkpoint:
        """`checkpoint`, in which `sources` are, with the tensors that change and no others."""
        spans = self.spans()
        tensors = {name: entry for name, entry in checkpoint.tensors.items() if _overlaps(entry, spans.get(entry.path, ()))}
        return replace(checkpoint, tensors=tensors)

    def spans(self) -> dict[Path, list[_Span]]:
        """By file, sorted."""
        found: dict[Path, set[_Span]] = defaultdict(set)
        for name, key in self.keys.items():
            source = self.sources[name]
            columns = source.shape[-1] if len(source.shape) > 1 else 0
            for extent in source.extents:
                for path, offset, num_bytes, skip in (
                    extent._replace(target_offset=0),
                    *copies_of(self.sources.copies, extent.path, extent.file_offset, extent.num_bytes),
                ):
                    first = (extent.target_offset + skip) // source.dtype.itemsize
                    found[path].add(_Span(offset, offset + num_bytes, key, first, columns))
        return {path: sorted(spans) for path, spans in found.items()}


class _Span(NamedTuple):
    """Bytes [start, stop) of a file are elements from `first_element` on of the parameter with `key`, which has so many columns
    (0: it has one dimension)."""

    start: int
    stop: int
    key: int
    first_element: int
    columns: int


class _Chunk(NamedTuple):
    """Bytes of a tensor, and where they go."""

    entry: TensorEntry  # of the tensor
    offset: int
    """In the original file."""
    num_bytes: int  # that are read
    dtype: torch.dtype | None
    """What they are written as; None: they are copied."""
    new_offset: int  # in the new file
    new_bytes: int  # that are written


def replay(
    checkpoint: Checkpoint,
    changes: Changes,
    directory: Path,
    *,
    newer: Checkpoint | None = None,
    steps: str | None = None,
    side_files: Mapping[Path, Path] | None = None,
    io_backend: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `checkpoint` with `changes` to `directory`, which appears only once it is whole and durable.

    newer: what `changes` are to be added to where that is not in `checkpoint`: a replay of some of its tensors.

    steps: the digest of the steps that are in the result, kept beside it with checksums (`finetune.offload.perturb.folds`);
    None: neither is. side_files: as `new_checkpoint` takes them. progress: bytes of the original done, and of all.
    Raises UserError when the disk is full or the directory cannot be written, IOFailure for failed reads and writes.
    """
    with new_checkpoint(directory, checkpoint, side_files) as temporary, IOEngine(io_backend) as io:
        writer = _Writer(io, checkpoint, changes, newer, progress)
        for path in checkpoint.files:
            writer.write_file(path, temporary / path.name)
        if steps is not None:
            write_checksums(temporary, steps, writer.written)


def moved_sources(sources: ParameterMap, old: Checkpoint, new: Checkpoint) -> ParameterMap:
    """`sources` with every extent in `new`, a replay of `old`: the same names, maybe other dtypes. What `new` lacks stays."""
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
        target = new.tensors.get(entry.name, entry)
        if target.dtype != entry.dtype:
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


class _Writer:
    """Reads, moves and writes chunks of one file after the other. written: by name of the file, all that was."""

    def __init__(
        self,
        io: IOEngine,
        checkpoint: Checkpoint,
        changes: Changes,
        newer: Checkpoint | None,
        progress: Callable[[int, int], None],
    ) -> None:
        self._io = io
        self._newer = {} if newer is None else newer.tensors
        self._checkpoint = checkpoint
        self._changes = changes
        self._spans = changes.spans()
        self._progress = progress
        self._done_bytes = 0
        self._pool = new_pool(3 * CHUNK_BYTES, BUFFERS)
        self.written: dict[str, list[WrittenRange]] = defaultdict(list)

    def write_file(self, old: Path, new: Path) -> None:
        entries = sorted((e for e in self._checkpoint.tensors.values() if e.path == old), key=lambda e: e.offset)
        dtypes = {entry.name: self._new_dtype(entry) for entry in entries}
        header, offsets = _header(entries, dtypes)
        write_new(new, header)
        self._note(new, 0, torch.frombuffer(bytearray(header), dtype=torch.uint8))
        target, sources = self._io.open(new, writable=True), {old: self._io.open(old)}
        spans = deque(self._spans.get(old, ()))
        chunks = (
            (chunk, *self._place(chunk, sources), chunk.num_bytes) for chunk in _chunks(entries, offsets, dtypes)
        )
        for chunk, piece in pass_through(self._io, self._pool, chunks):
            while spans and spans[0].stop <= chunk.offset:
                spans.popleft()
            result = piece.buffer[CHUNK_BYTES : CHUNK_BYTES + chunk.new_bytes]
            self._fill(chunk, piece.buffer[: chunk.num_bytes], result, spans)
            self._note(new, chunk.new_offset, result)
            piece.write([(target, chunk.new_offset, chunk.new_bytes, result.data_ptr())])
            self._done_bytes += chunk.num_bytes
            self._progress(self._done_bytes, self._checkpoint.num_bytes)
        self._io.sync(target)
        for file in (target, *sources.values()):
            self._io.close_file(file)

    def _place(self, chunk: _Chunk, files: dict[Path, int]) -> tuple[int, int]:
        """The file and the offset there that a chunk is read from. files: those that are open."""
        entry = self._newer.get(chunk.entry.name, chunk.entry)
        if entry.path not in files:
            files[entry.path] = self._io.open(entry.path)
        return files[entry.path], entry.offset + chunk.offset - chunk.entry.offset

    def _new_dtype(self, entry: TensorEntry) -> torch.dtype | None:
        """What the tensor is written as; None: it does not change."""
        if _overlaps(entry, self._spans.get(entry.path, ())):
            return self._changes.dtype or self._changes.stored_dtypes[entry.name]
        return None

    def _note(self, path: Path, offset: int, written: torch.Tensor) -> None:
        self.written[path.name].append((offset, written.numel(), checksum(written, written.numel())))

    def _fill(self, chunk: _Chunk, read: torch.Tensor, result: torch.Tensor, spans: Iterable[_Span]) -> None:
        """spans: sorted; some may be of later chunks."""
        if chunk.dtype is None:
            result.copy_(read)
            return
        old, new = read.view(TORCH_DTYPES[chunk.entry.dtype]), result.view(chunk.dtype)
        new.copy_(old)
        changes, end = self._changes, chunk.offset + chunk.num_bytes
        for span in spans:
            if span.start >= end:
                break
            low, high = max(span.start, chunk.offset), min(span.stop, end)
            if low < high:
                first, last = (low - chunk.offset) // old.itemsize, (high - chunk.offset) // old.itemsize
                stored_dtype = changes.stored_dtypes[chunk.entry.name]
                parameter = noise.Parameter(span.key, span.columns, stored_dtype, changes.least)
                at = span.first_element + (low - span.start) // old.itemsize
                noise.move(changes.noise, parameter, old[first:last], changes.groups, [noise.Target(new[first:last])], at)


def _overlaps(entry: TensorEntry, spans: Iterable[_Span]) -> bool:
    """spans: of its file."""
    return any(span.start < entry.offset + entry.num_bytes and entry.offset < span.stop for span in spans)


def _header(
    entries: Sequence[TensorEntry], new_dtypes: Mapping[str, torch.dtype | None]
) -> tuple[bytes, dict[str, int]]:
    """As `file_header`."""
    tensors = []
    for entry in entries:
        dtype, num_bytes = entry.dtype, entry.num_bytes
        if (new_dtype := new_dtypes[entry.name]) is not None:
            dtype, num_bytes = DTYPE_NAMES[new_dtype], _scaled(entry, num_bytes, new_dtype)
        tensors.append((entry.name, dtype, entry.shape, num_bytes))
    return file_header(tensors)


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
            yield _Chunk(entry, entry.offset + start, num_bytes, dtype, offsets[entry.name] + new_start, new_bytes)


def _scaled(entry: TensorEntry, num_bytes: int, dtype: torch.dtype) -> int:
    return num_bytes // TORCH_DTYPES[entry.dtype].itemsize * dtype.itemsize
