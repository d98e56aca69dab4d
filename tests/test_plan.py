"""The planner's promises: what it refuses, what it names, and that more memory is never worse."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from memory.plan import Demand, Limits, PlanRefused, Wishes, make_plan
from memory.simulator import simulate_step

MIB = 1 << 20
DEMAND = Demand(
    block_bytes=(9 * MIB + 1, 9 * MIB, 7 * MIB, 9 * MIB + 1, 3 * MIB),
    head_chunk_bytes=11 * MIB, head_chunks=3, state_bytes=5 * MIB, edge_bytes=MIB, temporaries_bytes=40 * MIB,
    step_bytes=6 * MIB, boundary_bytes=2 * MIB, boundary_total_bytes=40 * MIB, baseline_bytes=200 * MIB,
)  # fmt: skip


def refused(demand: Demand, limits: Limits, wishes: Wishes = Wishes()) -> PlanRefused:
    with pytest.raises(PlanRefused) as caught:
        make_plan(demand, limits, wishes)
    return caught.value


@pytest.mark.parametrize("wishes", [Wishes(), Wishes(resident_blocks=2, lookahead=3, activations="host")])
@pytest.mark.parametrize("tier", ["host", "device"])
def test_the_smallest_budget_is_named_and_is_the_smallest(tier, wishes):
    on_device = tier == "device"
    few, many = (1000 if not on_device else 1 << 40), (1 << 40)
    error = refused(DEMAND, Limits(few, 1000 if on_device else None), wishes)
    smallest = error.smallest_bytes
    named = smallest + (4 * MIB if tier == "host" else 0)  # it must work in another process, too
    assert f"--{tier}-memory" in str(error) and f"{-(-named // MIB)}MiB, the smallest that works" in str(error)

    def limits(size: int) -> Limits:
        return Limits(many, size) if on_device else Limits(size)

    plan = make_plan(DEMAND, limits(smallest), wishes)
    assert (plan.device_peak_bytes if on_device else plan.host_peak_bytes) == smallest
    assert refused(DEMAND, limits(smallest - 1), wishes).smallest_bytes == smallest


def disk_bytes(plan, demand: Demand) -> int:
    n = len(demand.block_bytes)
    return simulate_step(
        n, demand.block_bytes, [1.0] * n, [2.0] * n, 0.0, 1e9, plan.host_resident, plan.host_lookahead
    ).read_bytes


def random_demand(generator: random.Random) -> Demand:
    blocks = tuple(generator.randrange(1, 30 * MIB) for _ in range(generator.randrange(1, 20)))
    boundary = generator.randrange(1, 4 * MIB)
    return replace(
        DEMAND, block_bytes=blocks, head_chunks=generator.randrange(4), boundary_bytes=boundary,
        boundary_total_bytes=boundary * len(blocks) * generator.randrange(1, 9),
    )  # fmt: skip


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("activations", ["host", "disk"])
def test_more_memory_never_reads_more(activations, on_device):
    """For block inputs in one place: moving them to memory may take the place of resident blocks."""
    wishes = Wishes(lookahead=1, activations=activations)
    generator = random.Random(5)
    for _ in range(30):
        demand = random_demand(generator)
        smallest = refused(demand, Limits(1, 1 << 40 if on_device else None), wishes).smallest_bytes
        last_resident = -1
        for extra in sorted(generator.randrange(0, 900 * MIB) for _ in range(12)):
            size = smallest + extra
            plan = make_plan(demand, Limits(size, 1 << 40 if on_device else None), wishes)
            read = disk_bytes(plan, demand)
            streamed = sum(b for i, b in enumerate(demand.block_bytes) if i not in plan.host_resident)
            assert plan.host_peak_bytes <= size and plan.host_slab_bytes < size
            assert read <= 2 * streamed
            assert len(plan.host_resident) >= last_resident
            last_resident = len(plan.host_resident)


def test_slots_are_what_residents_and_lookahead_need():
    for size in range(335, 500, 7):
        plan = make_plan(DEMAND, Limits(size * MIB))
        streamed = len(DEMAND.block_bytes) - len(plan.host_resident)
        assert plan.host_block_slots == len(plan.host_resident) + min(plan.host_lookahead + 1, streamed)
        assert plan.block_slot_bytes % 4096 == 0 and plan.block_slot_bytes >= max(DEMAND.block_bytes)


def test_generous_budget_keeps_everything():
    plan = make_plan(DEMAND, Limits(1 << 40, 1 << 40))
    assert plan.host_resident == plan.device_resident == frozenset(range(5))
    assert plan.activation_slots == 0 and plan.activation_host_bytes == DEMAND.boundary_total_bytes
    assert disk_bytes(plan, DEMAND) == 0


@pytest.mark.parametrize("wishes", [Wishes(3, 2, "disk"), Wishes(0, 0, "host"), Wishes(99, 1)])
def test_wishes_are_kept(wishes):
    plan = make_plan(DEMAND, Limits(1 << 40), wishes)
    assert len(plan.host_resident) == min(wishes.resident_blocks, 5)
    assert plan.host_lookahead == wishes.lookahead
    if wishes.activations != "auto":
        assert bool(plan.activation_slots) == (wishes.activations == "disk")


@pytest.mark.parametrize("room", [0, 1, 20, 37, 50])
def test_state_is_kept_where_there_is_room_after_all_else(room):
    demand = replace(DEMAND, state_slot_bytes=12 * MIB, state_pieces=37)
    full = make_plan(demand, Limits(1 << 40))
    assert (full.kept_pieces, full.state_slots) == (37, 12 + 37)
    plan = make_plan(demand, Limits(full.host_peak_bytes + (room - 37) * 12 * MIB))
    assert (plan.kept_pieces, plan.state_slots) == (min(room, 37), 12 + min(room, 37))
    assert len(plan.host_resident) == 5


def test_the_whole_head_stays_where_there_is_room_after_the_blocks():
    demand = replace(DEMAND, head_chunks=7)
    everything = make_plan(demand, Limits(1 << 40, 1 << 40))
    assert (everything.head_slots, everything.device_head_slots) == (7, 7)
    without = everything.host_peak_bytes - 5 * everything.head_slot_bytes
    tight = make_plan(demand, Limits(without + 4 * everything.head_slot_bytes, 1 << 40))
    assert (tight.head_slots, tight.device_head_slots, len(tight.host_resident)) == (2, 7, 5)


def test_state_that_waits_in_memory_comes_before_resident_blocks():
    demand = replace(DEMAND, state_slot_bytes=12 * MIB, head_chunks=1)
    waiting = replace(demand, waiting_state_slots=9)
    limits = Limits(make_plan(demand, Limits(1 << 40), Wishes(resident_blocks=0)).host_peak_bytes + 9 * 12 * MIB)
    few, many = make_plan(demand, limits), make_plan(waiting, limits)
    assert (few.state_slots, len(few.host_resident)) == (12, 5)
    assert (many.state_slots, len(many.host_resident)) == (21, 0)
    assert many.host_slab_bytes - many.host_block_slots * many.block_slot_bytes - many.head_slots * many.head_slot_bytes == (
        21 * 12 * MIB
    )
    assert many.host_peak_bytes <= limits.host_bytes
