from __future__ import annotations

import os
import random
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import finetune.offload.devices
from finetune.memory.device_kinds import DEVICE_KINDS
from finetune.memory.errors import UserError
from finetune.offload.devices import COMPLETED, Direction, RaceError, choose_device
from finetune.offload.devices.base import map_host_bytes
from finetune.offload.devices.cpu import CpuDevice
from finetune.offload.devices.simulated import SimulatedDevice

H2D, D2H = Direction.H2D, Direction.D2H
HOUR = 3600.0
ODD_BYTES = 4096 * 3 + 17


@pytest.fixture
def make_simulated():
    made = []

    def make(*arguments, **options) -> SimulatedDevice:
        made.append(SimulatedDevice(*arguments, **options))
        return made[-1]

    yield make
    for device in made:
        device.close()


def random_bytes(num_bytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def poison(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)


# Host memory


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, ODD_BYTES, (2 << 20) + 1])
def test_host_bytes_are_exact_aligned_and_writable(num_bytes):
    slab = map_host_bytes(num_bytes)
    assert slab.shape == (num_bytes,) and slab.dtype == torch.uint8
    assert slab.data_ptr() % 4096 == 0
    assert not slab.any()
    slab.fill_(7)
    assert int(slab.sum(dtype=torch.int64)) == 7 * num_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_host_bytes_live_as_long_as_a_view_of_them():
    num_bytes = 96 << 20
    view = map_host_bytes(num_bytes)[-5:]
    start = view.data_ptr() + 5 - num_bytes

    def mapped() -> bool:
        with open("/proc/self/maps") as maps:
            ranges = [[int(edge, 16) for edge in line.split()[0].split("-")] for line in maps]
        return any(low <= start < high for low, high in ranges)

    assert mapped()
    view.fill_(3)
    assert view.tolist() == [3] * 5
    del view
    assert not mapped()


@pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"), reason="the system has no huge pages to ask for"
)
def test_huge_pages_are_asked_for_where_the_system_has_them():
    slab = map_host_bytes(8 << 20)
    with open("/proc/self/smaps") as maps:
        lines = maps.read().splitlines()
    flags = ""
    for line in lines:
        if (edges := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            low, high = (int(edge, 16) for edge in edges.groups())
        elif line.startswith("VmFlags:") and low <= slab.data_ptr() < high:
            flags = line
    assert "hg" in flags.split()


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_empty_slab_is_refused(num_bytes):
    with pytest.raises(ValueError, match="at least one byte"):
        CpuDevice().allocate_slab(num_bytes)


def test_more_than_the_address_space_is_refused():
    with pytest.raises(UserError, match=f"{1 << 60} bytes.*--host-memory"):
        CpuDevice().allocate_host_slab(1 << 60)


# CPU


def test_cpu_device_copies_at_once():
    device = CpuDevice()
    assert device.shares_host_memory and device.torch_device == torch.device("cpu")
    src = random_bytes(ODD_BYTES)
    dst = device.allocate_slab(ODD_BYTES)
    event = device.copy_async(dst, src, H2D, after=device.record())
    assert event.query()
    assert torch.equal(dst, src)
    device.wait(event)
    device.synchronize(event)
    device.check_readable(dst)
    device.release(dst)
    assert torch.equal(dst, src)
    assert device.peak_bytes() == 0
    assert device.total_bytes() >= 1 << 28


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize(
    "dst, src",
    [
        (torch.zeros(4), torch.zeros(5)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(4), torch.zeros(8)[::2]),
        (torch.zeros(4, 4).t(), torch.zeros(4, 4)),
    ],
)
def test_unlike_tensors_are_not_copied(kind, dst, src):
    device = choose_device(kind)
    with pytest.raises(ValueError, match="a copy needs"):
        device.copy_async(dst, src, H2D)
    device.close()


# Simulated: what is right with every wait in its place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8])
def test_round_trip_through_the_simulated_device(make_simulated, dtype):
    device = make_simulated(delay_seconds=0.002)
    host = device.allocate_host_slab(ODD_BYTES + 7)
    slab = device.allocate_slab(ODD_BYTES + 7)
    num_bytes = ODD_BYTES // dtype.itemsize * dtype.itemsize
    src, slot = host[:num_bytes].view(dtype), slab[:num_bytes].view(dtype)
    expected = random_bytes(num_bytes)
    src.view(torch.uint8).copy_(expected)
    fetched = device.copy_async(slot, src, H2D)
    device.wait(fetched)
    device.check_readable(slot)
    assert torch.equal(slot.view(torch.uint8), expected)
    slot.view(torch.uint8).add_(1)
    back = torch.empty_like(src)
    device.synchronize(device.copy_async(back, slot, D2H, after=device.record()))
    assert torch.equal(back.view(torch.uint8), expected + 1)


@pytest.mark.parametrize("seed", range(6))
def test_ordered_copies_equal_the_same_copies_done_one_by_one(make_simulated, seed):
    """Random copies among slots, chained by events only; the reference copies at once, in order of submission."""
    rng = random.Random(seed)
    slot_bytes, count = 257, 3
    device = make_simulated(delay_seconds=0.0005)
    slots = {
        H2D: device.allocate_slab(slot_bytes * count).view(count, slot_bytes),
        D2H: device.allocate_host_slab(slot_bytes * count).view(count, slot_bytes),
    }
    slots[D2H].copy_(random_bytes(slot_bytes * count, seed).view(count, slot_bytes))
    reference = {direction: memory.clone() for direction, memory in slots.items()}
    last = {}  # the last copy that touched a slot; its event covers all earlier ones
    for _ in range(80):
        direction = rng.choice([H2D, D2H])
        source = D2H if direction is H2D else H2D
        target, origin = (direction, rng.randrange(count)), (source, rng.randrange(count))
        before = [last[place] for place in (target, origin) if place in last]
        if len(before) == 2 and before[0] is not before[1]:
            for event in before:
                device.wait(event)
            after = device.record()
        else:
            after = before[0] if before else None
        event = device.copy_async(slots[direction][target[1]], slots[source][origin[1]], direction, after)
        last[target] = last[origin] = event
        reference[direction][target[1]] = reference[source][origin[1]]
        if rng.random() < 0.1:  # the host looks in between
            device.synchronize(event)
            assert torch.equal(slots[direction][target[1]], reference[direction][target[1]])
    for event in last.values():
        device.synchronize(event)
    for direction in Direction:
        assert torch.equal(slots[direction], reference[direction])
    assert not device._unpublished


def test_slot_is_written_back_and_refilled_without_the_host_waiting(make_simulated):
    device = make_simulated(delay_seconds=0.01)
    old, new = random_bytes(1000, 1), random_bytes(1000, 2)
    slot = device.allocate_slab(1000)
    home = torch.zeros(1000, dtype=torch.uint8)
    first = device.copy_async(slot, old, H2D)
    written = device.copy_async(home, slot, D2H, after=first)
    refilled = device.copy_async(slot, new, H2D, after=written)
    assert torch.equal(slot, poison(1000))
    device.wait(refilled)
    assert torch.equal(slot, new)
    assert torch.equal(home, poison(1000))  # a wait of the device is none of the host
    device.synchronize(written)
    assert torch.equal(home, old)
    assert torch.equal(slot, new)


def test_pending_write_back_still_sees_a_fetch_that_is_waited_for_after_the_slot_was_refilled(make_simulated):
    device = make_simulated(bytes_per_second=1e6, delay_seconds=0.05)
    slot = device.allocate_slab(10)
    home = torch.zeros(10, dtype=torch.uint8)
    device.copy_async(torch.empty(300_000, dtype=torch.uint8), random_bytes(300_000), D2H)  # holds the write-back up
    fetched = device.copy_async(slot, random_bytes(10, 1), H2D)
    written = device.copy_async(home, slot, D2H, after=fetched)
    refilled = device.copy_async(slot, random_bytes(10, 2), H2D, after=written)
    device.wait(fetched)
    assert torch.equal(slot, poison(10))
    device.synchronize(written)
    assert torch.equal(home, random_bytes(10, 1))
    device.wait(refilled)
    assert torch.equal(slot, random_bytes(10, 2))


def test_copies_never_waited_for_do_not_pile_up(make_simulated):
    device = make_simulated()
    slot = device.allocate_slab(64)
    home = torch.zeros(64, dtype=torch.uint8)
    event = COMPLETED
    for step in range(50):
        event = device.copy_async(slot, random_bytes(64, step), H2D, after=event)
        event = device.copy_async(home, slot, D2H, after=event)
        event = device.copy_async(slot, home, H2D, after=event)
        device.wait(event)
        assert torch.equal(slot, random_bytes(64, step))
        assert len(device._unpublished) <= 1


def test_both_directions_run_at_once_and_each_keeps_its_order(make_simulated):
    device = make_simulated(bytes_per_second=1000.0)
    slab = device.allocate_slab(4_000_020)
    slow = device.copy_async(slab[:4_000_000], random_bytes(4_000_000), H2D)  # over an hour
    behind = device.copy_async(slab[4_000_000:4_000_010], random_bytes(10), H2D)
    slab[4_000_010:] = 5
    home = torch.zeros(10, dtype=torch.uint8)
    device.synchronize(device.copy_async(home, slab[4_000_010:], D2H))
    assert home.tolist() == [5] * 10
    time.sleep(0.03)
    assert not slow.query() and not behind.query()


def test_copy_starts_only_after_its_event(make_simulated):
    device = make_simulated(bytes_per_second=1000.0)
    slab = device.allocate_slab(4_000_000)
    slow = device.copy_async(slab, random_bytes(4_000_000), H2D)
    home = torch.zeros(10, dtype=torch.uint8)
    back = device.copy_async(home, slab[:10], D2H, after=slow)
    time.sleep(0.03)
    assert not back.query()


@pytest.mark.parametrize("options", [{"delay_seconds": HOUR}, {"bytes_per_second": 1 / HOUR}])
def test_delay_and_speed_hold_a_copy_back_and_close_does_not_wait(make_simulated, options):
    device = make_simulated(**options)
    slot = device.allocate_slab(1)
    event = device.copy_async(slot, random_bytes(1), H2D)
    assert not event.query()
    failures = []

    def wait() -> None:
        try:
            device.wait(event)
        except RuntimeError as error:
            failures.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    device.close()
    waiter.join(timeout=30)
    assert failures == ["the simulated device is closed"]
    assert not any(thread.is_alive() for thread in device._threads)
    with pytest.raises(RuntimeError, match="closed"):
        device.copy_async(slot, random_bytes(1), H2D)
    device.close()


# Simulated: what each kind of race becomes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_missing_wait_gives_nan_however_long_ago_the_copy_was(make_simulated, dtype):
    device = make_simulated()
    slot = device.allocate_slab(64).view(dtype)
    event = device.copy_async(slot, torch.ones(64 // dtype.itemsize, dtype=dtype), H2D)
    other = device.copy_async(torch.empty(8, dtype=dtype), torch.ones(8, dtype=dtype), D2H)
    device.synchronize(other)
    time.sleep(0.03)
    assert slot.isnan().all()
    with pytest.raises(RaceError, match=r"bytes 0\.\.64 of device slab 0.*not waited for: copy 1 from host to device"):
        device.check_readable(slot)
    device.wait(event)
    device.check_readable(slot)
    assert torch.equal(slot, torch.ones_like(slot))


def test_event_covers_earlier_copies_of_its_stream_and_no_later_ones(make_simulated):
    device = make_simulated()
    slots = device.allocate_slab(30).view(3, 10)
    events = [device.copy_async(slots[i], random_bytes(10, i), H2D) for i in range(3)]
    device.wait(events[1])
    for i in range(2):
        device.check_readable(slots[i])
        assert torch.equal(slots[i], random_bytes(10, i))
    assert torch.equal(slots[2], poison(10))
    with pytest.raises(RaceError, match=r"bytes 20\.\.30"):
        device.check_readable(slots[2])
    with pytest.raises(RaceError, match="10 of its bytes"):
        device.check_readable(slots)


def test_source_refilled_too_early_delivers_the_refilled_bytes(make_simulated):
    device = make_simulated(delay_seconds=0.2)
    slot = device.allocate_slab(1000)
    host = random_bytes(1000, 1)
    event = device.copy_async(slot, host, H2D)
    host.copy_(random_bytes(1000, 2))
    device.wait(event)
    assert torch.equal(slot, random_bytes(1000, 2))


def test_slot_refilled_without_naming_the_write_back_poisons_the_write_back(make_simulated):
    device = make_simulated(delay_seconds=0.1)
    slot = device.allocate_slab(100)
    device.wait(device.copy_async(slot, random_bytes(100, 1), H2D))
    home = torch.zeros(100, dtype=torch.uint8)
    written = device.copy_async(home, slot, D2H, after=device.record())
    device.copy_async(slot, random_bytes(100, 2), H2D)  # should have come after `written`
    device.synchronize(written)
    assert torch.equal(home, poison(100))


def test_late_wait_for_a_superseded_copy_does_not_bring_it_back(make_simulated):
    device = make_simulated(bytes_per_second=1e5, delay_seconds=0.05)  # `old` is pending when `newer` comes
    slab = device.allocate_slab(2_000_010)
    slot = slab[:10]
    old = device.copy_async(slot, random_bytes(10, 1), H2D)
    filler = device.copy_async(slab[10:], random_bytes(2_000_000), H2D)
    newer = device.copy_async(slot, random_bytes(10, 2), H2D)
    device.wait(old)
    assert not filler.query() and not newer.query()
    assert torch.equal(slot, poison(10))
    with pytest.raises(RaceError, match="copy 3"):
        device.check_readable(slot)


def test_released_slot_is_poison_and_not_readable(make_simulated):
    device = make_simulated()
    slots = device.allocate_slab(20).view(2, 10)
    for i in range(2):
        device.wait(device.copy_async(slots[i], random_bytes(10, i), H2D))
    device.release(slots[0])
    assert torch.equal(slots[0], poison(10))
    with pytest.raises(RaceError, match=r"bytes 0\.\.10 .*never fetched, or released"):
        device.check_readable(slots[0])
    device.check_readable(slots[1])
    assert torch.equal(slots[1], random_bytes(10, 1))


def test_slot_released_too_early_loses_what_was_on_its_way(make_simulated):
    device = make_simulated(delay_seconds=0.05)
    slots = device.allocate_slab(20).view(2, 10)
    incoming = device.copy_async(slots[0], random_bytes(10), H2D)
    slots[1] = 1
    home = torch.zeros(10, dtype=torch.uint8)
    outgoing = device.copy_async(home, slots[1], D2H)
    device.release(slots)
    device.wait(incoming)
    device.synchronize(outgoing)
    assert torch.equal(slots[0], poison(10))
    assert torch.equal(home, poison(10))


def test_fresh_slab_is_poison(make_simulated):
    device = make_simulated()
    slab = device.allocate_slab(ODD_BYTES)
    assert torch.equal(slab, poison(ODD_BYTES)) and slab.data_ptr() % 4096 == 0
    with pytest.raises(RaceError, match="never fetched"):
        device.check_readable(slab)
    with pytest.raises(ValueError, match="not part of a slab"):
        device.check_readable(torch.zeros(4))


def test_swapped_sides_are_refused(make_simulated):
    device = make_simulated()
    slab, host = device.allocate_slab(10), device.allocate_host_slab(10)
    with pytest.raises(ValueError, match="wrong side"):
        device.copy_async(host, slab, H2D)
    with pytest.raises(ValueError, match="wrong side"):
        device.copy_async(slab, host, D2H)


def test_event_of_another_device_is_refused(make_simulated):
    first, second = make_simulated(), make_simulated()
    event = first.record()
    with pytest.raises(ValueError, match="another device"):
        second.wait(event)


def test_error_of_a_copy_is_raised_at_every_wait_that_covers_it_and_at_no_other(make_simulated, monkeypatch):
    device = make_simulated()
    slots = device.allocate_slab(30).view(3, 10)
    good = device.copy_async(slots[0], random_bytes(10), H2D)
    device.wait(good)
    read_source = device._read_source

    def fail_second(copy):
        if copy.clock[H2D] == 2:
            raise MemoryError("no room for staging")
        return read_source(copy)

    monkeypatch.setattr(device, "_read_source", fail_second)
    bad = device.copy_async(slots[1], random_bytes(10), H2D)
    later = device.copy_async(slots[2], random_bytes(10), H2D)
    for act in (lambda: device.wait(bad), lambda: device.synchronize(later), later.query):
        with pytest.raises(RuntimeError, match="copy 2 from host to device of 10 bytes failed.*no room") as caught:
            act()
        assert isinstance(caught.value.__cause__, MemoryError)
    device.synchronize(good)
    assert torch.equal(slots[1], poison(10))


def test_simulated_memory_is_counted_and_limited(make_simulated):
    device = make_simulated(total_bytes=10_000)
    device.allocate_slab(6000)
    device.allocate_host_slab(50_000)
    device.reset_peak()
    assert device.peak_bytes() == 6000
    assert device.total_bytes() == 10_000
    with pytest.raises(UserError, match="did not grant 4001 bytes: 6000 of its 10000.*--device-memory"):
        device.allocate_slab(4001)
    slab = device.allocate_slab(4000)
    assert device.peak_bytes() == 10_000
    device.free_slab(slab)
    assert device.peak_bytes() == 6000


# Choosing


def with_accelerator(monkeypatch, kind: str | None) -> None:
    found = torch.device(kind) if kind else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(finetune.offload.devices, "AcceleratorDevice", lambda kind: SimpleNamespace(kind=kind))


def test_auto_takes_the_accelerator_and_else_the_cpu(monkeypatch):
    with_accelerator(monkeypatch, None)
    assert choose_device("auto").kind == "cpu"
    with_accelerator(monkeypatch, "xpu")
    assert choose_device("auto").kind == "xpu"
    assert choose_device("xpu").kind == "xpu"
    assert choose_device("cpu").kind == "cpu"
    with_accelerator(monkeypatch, "hpu")  # an accelerator that is not ours
    assert choose_device("auto").kind == "cpu"


@pytest.mark.parametrize(
    "present, asked, there",
    [(None, "cuda", "here: cpu"), ("cuda", "mps", "here: cpu, cuda"), (None, "xpu", "here: cpu")],
)
def test_absent_device_is_refused_and_what_is_there_named(monkeypatch, present, asked, there):
    with_accelerator(monkeypatch, present)
    with pytest.raises(UserError, match=f"'{asked}' was asked for.*{there}"):
        choose_device(asked)


def test_unknown_device_is_refused():
    with pytest.raises(UserError, match="unknown device 'gpu': choose one of auto, cpu, cuda, xpu, mps, simulated"):
        choose_device("gpu")


def test_only_the_devices_know_their_kinds():
    """Others ask what a device can do."""
    root = Path(__file__).parents[1]
    asks = re.compile(rf"""(type|kind) (==|!=|(not )?in) \(?["']({"|".join(DEVICE_KINDS)})["']""")
    files = [path for room in ("finetune", "offload", "memory") for path in (root / room).rglob("*.py")]
    asking = {path.parent.name for path in files if asks.search(path.read_text(encoding="utf-8"))}
    assert asking == {"devices"}


def test_simulation_options_reach_the_device():
    device = choose_device("simulated", simulated_delay_seconds=HOUR, simulated_total_bytes=100)
    assert device.total_bytes() == 100 and device.kind == "simulated" and not device.shares_host_memory
    event = device.copy_async(device.allocate_slab(4), random_bytes(4), H2D)
    assert not event.query()
    device.close()
    for options in (
        {"simulated_bytes_per_second": 0.0},
        {"simulated_delay_seconds": -1.0},
        {"simulated_total_bytes": 0},
    ):
        with pytest.raises(UserError, match="a simulated device needs"):
            choose_device("simulated", **options)
