"""This machine's rates, measured in a moment: what the planner's prediction of a step is made of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from finetune.memory.errors import UserError
from finetune.memory.machine import Drive
from finetune.offload.devices import Device, Direction
from finetune.offload.rates.disk import measure_drive, nearest_directory, read_rate
from finetune.offload.weights.parts import ModelParts

PROBE_BYTES = 64 << 20  # that are written
PROBE_SLOT_BYTES = 4 << 20  # at a time: a prediction is made inside of the budget
READ_BYTES = 512 << 20
READ_SECONDS = 0.3
WRITE_SECONDS = 0.15
ELEMENTS = 1 << 22
COPY_PROBE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Rates:
    read_bytes_per_second: float  # from the model's disk, with direct I/O
    flops_per_second: float  # of a product in the dtype that computes
    copy_bytes_per_second: float = float("inf")  # to the device
    write_bytes_per_second: float = float("inf")  # to the run's disk
    elementwise_bytes_per_second: float = float("inf")  # read and written by operations on large tensors
    machine: str = ""  # another one than this, from whose profile they are
    copy_back_bytes_per_second: float = float("inf")  # from the device


@dataclass(frozen=True, slots=True)
class NoRates:
    """Why there is no prediction. Falsy, so `if rates:` tells the two results apart."""

    reason: str  # in words, for messages

    def __bool__(self) -> bool:
        return False


def measure_rates(parts: ModelParts, device: Device, rows: int = 512) -> Rates:
    """Reads blocks with direct I/O for a moment, multiplies two matrices of the model's width, and copies 36 MiB to an
    accelerator; about 0.2 s. Raises UserError when the model's files cannot be read."""
    return Rates(
        _read_rate(parts),
        _flop_rate(parts, device, rows),
        _copy_rate(device, Direction.H2D),
        elementwise_bytes_per_second=_elementwise_rate(device),
        copy_back_bytes_per_second=_copy_rate(device, Direction.D2H),
    )


def write_rate(directory: Path) -> float:
    """Bytes per second that are written under `directory`, or where it will be, see `write_rate_of`. Writes up to 64 MiB to a
    file without a name, through no more memory than every plan counts beside what it is for. Raises UserError."""
    drive = measure_drive(nearest_directory(directory), WRITE_SECONDS, PROBE_BYTES, slot_bytes=PROBE_SLOT_BYTES)
    return write_rate_of(drive)


def write_rate_of(drive: Drive) -> float:
    """Bytes per second that are written to it in a mixture of both: what a written byte takes, where one that is read takes as
    long as alone. Of a drive that was not seen doing both, reads and writes take turns. inf: its writes are not known."""
    read, write = drive.read_bytes_per_second, drive.write_bytes_per_second
    if write is None:
        return float("inf")
    reading, writing = drive.read_while_writing_bytes_per_second, drive.write_while_reading_bytes_per_second
    seconds = 1 / write if reading is None or writing is None else (1 - reading / read) / writing
    return 1 / max(seconds, 0.2 / write)


def try_rates(parts: ModelParts, device: Device, rows: int = 512) -> Rates | NoRates:
    """As `measure_rates`."""
    try:
        return measure_rates(parts, device, rows)
    except UserError as error:
        return NoRates(str(error))


def _read_rate(parts: ModelParts) -> float:
    return read_rate(_ranges(parts), READ_BYTES, READ_SECONDS)


def _ranges(parts: ModelParts) -> Iterator[tuple[Path, int, int]]:
    """(file, offset, bytes) of the blocks' weights."""
    for layout in parts.layouts:
        for read in layout.reads:
            yield read.path, read.file_offset, read.num_bytes


def _flop_rate(parts: ModelParts, device: Device, rows: int) -> float:
    width = min(2048, max(p.shape[-1] for p in parts.blocks[0].parameters()))
    x = torch.ones(rows, width, dtype=parts.dtype, device=device.torch_device)
    w = torch.ones(width, width, dtype=parts.dtype, device=device.torch_device)
    repeats = 3 if device.traits.computes_on_host else 100
    functional.linear(x, w).sum().item()  # kernels are loaded, clocks are up
    started = time.perf_counter()
    for _ in range(repeats):
        y = functional.linear(x, w)
    y.sum().item()
    return repeats * 2 * rows * width * width / (time.perf_counter() - started)


def _elementwise_rate(device: Device) -> float:
    x = torch.ones(ELEMENTS, device=device.torch_device)
    repeats = 4 if device.traits.computes_on_host else 50
    x.mul_(x).sum().item()
    started = time.perf_counter()
    for _ in range(repeats):
        x.mul_(x)
    x.sum().item()
    return repeats * 2 * x.nbytes / (time.perf_counter() - started)


def _copy_rate(device: Device, direction: Direction) -> float:
    if device.shares_host_memory:
        return float("inf")
    there, here = device.allocate_slab(COPY_PROBE_BYTES), device.allocate_host_slab(COPY_PROBE_BYTES)
    dst, src = (there, here) if direction is Direction.H2D else (here, there)
    device.synchronize(device.copy_async(dst, src, direction))
    started = time.perf_counter()
    for _ in range(8):
        event = device.copy_async(dst, src, direction)
    device.synchronize(event)
    seconds = time.perf_counter() - started
    device.free_slab(there)
    return 8 * COPY_PROBE_BYTES / seconds
