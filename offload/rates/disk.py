"""What a drive gives, measured through the engine that runs use: direct I/O, large requests, several under way."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from finetune.memory.errors import UserError
from finetune.memory.machine import Drive
from finetune.memory.units import MIB, PAGE_BYTES, format_bytes
from finetune.offload.devices.base import map_host_bytes
from finetune.offload.residency.io import IOEngine

SLOT_BYTES = 16 * MIB  # of a ticket, as of a small block
SLOTS = 4  # tickets under way
MOST_BYTES = 1 << 30  # that are written
LEAST_BYTES = 4 * MIB
FREE_SHARE = 0.25  # of what is free, that may be written
REQUESTS = 48  # small ones
SYNCS = 8


def drive_name(path: Path) -> str:
    """Of the drive that a path, or the nearest directory above it that there is, lies on: what is mounted, and where. The same
    until something else is mounted there."""
    path = nearest_directory(path).resolve()
    mounts = {Path(mount.mountpoint): mount.device for mount in psutil.disk_partitions(all=True)}
    mount = next((folder for folder in (path, *path.parents) if folder in mounts), Path("/"))
    return f"{mounts.get(mount, 'a drive')} on {mount}"


def nearest_directory(path: Path) -> Path:
    """The path if it is a directory, else the first above it that is one."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def measure_drive(
    directory: Path, seconds: float, most_bytes: int = MOST_BYTES, backend: str = "auto", slot_bytes: int = SLOT_BYTES
) -> Drive:
    """Writes up to `most_bytes` to a file without a name in `directory`, then reads it, then does both at once.

    seconds: of each of the three, at most, once `LEAST_BYTES` have moved. backend: `engine.io_backend`. slot_bytes: of a
    ticket; memory is taken for `SLOTS` of them and one more.
    Raises UserError where there is no room, or nothing can be written.
    """
    free = psutil.disk_usage(str(directory)).free
    file_bytes = min(most_bytes, int(free * FREE_SHARE)) // SLOT_BYTES * SLOT_BYTES or LEAST_BYTES
    if free < 2 * LEAST_BYTES:
        raise UserError(
            f"{directory}: {format_bytes(LEAST_BYTES)} are to be written to see how fast its drive is, "
            f"{format_bytes(free)} are free: make room, or name another directory"
        )
    with IOEngine(backend) as io, _unnamed_file(io, directory) as file:
        probe = _Probe(io, file, min(slot_bytes, file_bytes // SLOTS))
        written, write_seconds = probe.write(file_bytes, seconds)
        read, read_seconds = probe.read(written, seconds)
        half = written // 2 // probe.slot_bytes * probe.slot_bytes
        each, mixed_seconds = probe.read_and_write(half, seconds) if half else (0, 1.0)
        return Drive(
            name=drive_name(directory),
            read_bytes_per_second=read / read_seconds,
            write_bytes_per_second=written / write_seconds,
            read_while_writing_bytes_per_second=each / mixed_seconds or None,
            write_while_reading_bytes_per_second=each / mixed_seconds or None,
            request_seconds=probe.request(written),
            sync_seconds=probe.sync(),
        )


@contextlib.contextmanager
def _unnamed_file(io: IOEngine, directory: Path) -> Iterator[int]:
    """The number of an empty file that goes away by itself, however this process ends."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".bench.", dir=directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to ({error.strerror}): name another directory") from None
    os.close(descriptor)
    try:
        file = io.open(name, writable=True)
    finally:
        os.unlink(name)
    yield file


class _Probe:
    """Moves one file through a window of slots."""

    def __init__(self, io: IOEngine, file: int, slot_bytes: int) -> None:
        self.io, self.file, self.slot_bytes = io, file, slot_bytes
        self._slab = map_host_bytes(SLOTS * slot_bytes)
        generator = np.random.default_rng(0)
        for slot in self._slab.view(SLOTS, slot_bytes):  # with what no drive makes smaller
            slot.copy_(torch.from_numpy(generator.integers(0, 256, slot_bytes, dtype=np.uint8)))

    def write(self, num_bytes: int, seconds: float) -> tuple[int, float]:
        """(bytes, seconds until they are durable); at least a slot's bytes."""
        started = time.perf_counter()
        done = self._move([self.io.submit_writes], num_bytes, seconds)
        self.io.sync(self.file)
        return done, time.perf_counter() - started

    def read(self, num_bytes: int, seconds: float) -> tuple[int, float]:
        started = time.perf_counter()
        done = self._move([self.io.submit_reads], num_bytes, seconds)
        return done, time.perf_counter() - started

    def read_and_write(self, num_bytes: int, seconds: float) -> tuple[int, float]:
        """(bytes each way, seconds). Reads the file's first `num_bytes` and writes as many behind them."""
        started = time.perf_counter()
        done = self._move([self.io.submit_reads, self.io.submit_writes], num_bytes, seconds)
        return done, time.perf_counter() - started

    def request(self, num_bytes: int) -> float:
        """Seconds of a small read anywhere in the file."""
        pages = np.random.default_rng(1).integers(0, num_bytes // PAGE_BYTES, REQUESTS)
        times = []
        for page in pages.tolist():
            extent = (self.file, page * PAGE_BYTES, PAGE_BYTES, self._slab.data_ptr())
            times.append(self.io.wait(self.io.submit_reads([extent])))
        return statistics.median(times)

    def sync(self) -> float:
        """Seconds until a page that was written is durable."""
        times = []
        for page in range(SYNCS):
            extent = (self.file, page * PAGE_BYTES, PAGE_BYTES, self._slab.data_ptr())
            self.io.wait(self.io.submit_writes([extent]))
            started = time.perf_counter()
            self.io.sync(self.file)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _move(self, submits: list[Callable], num_bytes: int, seconds: float) -> int:
        """Each of `submits` on its own part of the file, `num_bytes` long, slot by slot; the bytes of each that were moved."""
        tickets: list[int] = []
        started, done = time.perf_counter(), 0
        while done < num_bytes and (not done or time.perf_counter() - started < seconds):
            for part, submit in enumerate(submits):
                if len(tickets) == SLOTS:
                    self.io.wait(tickets.pop(0))
                slot = (done // self.slot_bytes * len(submits) + part) % SLOTS
                address = self._slab.data_ptr() + slot * self.slot_bytes
                tickets.append(submit([(self.file, part * num_bytes + done, self.slot_bytes, address)]))
            done += self.slot_bytes
        for ticket in tickets:
            self.io.wait(ticket)
        return done


def read_rate(ranges: Iterator[tuple[Path, int, int]], most_bytes: int, seconds: float, backend: str = "auto") -> float:
    """Bytes per second of these (file, offset, bytes), read in their order until `most_bytes` or `seconds` have gone by.

    Raises UserError for what cannot be read.
    """
    tickets: list[int] = []
    files: dict[Path, int] = {}
    extents: list[tuple[int, int, int, int]] = []  # of the next ticket, in which small reads go together, as a block's do
    read_bytes = waiting_bytes = 0
    with IOEngine(backend) as io:
        buffer = map_host_bytes(SLOT_BYTES)  # nobody looks at the bytes
        started = time.perf_counter()
        for path, start, num_bytes in ranges:
            if read_bytes >= most_bytes or read_bytes and time.perf_counter() - started > seconds:
                break
            if path not in files:
                files[path] = io.open(path)
            offset, end = start, start + num_bytes
            while offset < end:
                shift = offset % PAGE_BYTES  # as in its slot: memory that is aligned otherwise would be copied into
                part = min(SLOT_BYTES - shift, end - offset)
                extents.append((files[path], offset, part, buffer.data_ptr() + shift))
                offset, read_bytes, waiting_bytes = offset + part, read_bytes + part, waiting_bytes + part
                if waiting_bytes >= SLOT_BYTES // 2:
                    if len(tickets) == SLOTS:
                        io.wait(tickets.pop(0))
                    tickets.append(io.submit_reads(extents))
                    extents, waiting_bytes = [], 0
        for ticket in [*tickets, *([io.submit_reads(extents)] if extents else [])]:
            io.wait(ticket)
        return max(read_bytes, 1) / max(time.perf_counter() - started, 1e-6)
