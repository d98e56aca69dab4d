"""GPUs through PyTorch's device-independent streams and events.

[Note: streams] Three streams: the caller's current one for compute, and one a direction for copies, so that a fetch
overlaps compute and a write-back overlaps both. Only events order them.

[Note: no record_stream] PyTorch's allocator hands freed memory to the next tensor of the same stream, which is why a
tensor used on another stream needs `Tensor.record_stream`. Slabs are never freed before `close`, and `close` waits for
the whole device, so slots do not need it; who owns a slot is decided by leases and events. For other tensors the
contract of `Device.copy_async` asks the caller to keep them until the event is done.

[Note: one queue on MPS] PyTorch gives Metal a single queue (its guard returns the default stream for every new one), so
nothing could overlap. Copies there are synchronous: the host waits for `after`, copies, and the event is already done.
"""

from __future__ import annotations

import os

import torch
from torch.nn import functional

from finetune.memory.errors import UserError
from finetune.memory.units import PAGE_BYTES
from finetune.offload.devices.base import COMPLETED, Device, Direction, Event, check_copy, check_size, map_host_bytes

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every CUDA context of the process
_ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


class AcceleratorDevice(Device):
    """The current device of PyTorch's accelerator: CUDA and ROCm ("cuda"), Intel GPUs ("xpu"), Apple's ("mps")."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if self.traits.limits_allocator and not _ALLOCATOR_VARIABLES & os.environ.keys():
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # freed pieces of any size are used again
        self.torch_device = torch.device(kind, torch.accelerator.current_device_index())
        self._copy_streams: dict[Direction, torch.Stream] = {}  # empty: see [Note: one queue on MPS]
        if self.traits.has_copy_streams:
            self._copy_streams = {direction: torch.Stream(device=self.torch_device) for direction in Direction}
        self._registered: list[torch.Tensor] = []  # kept: registered memory must not be unmapped
        self._peak_sampled_bytes = 0
        self._is_limited = False

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device) if self.kind == "cuda" else self.kind

    def warm_up(self, dtype: torch.dtype) -> None:
        """Runs a product, attention, and their gradients once: libraries and their kernels are loaded when first used."""
        for kind in {torch.float32, dtype}:
            x = torch.ones(1, 2, 64, 64, dtype=kind, device=self.torch_device, requires_grad=True)
            y = functional.scaled_dot_product_attention(functional.silu(x @ x), x, x, is_causal=True)
            functional.cross_entropy(y.float().flatten(0, 2), y.new_zeros(128, dtype=torch.int64)).backward()
        torch.accelerator.synchronize(self.torch_device)

    def limit(self, num_bytes: int) -> None:
        """Held by PyTorch's allocator where it can be: it gives cached memory back first."""
        if self.traits.limits_allocator:
            torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / self.total_bytes()), self.torch_device)
            self._is_limited = True

    def allocate_slab(self, num_bytes: int) -> torch.Tensor:
        """The caching allocator may hold up to 2 MiB more than `num_bytes`; `peak_bytes` includes that."""
        check_size(num_bytes)
        try:
            slab = torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA and XPU, its plain base on others
            raise UserError(
                f"device {self.torch_device} did not grant {num_bytes} bytes for its slots, it has "
                f"{self.total_bytes()} bytes in all: lower --device-memory, or end what else uses the device"
            ) from error
        # Recycled memory may still be in use by compute enqueued earlier, which the copy streams do not wait for.
        torch.accelerator.synchronize(self.torch_device)
        self.peak_bytes()
        return slab

    def allocate_host_slab(self, num_bytes: int) -> torch.Tensor:
        """Pinned, so that copies are asynchronous and at full speed.

        CUDA: a mapping of exactly `num_bytes`, registered with the driver, because PyTorch's own pinned memory is
        rounded up to a power of two. XPU has no registration in PyTorch: its pinned allocator is used, and the process
        then holds up to twice `num_bytes`. MPS: plain memory, copies are synchronous.
        """
        check_size(num_bytes)
        if self.traits.pinning == "allocated":
            try:
                whole = torch.empty(num_bytes + PAGE_BYTES - 1, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                raise UserError(f"the host did not grant {num_bytes} pinned bytes: lower --host-memory") from error
            return whole.narrow(0, -whole.data_ptr() % PAGE_BYTES, num_bytes)
        slab = map_host_bytes(num_bytes)
        if self.traits.pinning == "registered":
            code = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), num_bytes, _PORTABLE))
            if code != 0:
                raise UserError(
                    f"the CUDA driver did not pin {num_bytes} bytes of host memory (cudaHostRegister returned {code}): "
                    f"lower --host-memory, or raise the limit on locked memory (ulimit -l)"
                )
            self._registered.append(slab)
        return slab

    def copy_async(
        self, dst: torch.Tensor, src: torch.Tensor, direction: Direction, after: Event | None = None
    ) -> Event:
        """Blocks the host where the host side is not pinned: such memory cannot be copied asynchronously."""
        check_copy(dst, src)
        host, device = (src, dst) if direction is Direction.H2D else (dst, src)
        if host.device.type != "cpu" or device.device != self.torch_device:
            raise ValueError(
                f"a copy from {direction.value} of {self.torch_device} got src on {src.device}, dst on {dst.device}"
            )
        if not self._copy_streams:
            if after is not None:
                self.synchronize(after)
            with torch.no_grad():
                dst.copy_(src)
            return COMPLETED
        stream = self._copy_streams[direction]
        if after is not None and after is not COMPLETED:
            stream.wait_event(after)
        # From or into pageable memory an asynchronous copy is not one, and gives no promise of when it is done.
        with torch.no_grad(), stream:
            dst.copy_(src, non_blocking=host.is_pinned())
        event = torch.Event(device=self.torch_device)
        event.record(stream)
        return event

    def record(self) -> Event:
        event = torch.Event(device=self.torch_device)
        event.record(torch.accelerator.current_stream(self.torch_device))
        return event

    def wait(self, event: Event) -> None:
        if event is not COMPLETED:
            torch.accelerator.current_stream(self.torch_device).wait_event(event)

    def synchronize(self, event: Event) -> None:
        if event is not COMPLETED:
            event.synchronize()

    def peak_bytes(self) -> int:
        """What PyTorch's allocator held of the device at most: used or cached, without the driver's own context.

        Metal keeps no peak: there it is the largest of the samples taken here and at each slab's allocation.
        """
        if not self.traits.keeps_peak:
            self._peak_sampled_bytes = max(self._peak_sampled_bytes, torch.mps.driver_allocated_memory())
            return self._peak_sampled_bytes
        return torch.accelerator.max_memory_reserved(self.torch_device)

    def reset_peak(self) -> None:
        if not self.traits.keeps_peak:
            self._peak_sampled_bytes = 0
        else:
            torch.accelerator.reset_peak_memory_stats(self.torch_device)

    def total_bytes(self) -> int:
        if self.kind == "mps":
            return torch.mps.recommended_max_memory()
        return torch.get_device_module(self.kind).get_device_properties(self.torch_device).total_memory

    def available_bytes(self) -> int:
        if self.kind == "mps":
            return self.total_bytes()
        try:
            free, _ = torch.get_device_module(self.kind).mem_get_info(self.torch_device)
        except RuntimeError:  # some drivers of Intel's do not say
            return self.total_bytes()
        reserved, used = (f(self.torch_device) for f in (torch.accelerator.memory_reserved, torch.accelerator.memory_allocated))
        return free + reserved - used

    def close(self) -> None:
        torch.accelerator.synchronize(self.torch_device)
        if self._is_limited:
            torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)
            self._is_limited = False
        while self._registered:
            slab = self._registered.pop()
            code = int(torch.cuda.cudart().cudaHostUnregister(slab.data_ptr()))
            if code != 0:
                raise RuntimeError(f"cudaHostUnregister of {slab.numel()} bytes returned {code}")
