"""The CPU as the device: device memory is host memory, and everything is done when its call returns."""

from __future__ import annotations

import psutil
import torch

from finetune.offload.devices.base import COMPLETED, Device, Direction, Event, check_copy, map_host_bytes


class CpuDevice(Device):
    kind = "cpu"
    torch_device = torch.device("cpu")

    def allocate_slab(self, num_bytes: int) -> torch.Tensor:
        return map_host_bytes(num_bytes)

    def copy_async(
        self, dst: torch.Tensor, src: torch.Tensor, direction: Direction, after: Event | None = None
    ) -> Event:
        check_copy(dst, src)
        with torch.no_grad():
            dst.copy_(src)
        return COMPLETED

    def record(self) -> Event:
        return COMPLETED

    def wait(self, event: Event) -> None:
        """No work is ever pending."""

    def synchronize(self, event: Event) -> None:
        """No work is ever pending."""

    def peak_bytes(self) -> int:
        return 0

    def reset_peak(self) -> None:
        """There is no memory besides the host's, which the host's meter counts."""

    def total_bytes(self) -> int:
        return psutil.virtual_memory().total
