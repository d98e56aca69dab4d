"""This machine, measured as a whole; and whether a profile is of this machine as it is now."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from finetune.memory.machine import Accelerator, ComputeRates, Drive, Host, MachineProfile
from finetune.memory.units import MIB
from finetune.offload.devices import Device, choose_device
from finetune.offload.rates import compute
from finetune.offload.rates.compute import Sizes
from finetune.offload.rates.decoders import COLUMNS, ROWS, measure_decoders
from finetune.offload.rates.disk import MOST_BYTES, drive_name, measure_drive, read_rate

MEANING = "1"
"""Of the rates in a profile. Another number: those that are kept mean something else."""
RULES = ("adamw", "lion", "sgd")  # each a kernel of its own; other optimizers have these and products of matrices
NOISES = ("rademacher", "gaussian", "low_rank")

FileRange = tuple[Path, int, int]
"""(file, offset, bytes)"""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how much is measured."""

    seconds: float = 0.03  # of each operation
    drive_seconds: float = 1.5  # of each direction of a drive
    drive_bytes: int = MOST_BYTES  # that are written
    copy_bytes: int = 64 * MIB
    sizes: Sizes = field(default_factory=Sizes)
    decoded: tuple[int, int] = (ROWS, COLUMNS)  # of a packed matrix


def measure_machine(
    device: Device,
    output: Path,
    model: Iterable[FileRange] = (),
    model_directory: Path | None = None,
    effort: Effort | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> MachineProfile:
    """output: an existing directory on the drive that runs write to. model, model_directory: where a model is read from, if
    that may be on another drive. say: is told what is measured next.

    Raises UserError when one of the two cannot be read or written.
    """
    effort = effort or Effort()
    say(f"the drive of {output}")
    drives = [measure_drive(output, effort.drive_seconds, effort.drive_bytes)]
    if model_directory is not None and drive_name(model_directory) != drives[0].name:
        say(f"the drive of {model_directory}")
        rate = read_rate(iter(model), effort.drive_bytes, effort.drive_seconds)
        drives.insert(0, Drive(name=drive_name(model_directory), read_bytes_per_second=rate))
    cpu = choose_device("cpu")
    say("the processor")
    host = Host(
        processor=processor_name(),
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        copy_bytes_per_second=compute.measure_memory_copy(cpu, effort.copy_bytes, effort.seconds),
        compute=measure_compute(cpu, effort),
        updated_elements_per_second=compute.measure_updates(cpu, _dtypes(cpu)[-1], RULES, effort.sizes, effort.seconds),
    )
    accelerator = None
    if not device.shares_host_memory:
        say(f"the accelerator ({device.kind})")
        accelerator = measure_accelerator(device, effort.copy_bytes, effort.seconds, measure_compute(device, effort))
    return MachineProfile(
        name="this machine", drives=tuple(drives), host=host, accelerator=accelerator, versions=versions()
    )


def measure_compute(device: Device, effort: Effort) -> ComputeRates:
    dtypes, sizes, seconds = _dtypes(device), effort.sizes, effort.seconds
    main = dtypes[-1]  # in which models compute
    return ComputeRates(
        products=[table for dtype in dtypes for table in compute.measure_products(device, dtype, sizes, seconds)],
        attention=[rate for dtype in dtypes for rate in compute.measure_attention(device, dtype, sizes, seconds)],
        elementwise_bytes_per_second=compute.measure_elementwise(device, main, sizes, seconds),
        operation_seconds=compute.measure_operation(device, seconds),
        decoded_weights_per_second=measure_decoders(device, main, seconds, *effort.decoded),
        noise_elements_per_second=compute.measure_noise(device, main, NOISES, sizes, seconds),
    )


def measure_accelerator(device: Device, copy_bytes: int, seconds: float, rates: ComputeRates) -> Accelerator:
    to_device, to_host = compute.measure_copies(device, copy_bytes, seconds)
    return Accelerator(
        kind=device.kind,
        name=device.name,
        memory_bytes=device.total_bytes(),
        host_to_device_bytes_per_second=to_device,
        device_to_host_bytes_per_second=to_host,
        compute=rates,
    )


def is_current(profile: MachineProfile, device: Device) -> bool:
    """Whether it was measured on this machine as it is now: processor, memory, threads, accelerator, versions."""
    host, accelerator = profile.host, profile.accelerator
    here = (processor_name(), torch.get_num_threads(), psutil.virtual_memory().total, versions())
    if (host.processor, host.threads, host.memory_bytes, profile.versions) != here:
        return False
    if device.shares_host_memory:
        return True
    return accelerator is not None and (accelerator.kind, accelerator.name, accelerator.memory_bytes) == (
        device.kind,
        device.name,
        device.total_bytes(),
    )


def versions() -> dict[str, str]:
    """Of what computes, and of what the rates mean."""
    return {"torch": torch.__version__, "profile": MEANING}


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _dtypes(device: Device) -> list[torch.dtype]:
    """fp32 and what it has hardware for, the one that models compute in last."""
    return [torch.float32, *(dtype for dtype in (torch.bfloat16,) if device.multiplies(dtype))]
