"""Measured memory: against allocations of known size, and the sampled peak against its own definition."""

from __future__ import annotations

import mmap
import sys
import time

import pytest

from finetune.memory.meter import MemoryMeter, host_bytes

MIB = 1 << 20
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def test_host_bytes_counts_touched_anonymous_pages_only() -> None:
    before = host_bytes()
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
        assert host_bytes() - before < 8 * MIB  # reserved, not resident
        region.write(b"\1" * (64 * MIB))
        assert 60 * MIB < host_bytes() - before < 140 * MIB  # the region, and for a moment the bytes written
    assert host_bytes() - before < 8 * MIB


@linux_only
def test_shared_memory_counts_as_host_and_mapped_files_do_not(tmp_path) -> None:
    before = host_bytes()
    with mmap.mmap(-1, 32 * MIB) as region:  # MAP_SHARED | MAP_ANONYMOUS
        region[:: mmap.PAGESIZE] = b"\1" * (32 * MIB // mmap.PAGESIZE)
        assert 30 * MIB < host_bytes() - before < 36 * MIB
    path = tmp_path / "weights"
    path.write_bytes(bytes(32 * MIB))
    host = host_bytes()
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as region:
        assert sum(region[:: mmap.PAGESIZE]) == 0
        assert abs(host_bytes() - host) < 4 * MIB


def test_peak_of_a_freed_allocation_is_kept_until_reset() -> None:
    meter = MemoryMeter(interval_seconds=3600)  # only the explicit samples
    assert meter.peak_bytes == 0
    before = meter.sample()
    with mmap.mmap(-1, 48 * MIB) as region:
        region[:: mmap.PAGESIZE] = b"\1" * (48 * MIB // mmap.PAGESIZE)
        high = meter.sample()
    assert high - before > 44 * MIB
    assert meter.sample() < high == meter.peak_bytes
    meter.reset_peak()
    assert meter.peak_bytes < high


def test_background_sampling_sees_what_no_call_marked() -> None:
    with MemoryMeter(interval_seconds=0.005) as meter:
        before = meter.peak_bytes
        with mmap.mmap(-1, 48 * MIB) as region:
            region[:: mmap.PAGESIZE] = b"\1" * (48 * MIB // mmap.PAGESIZE)
            deadline = time.monotonic() + 20
            while meter.peak_bytes - before < 44 * MIB and time.monotonic() < deadline:
                time.sleep(0.005)
    assert meter.peak_bytes - before > 44 * MIB


def test_start_and_stop_may_be_repeated() -> None:
    meter = MemoryMeter()
    assert meter.start() is meter.start()
    thread = meter._thread
    assert meter.stop() == meter.stop() > 0
    assert not thread.is_alive()
    meter.start()
    assert meter.stop() > 0
