"""Slots and fetches of the host tier: what is read how often, what is evicted, and what happens when a read fails."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.memory.fetch_policy import next_fetch, spread_evenly, victim
from finetune.memory.simulator import Ring, Speeds, StepWork, simulate_step
from finetune.memory.slots import Slab, SlotPool
from finetune.offload.devices import Direction
from finetune.offload.devices.base import map_host_bytes
from finetune.offload.devices.simulated import SimulatedDevice
from finetune.offload.residency.io import FaultPlan, IOEngine, IOFailure
from finetune.offload.residency.tiers import DeviceTier, HostTier, PassingTier
from finetune.offload.weights.formats import Extent, PlainTensor
from finetune.offload.weights.layout import BlockLayout, layout_block

NUM_BLOCKS = 6
SIZES = [5000, 7777, 4096, 123, 9001, 7777]


class CountingIO:
    """An IOEngine that counts how often each block's bytes are asked for; `batches` are the extents of each ticket."""

    def __init__(self, io: IOEngine) -> None:
        self._io = io
        self.bytes = 0

    def open(self, path: Path) -> int:
        return self._io.open(path)

    def submit_reads(self, extents) -> int:
        self.bytes += sum(extent[2] for extent in extents)
        return self._io.submit_reads(extents)

    def __getattr__(self, name):
        return getattr(self._io, name)


@pytest.fixture
def blocks(tmp_path) -> tuple[list[BlockLayout], list[np.ndarray]]:
    """Blocks of unlike sizes in one file, and their bytes."""
    rng = np.random.default_rng(0)
    contents = [rng.integers(0, 256, size, dtype=np.uint8) for size in SIZES]
    path = tmp_path / "blocks"
    path.write_bytes(b"header" + b"".join(c.tobytes() for c in contents))
    layouts, offset = [], 6
    for size in SIZES:
        layouts.append(layout_block({"w": PlainTensor(torch.uint8, (size,), (Extent(path, offset, size, 0),))}))
        offset += size
    return layouts, contents


