"""The planner's promises: what it refuses, what it names, and that more memory is never worse."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from finetune.memory.needs import Item, Lasts, Needs, Pool, Tier, Worth
from finetune.memory.plan import Limits, Plan, PlanRefused, make_plan
from finetune.memory.simulator import Ring, Speeds, StepWork, simulate_step
from finetune.memory.units import PAGE_BYTES
from finetune.offload.sizing.needs import (
    ACTIVATIONS,
    DECODED_WEIGHTS,
    DEVICE_BLOCKS,
    DEVICE_HEAD,
    EDGES,
    GRAPHS,
    HIDDEN_STATES,
    HOST_BLOCKS,
    HOST_HEAD,
    LANES_NEAR,
    STAGING_BYTES,
    STATE,
    STEP,
    VARIANTS,
    VISIT,
    LaneSize,
    Streamed,
    block_input_needs,
    decoded_needs,
    graph_needs,
    state_needs,
    stream_needs,
    update_needs,
    variant_needs,
    waiting_needs,
)

MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """A run's, in bytes."""

    block_bytes: tuple[int, ...] = (9 * MIB + 1, 9 * MIB, 7 * MIB, 9 * MIB + 1, 3 * MIB)
    head_chunks: int = 3
    boundary_bytes: int = 2 * MIB
    boundary_total_bytes: int = 40 * MIB
    state: tuple[int, int, int] | None = None  # arguments of `state_needs`


SIZES = Sizes()


def needs_of(sizes: Sizes, on_device: bool = False, **wishes) -> Needs:
    place = wishes.pop("activations", "auto")
    streamed = Streamed(sizes.block_bytes, 11 * MIB, sizes.head_chunks)
    needs = Needs.of(
        Item("process", 240 * MIB, Tier.HOST),
        Item("adapters", 5 * MIB, Tier.COMPUTE),
        Item(EDGES, MIB, Tier.COMPUTE),
        Item(VISIT, 40 * MIB, Tier.COMPUTE, Lasts.MOMENT),
        Item(STEP, 6 * MIB, Tier.COMPUTE, Lasts.STEP),
    )
    needs += stream_needs(streamed, on_device, **wishes)
    needs += block_input_needs(sizes.boundary_bytes, sizes.boundary_total_bytes, place)
    return needs if sizes.state is None else needs + state_needs(*sizes.state)


def plan_of(sizes: Sizes, host_bytes: int, device_bytes: int | None = None, **wishes) -> Plan:
    return make_plan(needs_of(sizes, device_bytes is not None, **wishes), Limits(host_bytes, device_bytes))


def refused(sizes: Sizes, host_bytes: int, device_bytes: int | None = None, **wishes) -> PlanRefused:
    with pytest.raises(PlanRefused) as caught:
        plan_of(sizes, host_bytes, device_bytes, **wishes)
    return caught.value


@pytest.mark.parametrize("wishes", [{}, {"resident_blocks": 2, "lookahead": 3, "activations": "host"}])
@pytest.mark.parametrize("tier", ["host", "device"])
def test_the_smallest_budget_is_named_and_is_the_smallest(tier, wishes):
    on_device = tier == "device"
    few, many = (1000 if not on_device else 1 << 40), (1 << 40)
    error = refused(SIZES, few, 1000 if on_device else None, **wishes)
    smallest = error.smallest_bytes
    named = smallest + (4 * MIB if tier == "host" else 0)  # it must work in another process, too
    assert f"--{tier}-memory" in str(error) and f"{-(-named // MIB)}MiB, the smallest that works" in str(error)

    def limits(size: int) -> tuple[int, int | None]:
        return (many, size) if on_device else (size, None)

    plan = plan_of(SIZES, *limits(smallest), **wishes)
    assert (plan.device_peak_bytes if on_device else plan.host_peak_bytes) == smallest
    assert refused(SIZES, *limits(smallest - 1), **wishes).smallest_bytes == smallest


