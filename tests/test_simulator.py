"""Predicted steps against times that are worked out by hand, for every stream that a step has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune.memory.simulator import Ring, Speeds, StepWork, Update, simulate_step

NONE = Ring(frozenset(), 0)
ALL = Ring(frozenset(range(4)), 0)
WORK = StepWork((100,) * 4, (1.0,) * 4, (2.0,) * 4)


def seconds(work: StepWork, speeds: Speeds = Speeds(1e9), host: Ring = ALL, device: Ring | None = None) -> float:
    return simulate_step(work, speeds, host, device).seconds


def test_what_computes_adds_up():
    work = replace(WORK, begin_seconds=0.25, head_seconds=3.0, end_seconds=0.5)
    found = simulate_step(work, Speeds(1.0), ALL)
    assert found.seconds == pytest.approx(12 + 3.75) and found.stall_seconds == 0 and found.read_bytes == 0
    assert found.busy_seconds == pytest.approx({"disk": 0, "link": 0, "link back": 0, "compute": 15.75})
    assert found.slowest == "compute"
    assert sum(span.seconds for span in found.spans) == pytest.approx(found.seconds)
    assert all(0 <= span.start_seconds < found.seconds for span in found.spans)


def test_one_slot_hides_nothing():
    """Every visit waits for its block, but where the turn finds it there: the last of a pass is the first of the next."""
    found = simulate_step(WORK, Speeds(100.0), NONE)
    assert found.read_bytes == 600 and found.seconds == pytest.approx(12 + 6) and found.stall_seconds == pytest.approx(6)


def test_backward_ends_at_the_lowest_block_that_trains():
    assert seconds(replace(WORK, lowest=3)) == pytest.approx(4 + 2)
    found = simulate_step(replace(WORK, lowest=2), Speeds(100.0), NONE)
    assert found.read_bytes == 400 + 100  # blocks 0 to 3, then 2


def test_experts_are_waited_for_in_every_visit():
    found = simulate_step(replace(WORK, visit_bytes=(0, 50, 0, 0)), Speeds(100.0), ALL)
    assert found.seconds == pytest.approx(12 + 1) and found.read_bytes == 100


def test_chunks_of_the_head_are_read_ahead():
    work = replace(WORK, chunks=3, chunk_bytes=100, head_seconds=3.0)
    # The first chunk has come during the forward visits; each of the others waits for the slot.
    assert seconds(work, Speeds(200.0)) == pytest.approx(12 + 3 + 2 * 0.5)
    assert seconds(replace(work, chunk_slots=2), Speeds(200.0)) == pytest.approx(15)
    found = simulate_step(replace(work, chunk_slots=3), Speeds(1.0), ALL)
    assert found.seconds == pytest.approx(15) and found.read_bytes == 0


def test_block_inputs_go_to_disk_and_come_back():
    """One slot: a lane's input is written, 1 s, before the next lane may begin, and read again, 1 s, once the lane before it is
    done."""
    work = replace(WORK, lanes=2, input_bytes=100, input_slots=1)
    found = simulate_step(work, Speeds(100.0, 100.0), ALL)
    assert (found.read_bytes, found.write_bytes) == (800, 800)
    # 8 forward lanes of 0.5 s, each but the first begins 1 s after the one before it; 8 backward ones of 1 s after reads.
    assert found.seconds == pytest.approx((7 * 1.0 + 0.5) + (0.5 + 8 * (1.0 + 1.0)))
    wide = simulate_step(replace(work, input_slots=8), Speeds(1000.0, 1000.0), ALL)
    assert wide.seconds == pytest.approx(12 + 0.1)  # only the first input of backward is waited for


def test_updates_wait_for_their_state_and_are_written():
    update = Update(pieces=4, read_bytes=400, write_bytes=800, seconds=1.0)
    work = replace(WORK, updates={3: update}, state_buffers=4)
    fast = simulate_step(work, Speeds(1e9, 1e9), ALL)
    assert fast.seconds == pytest.approx(12 + 1) and (fast.read_bytes, fast.write_bytes) == (400, 800)
    # State is there when backward begins; 8 s of writes begin with the first piece, at 4 + 2 + 0.25 s, and end the step.
    slow = simulate_step(work, Speeds(100.0, 100.0), ALL)
    assert slow.seconds == pytest.approx(6.25 + 8.0) and slow.stall_seconds == pytest.approx(14.25 - 13)
    kept = simulate_step(replace(work, kept_pieces=4), Speeds(100.0, 100.0), ALL)
    assert (kept.read_bytes, kept.write_bytes) == (0, 800)


def test_the_ends_are_updated_before_the_blocks():
    end = Update(pieces=1, read_bytes=10, write_bytes=10, seconds=0.5)
    found = simulate_step(replace(WORK, end_update=end, updates={0: end}, state_buffers=3), Speeds(1e9), ALL)
    names = [span.name for span in found.spans if span.name.startswith("update")]
    assert names == ["update ends", "update block 0"] and found.seconds == pytest.approx(13)


@pytest.mark.parametrize("disk, link", [(1000.0, 100.0), (100.0, 1000.0), (100.0, 100.0)])
def test_the_slower_of_disk_and_link_sets_the_pace(disk, link):
    work = StepWork((100,) * 20, (0.1,) * 20, (0.2,) * 20)
    found = simulate_step(work, Speeds(disk, copy=link), Ring(frozenset(), 2), Ring(frozenset(), 1))
    moved = found.read_bytes / min(disk, link)
    assert found.read_bytes == 100 * (20 + 20 - 4)  # two slots: two blocks are there where a pass turns
    assert moved - 0.01 <= found.seconds <= moved + 2 * 100 / min(disk, link) + 1.0
    assert found.busy_seconds["link"] == pytest.approx(found.read_bytes / link)
    resident = simulate_step(work, Speeds(disk, copy=link), Ring(frozenset(range(20)), 0), Ring(frozenset(), 1))
    assert resident.read_bytes == 0


def test_a_large_model_is_simulated_in_a_moment():
    """Its pieces are taken together: 126 blocks of a thousand pieces."""
    update = Update(1000, 10**9, 10**9, 1.0)
    work = StepWork((10**9,) * 126, (1.0,) * 126, (2.0,) * 126, updates=dict.fromkeys(range(126), update), state_buffers=12)
    found = simulate_step(work, Speeds(1e9, 1e9), NONE)
    assert found.write_bytes == pytest.approx(126e9, rel=1e-6) and len(found.spans) < 20_000


def test_updates_wait_for_their_copies_beside_a_device():
    """4 blocks: 200 bytes of weights and gradients down, 1 s, an update of 0.5 s, 100 bytes up, 2 s."""
    update = Update(1, 0, 0, 0.5, to_host_bytes=200, to_device_bytes=100)
    work = replace(WORK, updates=dict.fromkeys(range(4), update))
    found = simulate_step(work, Speeds(1e9, copy=50.0, copy_back=200.0), ALL, ALL)
    assert found.seconds == pytest.approx(12 + 4 * 3.5)
    assert found.busy_seconds["link back"] == pytest.approx(4) and found.busy_seconds["link"] == pytest.approx(8)
    assert seconds(work) == pytest.approx(12 + 4 * 0.5)  # where compute is in host memory


def test_a_copy_of_what_is_there_does_not_wait_for_blocks_that_are_not():
    """Two blocks are on their way, each takes 20 s from disk and is then copied; copies of updates take 0.1 s."""
    ring = Ring(frozenset(), 2)
    work = StepWork((100,) * 8, (20.0,) * 8, (20.0,) * 8)
    updated = replace(work, updates=dict.fromkeys(range(8), Update(1, 0, 0, 0.0, to_device_bytes=10)))
    without, found = (simulate_step(one, Speeds(5.0, copy=100.0), ring, ring).seconds for one in (work, updated))
    assert without < found < without + 8 * 0.1 + 1


def test_block_inputs_cross_the_link_on_their_way_to_disk():
    work = replace(WORK, lanes=2, input_bytes=50, input_slots=8)
    found = simulate_step(work, Speeds(1e9, 1e9, copy=50.0, copy_back=100.0), ALL, ALL)
    assert found.seconds == pytest.approx(12 + 4 * 2 * (0.5 + 1.0))


def test_lanes_that_wait_on_disk_are_read_and_written_in_every_visit():
    work = replace(WORK, lanes=2, input_bytes=100, input_slots=8, waiting_bytes=100, waiting_slots=8)
    found = simulate_step(work, Speeds(1e6, 1e6), ALL)
    assert found.seconds == pytest.approx(12, abs=0.1)
    # Forward: read and written; backward: the input, and the gradient that comes and the one that goes. And before the head.
    assert (found.read_bytes, found.write_bytes) == (8 * 100 + 200 + 8 * 200, 8 * 100 + 8 * 100)
    again = simulate_step(replace(work, chunks=3, chunk_bytes=10, head_seconds=1.0, head_passes=2), Speeds(1e6, 1e6), ALL)
    assert again.read_bytes == found.read_bytes + 60 and again.seconds == pytest.approx(13, abs=0.1)
