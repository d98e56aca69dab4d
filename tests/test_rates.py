"""What measures a machine, at tiny sizes: everything is measured, nothing is left behind, and no number is absurd."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

import finetune.offload.rates.disk
import finetune.offload.rates.machine
from finetune.memory.errors import UserError
from finetune.memory.machine import Drive, MachineProfile
from finetune.memory.units import PAGE_BYTES
from finetune.offload.devices import choose_device
from finetune.offload.files.checkpoint import read_checkpoint
from finetune.offload.rates.compute import HEAD_SIZE, HEADS, Sizes, measure_attention, measure_products
from finetune.offload.rates.decoders import SAMPLES, measure_decoders
from finetune.offload.rates.disk import SLOT_BYTES, drive_name, measure_drive, nearest_directory, read_rate
from finetune.offload.rates.machine import Effort, is_current, measure_machine
from finetune.offload.rates.timing import seconds_of
from finetune.offload.residency.io import IOEngine
from finetune.offload.sizing.calibration import write_rate, write_rate_of
from finetune.offload.sizing.needs import MARGIN_BYTES, STAGING_BYTES
from finetune.offload.weights.formats import FORMATS, PlainTensor

TINY = Sizes(shapes=((24, 40),), rows=(1, 3), lengths=(8,), weight_bytes=1 << 14, elements=1 << 10)
EFFORT = Effort(seconds=1e-4, drive_seconds=0.05, drive_bytes=1, copy_bytes=1 << 16, sizes=TINY, decoded=(128, 256))
CPU = choose_device("cpu")


def simulated():
    return choose_device("simulated", simulated_total_bytes=1 << 24)


@pytest.fixture(autouse=True)
def patience(monkeypatch) -> None:
    """Everything is measured, however busy the machine is."""
    monkeypatch.setattr(finetune.offload.rates.compute, "PATIENCE", float("inf"))


@pytest.fixture
def profile(tmp_path) -> MachineProfile:
    return measure_machine(CPU, tmp_path, effort=EFFORT)


def test_a_call_is_timed_often_enough_to_be_known():
    calls = []
    assert seconds_of(lambda: calls.append(1), CPU, 0.0) > 0
    assert len(calls) >= 4
    calls.clear()
    seconds_of(lambda: calls.append(1), CPU, 1e-3)
    assert len(calls) > 100  # a call takes much less than the clock can tell


def test_a_machine_is_measured_as_a_whole(tmp_path, profile):
    dtypes = ["float32", "bfloat16"] if CPU.multiplies(torch.bfloat16) else ["float32"]
    assert [table.dtype for table in profile.host.compute.products] == dtypes
    for table in profile.host.compute.products:
        assert (table.out_features, table.in_features) == (24, 40)
        for rates in (table.forward, table.input_gradient, table.weight_gradient):
            assert [rate.rows for rate in rates] == [1, 3]
    assert [rate.length for rate in profile.host.compute.attention] == [8] * len(dtypes)
    assert profile.accelerator is None
    assert list(profile.host.updated_elements_per_second) == ["adamw", "lion", "sgd"]
    assert profile.host.compute.noise_elements_per_second.keys() == {"rademacher", "gaussian", "low_rank"}
    drive = profile.drives[0]
    assert (
        drive.name == drive_name(tmp_path)
        and drive.write_bytes_per_second
        and drive.read_while_writing_bytes_per_second
    )
    assert list(tmp_path.iterdir()) == []


def test_a_device_behind_a_link_is_measured_too(tmp_path):
    with_device = measure_machine(simulated(), tmp_path, effort=EFFORT)
    found = with_device.accelerator
    assert found.kind == "simulated" and found.memory_bytes == 1 << 24
    assert found.host_to_device_bytes_per_second and found.device_to_host_bytes_per_second
    assert with_device.compute_of("simulated") is found.compute
    assert is_current(with_device, simulated()) and is_current(with_device, CPU)
    assert not is_current(with_device, choose_device("simulated", simulated_total_bytes=1 << 25))


def test_a_link_of_a_set_speed_is_found(tmp_path):
    device = choose_device("simulated", simulated_bytes_per_second=1e6)
    to_device, to_host = finetune.offload.rates.compute.measure_copies(device, 1 << 14, 1e-4)
    device.close()
    # A busy machine makes a copy slower, never faster.
    assert to_device <= 1e6 and to_host <= 1e6


def test_another_machine_is_not_this_one(profile, monkeypatch):
    assert is_current(profile, CPU) and not is_current(profile, simulated())
    for change in ({"processor": "another"}, {"threads": 99}, {"memory_bytes": 1}):
        assert not is_current(profile.model_copy(update={"host": profile.host.model_copy(update=change)}), CPU)
    monkeypatch.setattr(finetune.offload.rates.machine, "MEANING", "0")
    assert not is_current(profile, CPU)


def test_a_model_on_another_drive_is_read(tmp_path, monkeypatch):
    model = save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(finetune.offload.rates.machine, "drive_name", lambda path: str(path))
    ranges = [(entry.path, entry.offset, entry.num_bytes) for entry in read_checkpoint(model).tensors.values()]
    drives = measure_machine(CPU, tmp_path, ranges, model, EFFORT).drives
    assert [drive.name for drive in drives] == [str(model), drive_name(tmp_path)]
    assert drives[0].write_bytes_per_second is None and drives[0].read_bytes_per_second > 0


def test_rates_are_those_of_the_operations_that_are_counted(monkeypatch):
    monkeypatch.setattr(finetune.offload.rates.compute, "seconds_of", lambda call, device, seconds: call() is None or 2.0)
    table = measure_products(CPU, torch.float32, TINY, 1.0)[0]
    assert [rate.flops_per_second for rate in table.forward] == [24 * 40, 3 * 24 * 40]
    (rate,) = measure_attention(CPU, torch.float32, TINY, 1.0)
    assert rate.forward_flops_per_second == 2 * 8**2 * HEADS * HEAD_SIZE
    assert rate.backward_flops_per_second == 5 * 8**2 * HEADS * HEAD_SIZE


def test_what_takes_too_long_is_not_measured_at_larger_sizes(monkeypatch):
    monkeypatch.setattr(finetune.offload.rates.compute, "PATIENCE", 8)
    monkeypatch.setattr(finetune.offload.rates.compute, "seconds_of", lambda call, device, seconds: 2.0)
    table = measure_products(CPU, torch.float32, TINY, 0.1)[0]
    assert [rate.rows for rate in table.forward] == [1]


def test_every_format_is_decoded():
    assert set(SAMPLES) == set(FORMATS)
    rates = measure_decoders(CPU, torch.float32, 1e-4, 128, 256)
    assert len(rates) == len(FORMATS) and all(rate > 0 for rate in rates.values())
    assert len(measure_decoders(CPU, torch.bfloat16, 1e-4, 128, 256)) == len(FORMATS) - 1  # bf16 is no other dtype
    on_device = measure_decoders(simulated(), torch.bfloat16, 1e-4, 128, 256)
    assert "bitsandbytes 4-bit" in on_device


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_a_matrix_that_is_made_up_has_its_formats_shape(form):
    weight, stored = SAMPLES[form](128, 256)
    numbers = weight.decode(stored, torch.float32)
    assert numbers.numel() == 128 * 256 and numbers.count_nonzero() > numbers.numel() // 2
    assert weight.num_bytes == (
        stored.nbytes if isinstance(weight, PlainTensor) else sum(x.nbytes for x in stored.values())
    )


def test_reading_ends_after_the_bytes_that_are_wanted(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(SLOT_BYTES + 5))
    asked = []

    def ranges():
        for offset in range(0, SLOT_BYTES, SLOT_BYTES // 4):
            asked.append(offset)
            yield path, offset, SLOT_BYTES // 4

    assert read_rate(ranges(), SLOT_BYTES // 2, 1e9) > 0
    assert len(asked) == 3  # the third is asked for and not read
    assert read_rate(iter([(path, 0, SLOT_BYTES + 5)]), 1 << 30, 1e9) > 0
    assert read_rate(iter([]), 1, 1.0) > 0


@pytest.mark.parametrize("start", [0, 2048, 4095])
def test_bytes_are_read_into_memory_that_is_aligned_as_they_are(start, tmp_path, monkeypatch):
    """Others are read elsewhere and copied, at half of the speed; blocks lie in their slots as in their files."""
    path, num_bytes = tmp_path / "file", 3 * SLOT_BYTES + 777
    path.write_bytes(bytes(start + num_bytes))
    tickets, submit = [], IOEngine.submit_reads
    monkeypatch.setattr(IOEngine, "submit_reads", lambda io, extents: tickets.append(list(extents)) or submit(io, extents))
    small = [(path, start + 100 * n, 100) for n in range(9)]
    read_rate(iter([(path, start, num_bytes), *small]), 1 << 30, 1e9)
    extents = [extent for ticket in tickets for extent in ticket]
    assert all((address - offset) % PAGE_BYTES == 0 for _, offset, _, address in extents)
    assert sum(size for _, _, size, _ in extents) == num_bytes + 900 and len(tickets) == 4  # small ones go together
    place = start
    for _, offset, size, _ in extents[:-9]:
        assert offset == place and size <= SLOT_BYTES
        place += size


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to .*: name another directory"):
        measure_drive(tmp_path, 0.1, 1)
    tmp_path.chmod(0o700)


def test_a_full_drive_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.rates.disk.psutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(UserError, match=r"4.0 MiB are to be written .* 1.0 MiB are free: make room"):
        measure_drive(tmp_path, 0.1)


def test_a_drive_is_that_of_the_nearest_directory(tmp_path):
    assert nearest_directory(tmp_path / "no" / "such") == tmp_path
    assert drive_name(tmp_path / "no" / "such") == drive_name(tmp_path)
    assert " on /proc" in drive_name(Path("/proc/self"))


@pytest.mark.parametrize(
    ("together", "expected"),
    [
        ((None, None), 500.0),  # not seen: reads and writes take turns
        ((500.0, 250.0), 500.0),  # the same, measured in half of the time each
        ((400.0, 400.0), 1 / (1 / 400 - 1 / 1000)),  # as many bytes each way
        ((1000.0, 500.0), 2500.0),  # each as if it were alone: a written byte takes a fifth of its time still
    ],
)
def test_what_a_written_byte_takes_beside_reads(together, expected):
    drive = Drive(
        read_bytes_per_second=1000.0, write_bytes_per_second=500.0, read_while_writing_bytes_per_second=together[0],
        write_while_reading_bytes_per_second=together[1],
    )  # fmt: skip
    assert write_rate_of(drive) == pytest.approx(expected)
    assert write_rate_of(drive.model_copy(update={"write_bytes_per_second": None})) == float("inf")


def test_what_a_prediction_writes_goes_through_memory_that_every_plan_has(tmp_path, monkeypatch):
    """The slots, and the numbers that they are filled with."""
    sizes, allocate = [], finetune.offload.rates.disk.map_host_bytes
    monkeypatch.setattr(finetune.offload.rates.disk, "map_host_bytes", lambda size: sizes.append(size) or allocate(size))
    tracemalloc.start()
    try:
        assert write_rate(tmp_path / "not" / "there") > 0
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(sizes) == 1 and sizes[0] + peak_bytes <= STAGING_BYTES + MARGIN_BYTES
    assert list(tmp_path.iterdir()) == []