def disk_bytes(plan: Plan, sizes: Sizes) -> int:
    n, slots = len(sizes.block_bytes), plan.slots[HOST_BLOCKS]
    work = StepWork(sizes.block_bytes, [1.0] * n, [2.0] * n)
    return simulate_step(work, Speeds(1e9), Ring(slots.resident, slots.lookahead)).read_bytes


def random_sizes(generator: random.Random) -> Sizes:
    blocks = tuple(generator.randrange(1, 30 * MIB) for _ in range(generator.randrange(1, 20)))
    boundary = generator.randrange(1, 4 * MIB)
    return Sizes(
        blocks, head_chunks=generator.randrange(4), boundary_bytes=boundary,
        boundary_total_bytes=boundary * len(blocks) * generator.randrange(1, 9),
    )  # fmt: skip


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("activations", ["host", "disk"])
def test_more_memory_never_reads_more(activations, on_device):
    """For block inputs in one place: moving them to memory may take the place of resident blocks."""
    wishes = {"lookahead": 1, "activations": activations}
    device_bytes = 1 << 40 if on_device else None
    generator = random.Random(5)
    for _ in range(30):
        sizes = random_sizes(generator)
        smallest = refused(sizes, 1, device_bytes, **wishes).smallest_bytes
        last_kept = -1
        for extra in sorted(generator.randrange(0, 900 * MIB) for _ in range(12)):
            size = smallest + extra
            plan = plan_of(sizes, size, device_bytes, **wishes)
            blocks, read = plan.slots[HOST_BLOCKS], disk_bytes(plan, sizes)
            streamed = sum(b for i, b in enumerate(sizes.block_bytes) if i not in blocks.resident)
            assert plan.host_peak_bytes <= size and plan.host_slab_bytes < size
            assert read <= 2 * streamed
            assert blocks.kept >= last_kept
            last_kept = blocks.kept


def test_slots_are_what_residents_and_lookahead_need():
    for size in range(335, 500, 7):
        blocks = plan_of(SIZES, size * MIB).slots[HOST_BLOCKS]
        streamed = len(SIZES.block_bytes) - len(blocks.resident)
        assert blocks.count == len(blocks.resident) + min(blocks.lookahead + 1, streamed)
        assert blocks.slot_bytes % PAGE_BYTES == 0 and blocks.slot_bytes >= max(SIZES.block_bytes)


def test_generous_budget_keeps_everything():
    plan = plan_of(SIZES, 1 << 40, 1 << 40)
    assert plan.slots[HOST_BLOCKS].resident == plan.slots[DEVICE_BLOCKS].resident == frozenset(range(5))
    assert plan.count(ACTIVATIONS) == 0 and not plan.disk_parts
    assert plan.device_parts["block inputs kept for backward"] == SIZES.boundary_total_bytes
    assert disk_bytes(plan, SIZES) == 0


@pytest.mark.parametrize("blocks, lookahead, activations", [(3, 2, "disk"), (0, 0, "host"), (99, 1, "auto")])
def test_wishes_are_kept(blocks, lookahead, activations):
    plan = plan_of(SIZES, 1 << 40, resident_blocks=blocks, lookahead=lookahead, activations=activations)
    assert len(plan.slots[HOST_BLOCKS].resident) == min(blocks, 5)
    assert plan.slots[HOST_BLOCKS].lookahead == lookahead
    if activations != "auto":
        assert bool(plan.count(ACTIVATIONS)) == (activations == "disk")
        assert plan.disk_parts.get("block inputs", 0) == (SIZES.boundary_total_bytes if activations == "disk" else 0)


@pytest.mark.parametrize("room", [0, 1, 20, 37, 50])
def test_state_is_kept_where_there_is_room_after_all_else(room):
    sizes = replace(SIZES, state=(12 * MIB, 37, 0))
    full = plan_of(sizes, 1 << 40)
    assert (full.slots[STATE].kept, full.count(STATE)) == (37, 12 + 37)
    plan = plan_of(sizes, full.host_peak_bytes + (room - 37) * 12 * MIB)
    assert (plan.slots[STATE].kept, plan.count(STATE)) == (min(room, 37), 12 + min(room, 37))
    assert plan.slots[HOST_BLOCKS].kept == 5


