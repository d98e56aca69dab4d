"""The quantised checkpoint written, file by file, through a few buffers: memory does not depend on the model's size, but for
what is kept of the blocks of one matrix (13 bytes for 64 weights).

A file that is whole is noted with its errors in `progress.json`, and an interrupted quantisation goes on with the next one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.memory.errors import UserError
from finetune.memory.units import round_up
from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.files.replaced import replace_file
from finetune.offload.files.sealed import json_digest, seal, unseal
from finetune.offload.quantize.kernels import BLOCK, Blocks, Sums, pack_4bit, pack_int8
from finetune.offload.quantize.matrix import check_packed, store_statistics
from finetune.offload.quantize.outline import NewFile, Outline
from finetune.offload.residency.io import IOEngine, IOFailure
from finetune.offload.residency.pieces import new_pool, pass_through
from finetune.offload.weights.formats.plain import TORCH_DTYPES

CHUNK_BYTES = 4 << 20
BUFFERS = 4
PROGRESS = "progress.json"
_BYTES_PER_BLOCK = 13  # absmax, two sums and the code of absmax

Progress = Callable[[int, int], None]
"""Is told the bytes of the original that are done, and of all."""


class _Chunk(NamedTuple):
    entry: TensorEntry
    start: int  # its first byte in the tensor
    num_bytes: int


@dataclass
class Written:
    """What is known of the files that are whole."""

    num_bytes: dict[str, int] = field(default_factory=dict)
    """Name -> size."""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> `Sums` over its packed weights."""

    @property
    def relative_error(self) -> float:
        """Root mean square of the differences, by that of the weights."""
        error, weights = (sum(sums[i] for sums in self.errors.values()) for i in range(2))
        return sqrt(error / weights) if weights else 0.0

    def as_json(self, plan: Outline) -> dict[str, Any]:
        errors = {name: list(sums) for name, sums in self.errors.items()}
        return {"num_bytes": self.num_bytes, "errors": errors, "kinds": json_digest(plan.kinds)}

    @classmethod
    def read(cls, directory: Path, plan: Outline) -> Written:
        """Nothing, where the note is missing, damaged or of matrices in other kinds; without files that are not as noted."""
        try:
            values = unseal(json.loads((directory / PROGRESS).read_bytes()))
            if values["kinds"] != json_digest(plan.kinds):
                return cls()
            sizes = {name: path.stat().st_size for name in values["num_bytes"] if (path := directory / name).is_file()}
            whole = {name for name, size in sizes.items() if size == values["num_bytes"][name]}
            errors = {name: (float(a), float(b)) for name, (a, b) in values["errors"].items() if name in whole}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()
        return cls({name: sizes[name] for name in whole}, errors)


