"""Devices behind one small surface: see `base.Device`."""

from __future__ import annotations

import torch

from finetune.memory.device_kinds import DEVICE_KINDS, DEVICE_WORDS
from finetune.memory.errors import UserError
from finetune.offload.devices.accelerator import AcceleratorDevice
from finetune.offload.devices.base import COMPLETED, Device, Direction, Event, RaceError
from finetune.offload.devices.cpu import CpuDevice
from finetune.offload.devices.described import DescribedDevice
from finetune.offload.devices.simulated import SimulatedDevice

__all__ = ["COMPLETED", "DescribedDevice", "Device", "Direction", "Event", "RaceError", "choose_device"]


def choose_device(
    kind: str,
    *,
    simulated_bytes_per_second: float = float("inf"),
    simulated_delay_seconds: float = 0.0,
    simulated_total_bytes: int | None = None,
) -> Device:
    """The device of that kind; "auto" is the accelerator where there is one, else the CPU.

    The options set the simulated device's link and size (None: as large as the host) and mean nothing to the others.
    Raises UserError for an unknown kind and for one that this machine, or this build of PyTorch, does not have.
    """
    if kind not in DEVICE_WORDS:
        raise UserError(f"unknown device {kind!r}: choose one of {', '.join(DEVICE_WORDS)}")
    if kind == "simulated":
        return SimulatedDevice(simulated_bytes_per_second, simulated_delay_seconds, simulated_total_bytes)
    found = torch.accelerator.current_accelerator(check_available=True)
    present = found.type if found is not None and found.type in DEVICE_KINDS else None
    if kind == "auto":
        kind = present or "cpu"
    if kind == "cpu":
        return CpuDevice()
    if kind != present:
        there = f"cpu, {present}" if present else "cpu"
        raise UserError(
            f"device {kind!r} was asked for, but PyTorch {torch.__version__} finds here: {there}. "
            f"Choose one of these (or auto), or install a PyTorch built for {kind}"
        )
    return AcceleratorDevice(kind)
