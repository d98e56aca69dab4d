"""The kinds of devices, one line each: what every kind can do, as data. Free of torch, so that settings can name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """What is known of a device by its kind alone."""

    computes_on_host: bool = False
    """Its compute is the CPU's, on tensors in host memory."""
    shares_host_memory: bool = False
    """A fetched host slot is computed on where it lies, and no copies are needed."""
    has_copy_streams: bool = False
    """Copies run beside compute, ordered by events."""
    pinning: Literal["registered", "allocated"] | None = None
    """How host memory is pinned for copies: a mapping of exact size, registered with the driver, or PyTorch's own allocator."""
    limits_allocator: bool = False
    """PyTorch's allocator can be held to a number of bytes."""
    keeps_peak: bool = False
    """PyTorch's allocator remembers the most bytes it held."""
    kernels: Literal["native", "triton"] | None = None
    """What runs our own kernels; None: nothing does. Zeroth-order methods need them, packed weights have portable decoders."""
    libraries_bytes: int = 0
    """Device memory that kernels' libraries keep for themselves, at most."""
    host_libraries_bytes: int = 0
    """Host memory that they take after `Device.warm_up`, at most."""
    operations_per_read_byte: int = 4000
    """Of matrix products, that it does in about the time in which a byte of weights comes to it."""


# CUDA: a workspace of cuBLAS and one of cuBLASLt, 32 MiB each on Hopper, for each of the two threads that launch products
# (autograd has its own), and what the allocator's pools round up; in host memory, kernels that real shapes load, measured on an
# H200 with cuBLAS of CUDA 13: 0.45 GiB.
# Metal: see [Note: one queue on MPS] in `offload/devices/accelerator.py`.
DEVICE_KINDS = {
    "cpu": DeviceTraits(computes_on_host=True, shares_host_memory=True, kernels="native", operations_per_read_byte=200),
    "cuda": DeviceTraits(
        has_copy_streams=True, pinning="registered", limits_allocator=True, keeps_peak=True, kernels="triton",
        libraries_bytes=160 * _MIB, host_libraries_bytes=512 * _MIB,
    ),
    "xpu": DeviceTraits(has_copy_streams=True, pinning="allocated", keeps_peak=True, kernels="triton"),
    "mps": DeviceTraits(),
    "simulated": DeviceTraits(
        computes_on_host=True, has_copy_streams=True, kernels="native", operations_per_read_byte=200
    ),
}  # fmt: skip

DEVICE_WORDS = ("auto", *DEVICE_KINDS)
"""What a configuration may name."""
