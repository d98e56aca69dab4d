"""What the engine needs of a device: slabs, ordered copies, events. Nothing else of a device is visible to it."""

from __future__ import annotations

import contextlib
import enum
import mmap
from abc import ABC, abstractmethod
from typing import Protocol

import torch

from finetune.memory.device_kinds import DEVICE_KINDS, DeviceTraits
from finetune.memory.errors import UserError


class Direction(enum.Enum):
    H2D = "host to device"
    D2H = "device to host"


class Event(Protocol):
    """A point in a stream of copies or of compute. Made by a device, understood by that device only."""

    def query(self) -> bool:
        """True when everything up to this point is done; the host may then act on it as after `synchronize`."""


class _Completed:
    """The event of work that was done before the call returned."""

    def query(self) -> bool:
        return True


COMPLETED = _Completed()


class Device(ABC):
    """A place where blocks are computed, and the two streams of copies between it and the host.

    Copies of one direction run in the order they were submitted; the two directions and compute run beside each other
    and are ordered by events alone. Slabs are kept by their owner until `close`, so copies from and to their slots keep
    nothing alive. Any other tensor in a copy must be kept by the caller until the event is done.
    """

    kind: str  # of `DEVICE_KINDS`
    torch_device: torch.device

    @property
    def traits(self) -> DeviceTraits:
        return DEVICE_KINDS[self.kind]

    @property
    def name(self) -> str:
        """What its maker calls it, where that is known."""
        return self.kind

    @property
    def shares_host_memory(self) -> bool:
        return self.traits.shares_host_memory

    @property
    def assumed_host_bytes(self) -> int:
        """Of host memory that a process there holds more than this one does: of a device that is not here."""
        return 0

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether it has hardware for products of matrices of `dtype`."""
        return not self.traits.computes_on_host or cpu_multiplies(dtype)

    def warm_up(self, dtype: torch.dtype) -> None:  # noqa: B027  most devices have nothing to load
        """Loads what computing in `dtype` will need, so that the process is then as large as it will be without a model."""

    def limit(self, num_bytes: int) -> None:  # noqa: B027  not every device can be held to it
        """From now on tensors there that would take more than `num_bytes` in all raise torch.OutOfMemoryError."""

    @abstractmethod
    def allocate_slab(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] on `torch_device`, contents undefined. Raises UserError when the device lacks them."""

    def free_slab(self, slab: torch.Tensor) -> None:  # noqa: B027  most free it with its last tensor
        """Of `allocate_slab`: nobody uses it any more, and all copies to and from it have been waited for."""

    def allocate_host_slab(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] in host memory, page-aligned; pinned where the device copies faster from pinned memory.

        Raises UserError when the host does not grant it.
        """
        return map_host_bytes(num_bytes)

    @abstractmethod
    def copy_async(
        self, dst: torch.Tensor, src: torch.Tensor, direction: Direction, after: Event | None = None
    ) -> Event:
        """Copies `src` to `dst` on the stream of `direction`, once `after` has happened.

        The two are contiguous and equal in shape and dtype, one on each side. Without `after` the copy may start at
        once, also before compute that was enqueued earlier: a copy out of a result of compute, or into a slot that
        compute has read, names `record()`. Until the returned event is done `dst` must not be read and `src` not be
        written. An error of the copy itself is raised where its event is waited for.
        """

    @abstractmethod
    def record(self) -> Event:
        """Everything that the calling thread's compute stream has been given so far."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Compute given from now on starts after `event`. The host goes on at once where the device waits by itself."""

    @abstractmethod
    def synchronize(self, event: Event) -> None:
        """Returns when `event` is done: the host may then read what was copied and refill what was copied from."""

    def release(self, slot: torch.Tensor) -> None:  # noqa: B027  most devices have nothing to do
        """Declares the contents of a device slot dead: no pending copy needs them, and no compute given from now on."""

    def check_readable(self, slot: torch.Tensor) -> None:  # noqa: B027  most devices cannot tell
        """Raises RaceError if compute would read bytes of `slot`, part of a device slab, that are not there yet."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Most device memory held at once since the last `reset_peak`. 0 where the device has none of its own."""

    @abstractmethod
    def reset_peak(self) -> None: ...

    @abstractmethod
    def total_bytes(self) -> int:
        """Size of the device's memory: what a percentage of it refers to."""

    def available_bytes(self) -> int:
        """Of its memory, what this process can have: others may hold some, and the driver does."""
        return self.total_bytes()

    def close(self) -> None:  # noqa: B027  not every device holds something
        """Ends all copies and threads; slabs of the device must not be used any more. May be called again."""


class RaceError(RuntimeError):
    """Device memory would be read before a copy into it was waited for. A fault of the engine, not of the user."""


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` in hardware. Without that, bf16 products are 5 to 300 times slower
    than fp32 ones, and the backward product is the slowest."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return True


def map_host_bytes(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes], zeros, in a mapping of its own: exact size, page-aligned, unmapped with its last tensor.

    PyTorch's allocator aligns to 64 bytes only; direct I/O needs a page. Where the system has huge pages they are asked for: a
    weight is thousands of small ones, which decoders and products walk through. Raises UserError when the host refuses.
    """
    check_size(num_bytes)
    try:
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise UserError(
            f"the host did not grant {num_bytes} bytes for its slots ({error.strerror}): lower --host-memory"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # advice: its failure costs speed only
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def check_size(num_bytes: int) -> None:
    if num_bytes <= 0:
        raise ValueError(f"a slab needs at least one byte, got {num_bytes}")


def check_copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Raises ValueError unless the two can be copied byte for byte."""
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ValueError(
            f"a copy needs equal shapes and dtypes, got {tuple(src.shape)} {src.dtype} "
            f"into {tuple(dst.shape)} {dst.dtype}"
        )
    if not (dst.is_contiguous() and src.is_contiguous()):
        raise ValueError(f"a copy needs contiguous tensors, got strides {src.stride()} into {dst.stride()}")
