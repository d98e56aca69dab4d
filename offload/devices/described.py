"""A device of a machine that is not here: plans are made for it, and nothing runs on it."""

from __future__ import annotations

from typing import NoReturn

import torch

from finetune.memory.machine import MachineProfile
from finetune.offload.devices.base import Device, Direction, Event

CUDA_CONTEXT_BYTES = 1 << 30
"""Host memory that a process with PyTorch for CUDA holds more than one without: libraries and the driver's context. Assumed."""


class DescribedDevice(Device):
    """machine: whose accelerator it is, or whose processor where `kind` is "cpu". Raises UserError when it has no such one."""

    torch_device = torch.device("cpu")  # where what a plan looks at is

    def __init__(self, kind: str, machine: MachineProfile) -> None:
        self.rates = machine.compute_of(kind)
        self.kind, self.machine = kind, machine

    @property
    def assumed_host_bytes(self) -> int:
        return CUDA_CONTEXT_BYTES if self.kind == "cuda" else 0

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether the machine's description has products of it."""
        return any(table.dtype == str(dtype).removeprefix("torch.") for table in self.rates.products)

    def total_bytes(self) -> int:
        accelerator = self.machine.accelerator
        return self.machine.host.memory_bytes if self.shares_host_memory else accelerator.memory_bytes

    def allocate_slab(self, num_bytes: int) -> NoReturn:
        self._refuse()

    def copy_async(
        self, dst: torch.Tensor, src: torch.Tensor, direction: Direction, after: Event | None = None
    ) -> NoReturn:
        self._refuse()

    def record(self) -> NoReturn:
        self._refuse()

    def wait(self, event: Event) -> NoReturn:
        self._refuse()

    def synchronize(self, event: Event) -> NoReturn:
        self._refuse()

    def peak_bytes(self) -> NoReturn:
        self._refuse()

    def reset_peak(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RuntimeError(f"the {self.kind} of machine {self.machine.name} is not here: plans alone are made for it")
