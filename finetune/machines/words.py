"""A machine profile as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finetune.memory.machine import Accelerator, ComputeRates, Drive, Host, MachineProfile
from finetune.memory.units import format_bytes

_PRODUCTS = (
    ("forward", "products"),
    ("input_gradient", "gradients of inputs"),
    ("weight_gradient", "gradients of weights"),
)


def describe_machine(profile: MachineProfile) -> str:
    """A short table."""
    lines = [line for drive in profile.drives for line in _drive(drive)]
    lines += _host(profile.host)
    if profile.accelerator is not None:
        lines += _accelerator(profile.accelerator)
    return "\n".join(lines)


def _drive(drive: Drive) -> Iterator[str]:
    yield f"drive {drive.name}"
    rates = [f"reads {_speed(drive.read_bytes_per_second)}"]
    if drive.write_bytes_per_second:
        rates.append(f"writes {_speed(drive.write_bytes_per_second)}")
    if drive.read_while_writing_bytes_per_second and drive.write_while_reading_bytes_per_second:
        both = drive.read_while_writing_bytes_per_second, drive.write_while_reading_bytes_per_second
        rates.append(f"at the same time {_speed(both[0])} and {_speed(both[1])}")
    yield f"  {', '.join(rates)}"
    if drive.request_seconds:
        yield f"  a small read takes {_short(drive.request_seconds)}, a flush {_short(drive.sync_seconds)}"


def _host(host: Host) -> Iterator[str]:
    yield f"processor {host.processor}, {host.threads} threads, {format_bytes(host.memory_bytes)} of memory"
    yield f"  copies {_speed(host.copy_bytes_per_second)} in memory"
    yield from _compute(host.compute)
    if host.updated_elements_per_second:
        yield f"  updates, 10^9 weights/s: {_billions(host.updated_elements_per_second)}"


def _accelerator(accelerator: Accelerator) -> Iterator[str]:
    yield f"accelerator {accelerator.name} ({accelerator.kind}), {format_bytes(accelerator.memory_bytes)} of memory"
    to_device, to_host = accelerator.host_to_device_bytes_per_second, accelerator.device_to_host_bytes_per_second
    if to_device and to_host:
        yield f"  copies {_speed(to_device)} to it, {_speed(to_host)} from it"
    yield from _compute(accelerator.compute)


def _compute(rates: ComputeRates) -> Iterator[str]:
    yield (
        f"  operations on large tensors move {_speed(rates.elementwise_bytes_per_second)}; one takes at least "
        f"{_short(rates.operation_seconds)}"
    )
    for table in rates.products:
        shape = f"{table.dtype}, weights {table.out_features} x {table.in_features}"
        yield _row(f"  GFLOP/s, {shape}; rows", [f"{rate.rows}" for rate in table.forward])
        for kind, words in _PRODUCTS:
            if found := getattr(table, kind):
                yield _row(f"    {words}", [f"{rate.flops_per_second / 1e9:.0f}" for rate in found])
    for dtype in dict.fromkeys(rate.dtype for rate in rates.attention):
        found = [rate for rate in rates.attention if rate.dtype == dtype]
        yield _row(f"  GFLOP/s, {dtype}, causal attention; tokens", [f"{rate.length}" for rate in found])
        yield _row("    forward", [f"{rate.forward_flops_per_second / 1e9:.0f}" for rate in found])
        yield _row("    backward", [f"{rate.backward_flops_per_second / 1e9:.0f}" for rate in found])
    if rates.decoded_weights_per_second:
        yield f"  decoders, 10^9 weights/s: {_billions(rates.decoded_weights_per_second)}"
    if rates.noise_elements_per_second:
        yield f"  noise, 10^9 weights/s: {_billions(rates.noise_elements_per_second)}"


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:52}" + "".join(f"{cell:>8}" for cell in cells)


def _billions(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate / 1e9:.2g}" for name, rate in rates.items())


def _speed(bytes_per_second: float) -> str:
    return f"{format_bytes(bytes_per_second)}/s"


def _short(seconds: float) -> str:
    return f"{seconds * 1e6:.2g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2g} ms"
