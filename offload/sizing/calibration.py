"""This machine's rates, measured in a moment: what the planner's prediction of a step is made of."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.nn import functional

from offload.devices import Device, Direction
from offload.residency.io import IOEngine
from offload.weights.parts import ModelParts

PROBE_BYTES = 64 << 20
COPY_PROBE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Rates:
    read_bytes_per_second: float  # from the model's disk, with direct I/O
    flops_per_second: float  # of a product in the dtype that computes
    copy_bytes_per_second: float = float("inf")  # to the device


def measure_rates(parts: ModelParts, device: Device, rows: int = 512) -> Rates:
    """Reads up to 64 MiB of a block with direct I/O, multiplies two matrices of the model's width, and copies 36 MiB to an
    accelerator; about 0.2 s."""
    return Rates(_read_rate(parts), _flop_rate(parts, device, rows), _copy_rate(device))


def _read_rate(parts: ModelParts) -> float:
    with IOEngine() as io:
        buffer = torch.empty(4 << 20, dtype=torch.uint8)
        extents, wanted = [], PROBE_BYTES
        files: dict = {}
        for layout in parts.layouts:
            for read in layout.reads:
                for start in range(0, read.num_bytes, buffer.numel()):
                    size = min(buffer.numel(), read.num_bytes - start)
                    if wanted > 0:
                        if read.path not in files:
                            files[read.path] = io.open(read.path)
                        extents.append((files[read.path], read.file_offset + start, size, buffer.data_ptr()))
                        wanted -= size
        started = time.perf_counter()
        io.wait(io.submit_reads(extents))  # all into one buffer: nobody looks at the bytes
        return sum(extent[2] for extent in extents) / max(time.perf_counter() - started, 1e-6)


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


def _copy_rate(device: Device) -> float:
    if device.shares_host_memory:
        return float("inf")
    there, here = device.allocate_slab(COPY_PROBE_BYTES), device.allocate_host_slab(COPY_PROBE_BYTES)
    device.synchronize(device.copy_async(there, here, Direction.H2D))
    started = time.perf_counter()
    for _ in range(8):
        event = device.copy_async(there, here, Direction.H2D)
    device.synchronize(event)
    return 8 * COPY_PROBE_BYTES / (time.perf_counter() - started)
