"""A rewritten checkpoint's files: what stays is copied or decoded through a few buffers, what changes is given a parameter at a
time. Memory does not depend on the model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.quantize.kernels import Sums
from finetune.offload.quantize.matrix import pack_matrix
from finetune.offload.quantize.outline import NewFile
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.pieces import new_pool, pass_through
from finetune.offload.rewrite.contents import Contents
from finetune.offload.weights.formats import PlainTensor, StoredWeight
from finetune.offload.weights.formats.plain import TORCH_DTYPES

CHUNK_BYTES = 4 << 20
BUFFERS = 4

Progress = Callable[[int, int], None]
"""Is told the bytes that are written, and of all."""


class Writer:
    """Writes `contents` into files of `directory`: `keep`, then `put` for every parameter that changes, then `finish`."""

    def __init__(
        self, io: IOEngine, contents: Contents, directory: Path, read: Callable[[PlainTensor], Tensor], progress: Progress
    ) -> None:
        """read: gives a stored tensor of the old checkpoint."""
        self._io, self._contents, self._read, self._progress = io, contents, read, progress
        self._files = [_NewFile(io, file, directory) for file in contents.files]
        self._homes = {name: file for file in self._files for name in file.starts}
        self._dtypes = {entry.name: TORCH_DTYPES[entry.dtype] for file in contents.files for entry in file.entries}
        self._sources: dict[Path, int] = {}
        self._written = 0

    def keep(self) -> None:
        """Writes everything that does not change."""
        pool = new_pool(CHUNK_BYTES, BUFFERS)
        coming = (((e, start), self._open(e.path), e.offset + start, count) for e, start, count in self._chunks())
        for (entry, start), piece in pass_through(self._io, pool, coming):
            file = self._homes[entry.name]
            at, count = file.starts[entry.name] + start, min(CHUNK_BYTES, entry.num_bytes - start)
            piece.write([(file.target, at, count, piece.buffer.data_ptr())])
            self._done(count)
        for name, weight in self._contents.decoded.items():
            for first, numbers in decoded(weight, self._dtypes[name], self._read):
                self._put(name, first * numbers.itemsize, numbers)

    def put(self, parameter: str, value: Tensor) -> dict[str, Sums]:
        """Writes a parameter that changes; returns how far its matrices that were packed are off, by their names in the files.

        value: contiguous, in the dtype that `contents.written_dtype` gives. Raises UserError for numbers that are not finite.
        """
        if not bool(value.isfinite().all()):
            raise UserError(f"the new values of {parameter} are not all finite: the adapter seems to be broken")
        flat = value.view(-1)
        raw = flat.view(torch.uint8)
        for place in self._contents.places[parameter]:
            self._put(place.tensor, place.offset, raw[place.skip : place.skip + place.num_bytes])
        errors = {}
        for entry, first in self._contents.packed.get(parameter, ()):
            file, count = self._homes[entry.name], prod(entry.shape)
            matrix = flat[first : first + count].view(entry.shape)
            statistics, errors[entry.name] = pack_matrix(entry, file.new.packed[entry.name], matrix)
            file.states |= statistics.states
            for name, content in statistics.tensors.items():
                self._put(name, 0, content)
        return errors

    def finish(self) -> None:
        """Makes the files whole and durable."""
        for file in self._files:
            file.finish(self._io)
        for source in self._sources.values():
            self._io.close_file(source)

    def _open(self, path: Path) -> int:
        if path not in self._sources:
            self._sources[path] = self._io.open(path)
        return self._sources[path]

    def _chunks(self) -> Iterator[tuple[TensorEntry, int, int]]:
        for entry in self._contents.copied:
            for start in range(0, entry.num_bytes, CHUNK_BYTES):
                yield entry, start, min(CHUNK_BYTES, entry.num_bytes - start)

    def _put(self, name: str, offset: int, numbers: Tensor) -> None:
        """Writes at a byte of a tensor, and waits."""
        file = self._homes[name]
        if numbers.numel():
            at = file.starts[name] + offset
            self._io.wait(self._io.submit_writes([(file.target, at, numbers.nbytes, numbers.data_ptr())]))
            self._done(numbers.nbytes)

    def _done(self, num_bytes: int) -> None:
        self._written += num_bytes
        self._progress(self._written, self._contents.num_bytes)


class _NewFile:
    """new: what is in it. starts: where each of its tensors begins. states: of packed weights, as they become known."""

    def __init__(self, io: IOEngine, new: NewFile, directory: Path) -> None:
        header, self.starts = new.header()
        self.new = new
        self.target = io.open(directory / new.name, create=True)
        self.states: dict[str, bytes] = {}
        self._header_bytes = len(header)

    def finish(self, io: IOEngine) -> None:
        header, starts = self.new.header(self.states, self._header_bytes)
        for at, content in ((0, header), *((starts[name], content) for name, content in self.states.items())):
            stored = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            io.wait(io.submit_writes([(self.target, at, stored.numel(), stored.data_ptr())]))
        io.sync(self.target)
        io.close_file(self.target)


def decoded(weight: StoredWeight, dtype: torch.dtype, read: Callable[[PlainTensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first element, numbers) of a weight, in order, a few rows at a time where it has such. read: as `Writer` takes it."""
    for start, numbers in decoded_rows(weight, dtype, read):
        yield start * prod(weight.shape[1:]), numbers


def decoded_rows(
    weight: StoredWeight, dtype: torch.dtype, read: Callable[[PlainTensor], Tensor], whole: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(first row, numbers) in the same way. whole: all at once."""
    step = None if whole else _rows_at_once(weight)
    if step is None:
        yield 0, weight.decode(weight.load(read), dtype)
        return
    for start in range(0, weight.shape[0], step):
        part = weight.rows([(start, min(start + step, weight.shape[0]))])
        yield start, part.decode(part.load(read), dtype)


def kept_bytes(contents: Contents) -> int:
    """Host memory that `Writer.keep` takes at most: buffers; then stored numbers, the numbers, and what is between them."""
    return max(BUFFERS * CHUNK_BYTES, *map(decoding_bytes, contents.decoded.values()), 0)


def decoding_bytes(weight: StoredWeight, whole: bool = False) -> int:
    """Host memory that `decoded_rows` takes at once."""
    rows = None if whole else _rows_at_once(weight)
    count = prod(weight.shape) if rows is None else rows * prod(weight.shape[1:])
    stored = weight.num_bytes if rows is None else weight.row_bytes(rows)
    return stored + 2 * 4 * count


def change(weight: StoredWeight, value: Tensor, read: Callable[[PlainTensor], Tensor]) -> Sums:
    """Squares of `value` less the weight's numbers in its dtype, and of these. read: as `Writer` takes it."""
    flat, error, weights = value.view(-1), 0.0, 0.0
    for first, numbers in decoded(weight, value.dtype, read):
        old = numbers.view(-1).double()
        error += float((flat[first : first + len(old)] - old).square().sum())
        weights += float(old.square().sum())
    return Sums(error, weights)


def _rows_at_once(weight: StoredWeight) -> int | None:
    """None: it is decoded whole."""
    rows = max(1, CHUNK_BYTES // max(1, 4 * prod(weight.shape[1:])))
    return rows if weight.has_rows and rows < weight.shape[0] else None