def working_bytes(plan: Outline) -> int:
    """Host memory that `write_quantized` takes: buffers, and what is kept of the largest matrix."""
    blocks = max(-(-prod(entry.shape) // BLOCK) for entry in plan.packed_entries)
    return BUFFERS * _slot_bytes(plan) + _BYTES_PER_BLOCK * blocks


def write_quantized(plan: Outline, directory: Path, progress: Progress = lambda done, total: None) -> Written:
    """Fills `directory` with the files of weights, or goes on where that was interrupted.

    Raises UserError when the disk is full or cannot be read or written, CheckpointError for a weight that is not finite, or
    that fp16 cannot hold where int8 goes by way of it. What is whole by then stays.
    """
    written = Written.read(directory, plan)
    total, done = sum(path.stat().st_size for path in plan.checkpoint.files), 0
    try:
        with IOEngine() as io:
            pool = new_pool(_slot_bytes(plan), BUFFERS)
            for file in plan.files:
                source = file.entries[0].path
                if file.name not in written.num_bytes:
                    writer = _Writer(io, pool, plan, file, lambda count, before=done: progress(before + count, total))
                    sums, size = writer.write(source, directory)
                    written.errors[file.name] = (sums.error, sums.weights)
                    written.num_bytes[file.name] = size
                    replace_file(directory / PROGRESS, json.dumps(seal(written.as_json(plan))).encode())
                done += source.stat().st_size
                progress(done, total)
    except (OSError, IOFailure) as error:
        code = error.errno or 0
        if code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{directory.parent}: {os.strerror(code)} while the model was quantised: make room, or name another "
            "quantization.cache; the files that are whole are kept, and the next run goes on after them"
        ) from error
    return written


class _Writer:
    """Of one file."""

    def __init__(self, io: IOEngine, pool: Any, plan: Outline, file: NewFile, progress: Callable[[int], None]) -> None:
        self._io, self._pool = io, pool
        self._plan, self._file = plan, file
        self._progress = progress
        header, self._starts = file.header()
        self._header_bytes = len(header)
        self._states: dict[str, bytes] = {}
        self._error, self._weights = 0.0, 0.0
        self._target = -1

    def write(self, source: Path, directory: Path) -> tuple[Sums, int]:
        """Returns the errors and the file's size. It has its name once it is whole and durable."""
        unfinished = directory / f".{self._file.name}.tmp"
        unfinished.unlink(missing_ok=True)
        read, self._target = self._io.open(source), self._io.open(unfinished, create=True)
        try:
            self._write_weights(read)
            header, starts = self._file.header(self._states, self._header_bytes)
            for name, content in self._states.items():
                self._put(torch.frombuffer(bytearray(content), dtype=torch.uint8), starts[name])
            self._put(torch.frombuffer(bytearray(header), dtype=torch.uint8), 0)
            self._io.sync(self._target)
        except BaseException:
            self._io.close_file(self._target)
            unfinished.unlink(missing_ok=True)
            raise
        finally:
            self._io.close_file(read)
        self._io.close_file(self._target)
        unfinished.rename(directory / self._file.name)
        return Sums(self._error, self._weights), (directory / self._file.name).stat().st_size

    def _write_weights(self, read: int) -> None:
        chunks = ((chunk, read, chunk.entry.offset + chunk.start, chunk.num_bytes) for chunk in self._chunks())
        statistics: Any = None
        for chunk, piece in pass_through(self._io, self._pool, chunks):
            entry = chunk.entry
            source = piece.buffer[: chunk.num_bytes]
            if entry.name not in self._file.packed:
                piece.write([(self._target, self._starts[entry.name] + chunk.start, chunk.num_bytes, source.data_ptr())])
            else:
                if chunk.start == 0:
                    statistics = self._statistics(entry)
                result, at = self._pack(chunk, source, piece.buffer[round_up(chunk.num_bytes) :], statistics)
                piece.write([(self._target, self._starts[entry.name] + at, result.numel(), result.data_ptr())])
                if chunk.start + chunk.num_bytes == entry.num_bytes:
                    self._put_statistics(entry, statistics)
            self._progress(entry.offset + chunk.start + chunk.num_bytes)

    def _statistics(self, entry: TensorEntry) -> Blocks | Tensor:
        return Blocks.of(prod(entry.shape)) if self._is_4bit(entry) else torch.empty(entry.shape[0])

    def _is_4bit(self, entry: TensorEntry) -> bool:
        return self._plan.kinds[entry.name] == "nf4"

    def _chunks(self) -> Iterator[_Chunk]:
        for entry in self._file.entries:
            step = _chunk_bytes(entry, self._plan.kinds.get(entry.name))
            for start in range(0, entry.num_bytes, step):
                yield _Chunk(entry, start, min(step, entry.num_bytes - start))

    def _pack(self, chunk: _Chunk, source: Tensor, room: Tensor, statistics: Any) -> tuple[Tensor, int]:
        """The packed bytes, in `room`, and where in the packed tensor they begin."""
        entry = chunk.entry
        numbers = source.view(TORCH_DTYPES[entry.dtype])
        start = chunk.start // numbers.itemsize
        if self._is_4bit(entry):
            result, at = room[: -(-numbers.numel() // 2)], start // 2
            some = statistics.within(start, start + numbers.numel())
            sums, absmax = pack_4bit(numbers, result, some), some.absmax
        else:
            result, at, columns = room[: numbers.numel()], start, entry.shape[1]
            absmax = statistics[start // columns : (start + numbers.numel()) // columns]
            sums = pack_int8(numbers.view(-1, columns), result.view(torch.int8), absmax)
        check_packed(entry, sums, absmax, self._is_4bit(entry))
        self._error += sums.error
        self._weights += sums.weights
        return result, at

    def _put_statistics(self, entry: TensorEntry, statistics: Any) -> None:
        """Everything of a packed weight but its numbers."""
        stored = store_statistics(entry, self._file.packed[entry.name], statistics)
        self._error += stored.error
        self._states |= stored.states
        for name, value in stored.tensors.items():
            self._put(value, self._starts[name])

    def _put(self, value: Tensor, offset: int) -> None:
        """Writes bytes and waits, while what is read ahead comes."""
        if value.numel():
            self._io.wait(self._io.submit_writes([(self._target, offset, value.numel(), value.data_ptr())]))


def _chunk_bytes(entry: TensorEntry, kind: str | None) -> int:
    """That are read at once: whole rows for int8, whole blocks otherwise."""
    if kind != "int8":
        return CHUNK_BYTES
    row_bytes = entry.num_bytes // entry.shape[0]
    return row_bytes * max(1, CHUNK_BYTES // row_bytes)


def _slot_bytes(plan: Outline) -> int:
    """Of a buffer: what is read at once, and what becomes of it, which is at most as much."""
    most = max(_chunk_bytes(entry, plan.kinds[entry.name]) for entry in plan.packed_entries)
    return 2 * round_up(max(CHUNK_BYTES, most))