def pool_of(layouts, count: int) -> SlotPool:
    slot_bytes = max(layout.num_bytes for layout in layouts)
    return Slab(map_host_bytes(4096 * (count * (slot_bytes // 4096 + 2)))).carve("test", slot_bytes, count)


def train_order(steps: int) -> list[list[int]]:
    forward = list(range(NUM_BLOCKS))
    return [forward + forward[::-1]] * steps


def run_steps(tier, contents, steps: int) -> None:
    for order in train_order(steps):
        tier.begin(order + list(range(NUM_BLOCKS)))
        for block in order:
            tier.acquire(block)
            assert np.array_equal(tier.views(block)["w"].numpy(), contents[block])
            tier.release(block)


@pytest.mark.parametrize("resident, lookahead", list(itertools.product([0, 1, 3, 6], [0, 1, 3])))
def test_every_streamed_block_is_read_at_most_twice_a_step(resident, lookahead, blocks):
    layouts, contents = blocks
    held = spread_evenly(NUM_BLOCKS, resident) if resident else frozenset()
    with IOEngine("threads") as io:
        counting = CountingIO(io)
        count = len(held) + min(lookahead + 1, NUM_BLOCKS - len(held))
        tier = HostTier(layouts, counting, pool_of(layouts, count), held, lookahead)
        run_steps(tier, contents, 1)
        first = counting.bytes
        run_steps(tier, contents, 3)
        streamed = sum(sum(r.num_bytes for r in layouts[i].reads) for i in range(NUM_BLOCKS) if i not in held)
        assert counting.bytes - first <= 3 * 2 * streamed
        assert first <= 3 * streamed + sum(sum(r.num_bytes for r in layouts[i].reads) for i in held)
        tier.close()


@pytest.mark.parametrize("resident, lookahead", list(itertools.product([0, 2, 6], [0, 1, 3])))
def test_the_simulator_reads_what_the_streamer_reads(resident, lookahead, blocks):
    layouts, contents = blocks
    held = spread_evenly(NUM_BLOCKS, resident) if resident else frozenset()
    sizes = [sum(r.num_bytes for r in layout.reads) for layout in layouts]
    predicted = simulate_step(StepWork(sizes, [1.0] * 6, [1.0] * 6), Speeds(1e6), Ring(held, lookahead))
    with IOEngine("threads") as io:
        counting = CountingIO(io)
        count = len(held) + min(lookahead + 1, NUM_BLOCKS - len(held))
        tier = HostTier(layouts, counting, pool_of(layouts, count), held, lookahead)
        run_steps(tier, contents, 2)
        before = counting.bytes
        run_steps(tier, contents, 1)
        assert predicted.read_bytes == counting.bytes - before
        tier.close()


def test_a_visit_out_of_order_is_served(blocks):
    layouts, contents = blocks
    generator = random.Random(3)
    with IOEngine("threads") as io:
        tier = HostTier(layouts, io, pool_of(layouts, 3), frozenset({2}), 1)
        for _ in range(40):
            tier.begin(generator.sample(range(NUM_BLOCKS), 4))
            for block in [generator.randrange(NUM_BLOCKS) for _ in range(5)]:
                tier.acquire(block)
                assert np.array_equal(tier.views(block)["w"].numpy(), contents[block])
                tier.release(block)
        tier.close()


def test_blocks_that_pass_are_read_once_a_pass_and_leave_no_buffer_behind(blocks):
    layouts, contents = blocks
    with IOEngine("threads") as io:
        counting = CountingIO(io)
        tier = PassingTier(layouts, counting, max(layout.num_bytes for layout in layouts))
        for _ in range(2):
            tier.begin(range(NUM_BLOCKS))
            assert counting.bytes % sum(SIZES) == 0  # nothing is read ahead
            for block in range(NUM_BLOCKS):
                assert tier.pool is None if block == 0 else tier.pool.count == 1
                tier.acquire(block)
                assert np.array_equal(tier.views(block)["w"].numpy(), contents[block])
                tier.release(block)
            assert tier.pool is None
        assert counting.bytes == 2 * sum(SIZES)
        for block in (0, 1, 0, 5):  # a pass that failed in its middle, and the next one
            tier.acquire(block)
            assert np.array_equal(tier.views(block)["w"].numpy(), contents[block])
            tier.release(block)
        tier.close()


def test_too_few_slots_and_wrong_transitions(blocks):
    layouts, _ = blocks
    with IOEngine("threads") as io:
        with pytest.raises(ValueError, match="2 slots, 1 resident blocks with lookahead 1 need 3"):
            HostTier(layouts, io, pool_of(layouts, 2), frozenset({0}), 1)
        tier = HostTier(layouts, io, pool_of(layouts, 1), frozenset(), 0)
        with pytest.raises(RuntimeError, match="expected in use, it is away"):
            tier.release(3)
        tier.acquire(0)
        with pytest.raises(RuntimeError, match="all are in use"):
            tier.acquire(1)
        tier.close()


def test_closed_in_flight_nothing_is_written_afterwards(blocks):
    layouts, _ = blocks
    with IOEngine("threads", inject=FaultPlan(short_every=1, short_bytes=512)) as io:
        pool = pool_of(layouts, 4)
        tier = HostTier(layouts, io, pool, frozenset(), 3)
        tier.begin(range(NUM_BLOCKS))
        tier.close()
        pool.buffer.fill_(77)
        assert bool((pool.buffer == 77).all())
        tier.close()


def test_a_failed_read_surfaces_and_closing_does_not_hide_it(blocks):
    layouts, _ = blocks
    with IOEngine("threads", inject=FaultPlan(eio_at=2)) as io:
        tier = HostTier(layouts, io, pool_of(layouts, 2), frozenset(), 1)
        with pytest.raises(IOFailure, match="blocks: .*Input/output error"):
            for block in range(NUM_BLOCKS):
                tier.acquire(block)
                tier.release(block)
        tier.close()


@pytest.mark.parametrize("on_device, on_host, lookahead", [(0, 0, 0), (0, 3, 1), (2, 0, 0), (1, 4, 3), (6, 0, 1)])
def test_device_tier_over_host_tier(on_device, on_host, lookahead, blocks):
    layouts, contents = blocks
    device = SimulatedDevice(bytes_per_second=5e7, delay_seconds=5e-4)
    near, far = (spread_evenly(NUM_BLOCKS, n) if n else frozenset() for n in (on_device, on_host))
    with IOEngine("threads") as io:
        slots = len(far) + min(lookahead + 2, NUM_BLOCKS - len(far))
        slab = Slab(device.allocate_host_slab(4096 * 4 * slots))
        host = HostTier(layouts, io, slab.carve("host", 4096 * 4, slots), far, lookahead)
        count = len(near) + min(lookahead + 1, NUM_BLOCKS - len(near))
        pool = Slab(device.allocate_slab(4096 * 4 * count)).carve("device", 4096 * 4, count)
        copies = []
        copy_async = device.copy_async
        device.copy_async = lambda dst, src, direction, after=None: (
            copies.append((direction, src.nbytes)), copy_async(dst, src, direction, after)
        )[1]  # fmt: skip
        tier = DeviceTier(host, device, pool, near, lookahead)
        run_steps(tier, contents, 2)
        before = len(copies)
        run_steps(tier, contents, 1)
        assert len(copies) - before <= 2 * (NUM_BLOCKS - len(near))
        assert {direction for direction, _ in copies} == {Direction.H2D}
        tier.close()
    device.close()


def best_eviction(upcoming: list[int], candidates: set[int]) -> set[int]:
    """Belady's rule by definition: those whose next use is farthest."""
    distance = {c: upcoming.index(c) if c in upcoming else len(upcoming) for c in candidates}
    return {c for c in candidates if distance[c] == max(distance.values())}


def test_victim_is_beladys():
    generator = random.Random(1)
    for _ in range(500):
        upcoming = [generator.randrange(8) for _ in range(generator.randrange(15))]
        candidates = set(generator.sample(range(8), generator.randrange(1, 8)))
        assert victim(upcoming, candidates) in best_eviction(upcoming, candidates)


def test_next_fetch_stays_within_the_lookahead():
    generator = random.Random(2)
    for _ in range(500):
        upcoming = [generator.randrange(8) for _ in range(generator.randrange(15))]
        held = set(generator.sample(range(8), generator.randrange(8)))
        resident = frozenset(generator.sample(range(8), generator.randrange(4)))
        lookahead = generator.randrange(4)
        streamed = list(dict.fromkeys(b for b in upcoming if b not in resident))
        in_reach = set(streamed[: lookahead + 1])
        beyond = upcoming.index(streamed[lookahead + 1]) if len(streamed) > lookahead + 1 else len(upcoming)
        missing = [b for b in upcoming[:beyond] if b not in held and (b in in_reach or b in resident)]
        assert next_fetch(upcoming, held, resident, lookahead) == (missing[0] if missing else None)


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 17])
def test_residents_are_spread_and_counted(num_blocks):
    for count in range(1, num_blocks + 1):
        chosen = sorted(spread_evenly(num_blocks, count))
        assert len(chosen) == count and chosen[0] >= 0 and chosen[-1] < num_blocks
        gaps = np.diff(chosen)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_simulated_time_is_bounded_by_disk_and_compute():
    sizes, forward, backward = [100] * 5, [1.0] * 5, [2.0] * 5
    for resident, lookahead, speed in itertools.product([0, 2, 5], [0, 1, 3], [20.0, 100.0, 1e9]):
        held = spread_evenly(5, resident) if resident else frozenset()
        work = StepWork(sizes, forward, backward, head_seconds=3.0)
        found = simulate_step(work, Speeds(speed), Ring(held, lookahead))
        compute, disk = 18.0, found.read_bytes / speed
        assert max(compute, disk) - 1e-6 <= found.seconds + 2 * 100 / speed * (lookahead + 1)
        assert found.seconds <= compute + disk + 1e-6 + 100 / speed * (lookahead + 1)
        assert found.stall_seconds == pytest.approx(found.seconds - compute)
        if resident == 5:
            assert found.read_bytes == 0 and found.seconds == pytest.approx(compute)