def test_the_whole_head_stays_where_there_is_room_after_the_blocks():
    sizes = replace(SIZES, head_chunks=7)
    everything = plan_of(sizes, 1 << 40, 1 << 40)
    assert (everything.count(HOST_HEAD), everything.count(DEVICE_HEAD)) == (7, 7)
    chunk_bytes = everything.slots[HOST_HEAD].slot_bytes
    tight = plan_of(sizes, everything.host_peak_bytes - chunk_bytes, 1 << 40)
    assert (tight.count(HOST_HEAD), tight.count(DEVICE_HEAD), tight.slots[HOST_BLOCKS].kept) == (2, 7, 5)


def test_state_that_waits_in_memory_comes_before_resident_blocks():
    sizes = replace(SIZES, state=(12 * MIB, 0, 0), head_chunks=1)
    waiting = replace(sizes, state=(12 * MIB, 0, 9))
    host_bytes = plan_of(sizes, 1 << 40, resident_blocks=0).host_peak_bytes + 9 * 12 * MIB
    few, many = plan_of(sizes, host_bytes), plan_of(waiting, host_bytes)
    assert (few.count(STATE), few.slots[HOST_BLOCKS].kept) == (12, 5)
    assert (many.count(STATE), many.slots[HOST_BLOCKS].kept) == (21, 0)
    other_slots = many.slots[HOST_BLOCKS].num_bytes + many.slots[HOST_HEAD].num_bytes
    assert many.host_slab_bytes - other_slots == 21 * 12 * MIB
    assert many.host_peak_bytes <= host_bytes


def test_much_state_that_waits_is_offered_in_few_steps():
    few, many = (state_needs(MIB, 10_000, waiting) for waiting in (40, 4_000))
    rings = [step.rings[STATE] for step in many.steps if step.worth is Worth.WAITING_STATE]
    assert len(rings) <= 70 and 3_900 < max(rings) - 12 <= 4_000
    assert sum(step.worth is Worth.WAITING_STATE for step in few.steps) == 40


def test_weights_stay_decoded_before_anything_but_the_next_block_waits():
    """As many of the largest as there is room for, and smaller ones in what is left; slots are those of the largest block."""
    decoded = decoded_needs([(9 * MIB, 4 * MIB, 4 * MIB), (10 * MIB,), ()])
    sizes = replace(SIZES, head_chunks=2)
    needs = needs_of(sizes) + decoded
    rooms = [pool.name for pool in decoded.pools]
    assert [pool.slot_bytes for pool in decoded.pools] == [10 * MIB, 4 * MIB, 4 * MIB]
    least = plan_of(sizes, 1 << 40, resident_blocks=0, lookahead=1, activations="disk").host_peak_bytes
    for more, counts in ((3, [0, 0, 0]), (9, [0, 1, 1]), (15, [1, 1, 0]), (18, [1, 1, 1])):
        plan = make_plan(needs, Limits(least + more * MIB + MIB // 2))
        assert [plan.count(name) for name in rooms] == counts, more
        assert plan.host_parts.get("weights that stay decoded for a visit", 0) == sum(
            count * size * MIB for count, size in zip(counts, (10, 4, 4), strict=True)
        )
        assert plan.slots[HOST_BLOCKS].lookahead == 1 and not plan.slots[HOST_BLOCKS].kept and plan.count(ACTIVATIONS)
    on_device = make_plan(needs_of(sizes, True) + decoded, Limits(1 << 40, 1 << 40))
    assert sum(on_device.slots[name].num_bytes for name in rooms) == 18 * MIB
    assert on_device.device_parts["weights that stay decoded for a visit"] == 18 * MIB


def test_no_more_weights_stay_decoded_than_are_worth_a_pool_each():
    needs = decoded_needs([range(900, 0, -1), range(1000, 0, -1)])
    assert [pool.slot_bytes for pool in needs.pools] == list(range(1000, 1000 - DECODED_WEIGHTS, -1))


GRAPH_BYTES = 7 * MIB


def plan_with_graphs(
    host_bytes: int, device_bytes: int | None = None, comes_first: bool = True, kept: int | None = None, **wishes
) -> Plan:
    """Of the blocks in `SIZES`, no head, and two lanes; a visit takes a graph and 33 MiB more."""
    needs = needs_of(replace(SIZES, head_chunks=0), device_bytes is not None, **wishes)
    visit = (Item(VISIT, 40 * MIB - shared, Tier.COMPUTE, Lasts.MOMENT, **when) for shared, when in (
        (0, {"without_pool": GRAPHS}), (GRAPH_BYTES, {"with_pool": GRAPHS}),
    ))  # fmt: skip
    needs = replace(needs, items=tuple(item for item in needs.items if item.name != VISIT)) + Needs.of(*visit)
    needs += graph_needs(GRAPH_BYTES, 2, 5, comes_first, SIZES.boundary_bytes, device_bytes is not None, kept)
    return make_plan(needs, Limits(host_bytes, device_bytes))


def test_graphs_are_in_the_arena_and_not_in_a_slab():
    """On a device they are in neither."""
    for budgets in ((1 << 40, None), (1 << 40, 1 << 40)):
        without, with_graphs = (plan_with_graphs(*budgets, kept=kept, activations="host") for kept in (0, 5))
        assert with_graphs.count(GRAPHS) == 5 and without.count(GRAPHS) == 0
        assert with_graphs.host_slab_bytes == without.host_slab_bytes
        assert with_graphs.device_slab_bytes == without.device_slab_bytes
        # Named, with the blocks' inputs in any case. One recomputed graph is no longer beside them.
        more = 5 * 2 * (GRAPH_BYTES + SIZES.boundary_bytes) * (1.1 if budgets[1] else 1) - int(1.15 * GRAPH_BYTES)
        peaks = [plan.device_peak_bytes if budgets[1] else plan.host_peak_bytes for plan in (without, with_graphs)]
        assert abs(peaks[1] - peaks[0] - more) <= 5 * PAGE_BYTES
        found = with_graphs.arena_bytes - without.arena_bytes
        assert found == 0 if budgets[1] else abs(found - more) <= 2 * MIB


@pytest.mark.parametrize("comes_first", [False, True])
def test_spare_memory_goes_to_graphs_or_to_resident_blocks_first(comes_first):
    counts = []
    for extra in range(0, 250, 2):
        plan = plan_with_graphs((361 + extra) * MIB, comes_first=comes_first, activations="host", lookahead=1)
        assert plan.host_peak_bytes <= (361 + extra) * MIB
        counts.append((plan.count(GRAPHS), plan.slots[HOST_BLOCKS].kept))
    assert counts[0] == (0, 0) and counts[-1] == (5, 5)
    sooner, later = ([pair[not comes_first] for pair in counts], [pair[comes_first] for pair in counts])
    assert sooner == sorted(sooner)
    # Less is left than one more of the first kind takes.
    assert all(b <= 1 for a, b in zip(sooner, later, strict=True) if a < 5) and 0 < sooner.index(5) < later.index(5)


def test_graphs_are_kept_where_block_inputs_stay_in_memory():
    for extra in range(0, 300, 5):
        plan = plan_with_graphs((400 + extra) * MIB)
        assert not (plan.count(GRAPHS) and plan.count(ACTIVATIONS))
    assert plan_with_graphs(1 << 40, activations="disk").count(GRAPHS) == 0


def test_of_what_happens_in_turn_the_largest_counts():
    moments = [Item("m", size, Tier.COMPUTE, Lasts.MOMENT) for size in (3 * MIB, 7 * MIB, 5 * MIB)]
    needs = Needs.of(*moments, Item("m", MIB, Tier.COMPUTE))
    assert make_plan(needs, Limits(100 * MIB)).host_parts == {"m": int(1.15 * 8 * MIB)}


def test_of_what_happens_in_turn_only_what_is_there_counts():
    pool = Pool("p", "p", Tier.HOST, MIB)
    there, away = ({"with_pool": "p"}, {"without_pool": "p"})
    moments = [Item("m", 3 * MIB, Tier.COMPUTE, Lasts.MOMENT)]
    moments += [Item("m", size, Tier.COMPUTE, Lasts.MOMENT, **when) for size, when in ((5 * MIB, there), (9 * MIB, away))]
    assert make_plan(Needs.of(pool, *moments), Limits(100 * MIB)).host_parts["m"] == int(1.15 * 5 * MIB)


@pytest.mark.parametrize("blocks", [1, 2, 7])
@pytest.mark.parametrize("gradient_bytes", [1 << 20, 9 << 20, 200 << 20])
def test_gradients_take_the_place_of_block_inputs_and_of_graphs(blocks, gradient_bytes):
    """Against walking through backward: a block's gradients come before its input and its graph go, and where no graph was kept
    one is made."""
    inputs, graph, unit = 5 * MIB * blocks, 11 * MIB, -(-gradient_bytes // blocks)
    gradients = Item("gradients", gradient_bytes, Tier.COMPUTE, Lasts.RISING, blocks)
    items = (Item("inputs", inputs, Tier.COMPUTE, Lasts.FALLING, without_pool=ACTIVATIONS), gradients)
    for kept in range(blocks + 1):
        needs = Needs.of(*items) + graph_needs(graph, 1, blocks, True, 0, False, kept)
        walked = [
            inputs - done * inputs // blocks + (max(kept - done, 1) * graph if kept else 0) + (done + 1) * unit
            for done in range(blocks)
        ]
        assert abs(make_plan(needs, Limits(1 << 40)).host_peak_bytes - max(walked)) <= blocks + PAGE_BYTES
        on_device = make_plan(needs, Limits(1 << 40, 1 << 40)).device_peak_bytes
        assert on_device == inputs + kept * graph + gradient_bytes


def test_covering_is_for_either_batch():
    items = [Item("fixed", 5, Tier.HOST), Item("step", 3, Tier.HOST, Lasts.STEP), Item("turn", 9, Tier.HOST, Lasts.MOMENT)]
    other = [replace(item, num_bytes=7) for item in items]
    covering = Needs.of(*items).covering(Needs.of(*other))
    assert [covering.bytes_of(name) for name in ("fixed", "step", "turn")] == [5, 7, 9]


def test_remedies_are_those_of_what_is_large():
    items = [Item("a", 40 * MIB, Tier.HOST, remedy="fewer a"), Item("b", MIB, Tier.HOST, remedy="fewer b")]
    with pytest.raises(PlanRefused, match=r"To make it fit: raise --host-memory to 45MiB, .*; or fewer a\.$") as caught:
        make_plan(Needs.of(*items), Limits(MIB))
    named = caught.value.with_nearest(["--x 1: 2 MiB"])
    assert str(named).endswith("These fit, the nearest first:\n    --x 1: 2 MiB\n    or fewer a")
    assert named.smallest_bytes == caught.value.smallest_bytes and caught.value.with_nearest([]) is caught.value


def test_what_is_much_less_than_is_missing_is_no_remedy():
    items = [Item("a", 40 * MIB, Tier.HOST, remedy="fewer a"), Item("b", 90 * MIB, Tier.HOST)]
    with pytest.raises(PlanRefused, match="fewer a"):
        make_plan(Needs.of(*items), Limits(50 * MIB))
    with pytest.raises(PlanRefused, match="the smallest that works.$"):
        make_plan(Needs.of(*items), Limits(50 * MIB - 1))


def test_recorded_plans():
    """What another planner, with a field and a branch for each of these needs, made of random ones: the same to the byte."""
    for number, record in enumerate(json.loads(Path(__file__).with_name("recorded_plans.json").read_text())):
        limits, found = Limits(*record["limits"]), record["found"]
        needs = recorded_needs(Counter(record["sizes"]), *record["wishes"], limits.device_bytes is not None)
        try:
            plan = make_plan(needs, limits)
        except PlanRefused as refused:
            assert refused.smallest_bytes == found.get("smallest"), number
            assert f"{found['flag']}-memory to" in str(refused), number
            continue
        pools = (HOST_BLOCKS, DEVICE_BLOCKS, HOST_HEAD, DEVICE_HEAD, ACTIVATIONS, STATE, VARIANTS)
        device_blocks = plan.slots.get(DEVICE_BLOCKS)
        assert found == {
            "peaks": [plan.host_peak_bytes, plan.device_peak_bytes],
            "slabs": [plan.host_slab_bytes, plan.device_slab_bytes],
            "arena": plan.arena_bytes,
            "lookahead": plan.slots[HOST_BLOCKS].lookahead,
            "resident": [len(slots.resident) if slots else 0 for slots in (plan.slots[HOST_BLOCKS], device_blocks)],
            "kept_pieces": plan.slots[STATE].kept if STATE in plan.slots else 0,
            "slots": [plan.count(pool) for pool in pools],
        }, number


def recorded_needs(
    sizes: Counter, resident_blocks: int | None, lookahead: int | None, activations: str, on_device: bool
) -> Needs:
    streamed = Streamed(sizes["block_bytes"], sizes["head_chunk_bytes"], sizes["head_chunks"])
    needs = Needs.of(
        *(Item(name, sizes[f"{name}_bytes"], Tier.HOST) for name in ("baseline", "code", "saving", "host_libraries")),
        *(Item(name, sizes[f"{name}_bytes"], Tier.COMPUTE) for name in ("state", "edge", "step", "folding")),
        Item("staging and margin", STAGING_BYTES + 40 * MIB, Tier.HOST),
        Item("device_libraries", sizes["device_libraries_bytes"], Tier.DEVICE),
        Item(VISIT, sizes["temporaries_bytes"], Tier.COMPUTE, Lasts.MOMENT),
    )
    needs += stream_needs(streamed, on_device, resident_blocks, lookahead)
    needs += block_input_needs(sizes["boundary_bytes"], sizes["boundary_total_bytes"], activations)
    if sizes["state_slot_bytes"]:
        needs += state_needs(sizes["state_slot_bytes"], sizes["state_pieces"], sizes["waiting_state_slots"])
    if sizes["update_image_bytes"]:
        needs += update_needs(sizes["update_image_bytes"], sizes["update_gradients_bytes"])
    if sizes["variant_bytes"]:
        needs += variant_needs(sizes["variant_bytes"], sizes["head_variant_bytes"])
    return needs


def waiting(lanes: int, place: str = "auto", shares_head: bool = False) -> Needs:
    size = LaneSize(2 * MIB, 7 * MIB, 6 * MIB, 30 * MIB, 15 * MIB)
    needs = needs_of(replace(SIZES, boundary_total_bytes=lanes * 10 * MIB))
    return needs + waiting_needs(size, lanes, 0, place, shares_head)


def smallest_of(needs: Needs) -> int:
    with pytest.raises(PlanRefused) as caught:
        make_plan(needs, Limits(1))
    return caught.value.smallest_bytes


@pytest.mark.parametrize("shares_head", [False, True])
def test_a_batch_of_any_size_fits(shares_head):
    """The least does not grow with it, and what fits in memory stays there."""
    least = smallest_of(waiting(64, shares_head=shares_head))
    assert smallest_of(waiting(10_000, shares_head=shares_head)) == least
    assert smallest_of(waiting(64, "host")) == least + 64 * 7 * MIB - 6 * MIB - 4 * 2 * MIB
    fits = smallest_of(waiting(64, "host"))
    plan = make_plan(waiting(64, shares_head=shares_head), Limits(fits))
    assert plan == make_plan(waiting(64, "host"), Limits(fits)) or not plan.count(HIDDEN_STATES)
    below = make_plan(waiting(64, shares_head=shares_head), Limits(fits - 1))
    assert below.count(HIDDEN_STATES) and below.count(ACTIVATIONS) and below.disk_parts["hidden states"]
    assert bool(below.count(LANES_NEAR)) == shares_head and not plan.count(LANES_NEAR)
