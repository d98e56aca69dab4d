"""Predicted time of a step: the streamer's own fetch rule on a clock instead of a disk.

Two servers run beside each other, the disk (fetches in order) and compute (visits in order). A visit starts when its
block has arrived and the previous visit is over; a fetch starts when the disk is free and a slot can be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memory.fetch_policy import next_fetch, victim


@dataclass(frozen=True, slots=True)
class StepTime:
    """Of one step in the steady state."""

    seconds: float  # from one step's begin to the next one's
    stall_seconds: float  # that compute waits for a fetch
    read_bytes: int  # of blocks, from disk


def simulate_step(
    block_bytes: Sequence[int],
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float] | None,
    between_seconds: float,
    read_bytes_per_second: float,
    resident: frozenset[int],
    lookahead: int,
) -> StepTime:
    """One step after a warm-up step: forward 0..n-1, `between_seconds` for the head, and backward n-1..0.

    block_bytes, forward_seconds, backward_seconds: per block; backward None: a step of forward passes only.
    Slots: the resident blocks' and `lookahead` + 1.
    """
    num_blocks = len(block_bytes)
    forward = list(range(num_blocks))
    step = [(block, forward_seconds[block]) for block in forward]
    if backward_seconds is not None:
        step += [(block, backward_seconds[block]) for block in reversed(forward)]
    visits = step + step
    order = [block for block, _ in visits] + forward
    slots = len(resident) + min(lookahead + 1, num_blocks - len(resident))
    arrival: dict[int, float] = {}  # blocks in slots -> when they are there
    compute_free = disk_free = 0.0
    stall = read = 0.0
    start_of_step = 0.0

    def fetch_ahead(position: int, now: float, in_use: int | None) -> None:
        nonlocal disk_free, read
        upcoming = order[position:]
        while (block := next_fetch(upcoming, set(arrival), resident, lookahead)) is not None:
            if len(arrival) >= slots:
                soon = set(upcoming[: upcoming.index(block)])
                candidates = {b for b in arrival if b not in resident and b != in_use and b not in soon}
                if not candidates:
                    return
                del arrival[victim(upcoming, candidates)]
            disk_free = max(disk_free, now) + block_bytes[block] / read_bytes_per_second
            arrival[block] = disk_free
            read += block_bytes[block]

    for position, (block, seconds) in enumerate(visits):
        if position == len(step):
            start_of_step, stall, read = compute_free, 0.0, 0
        if position and position % len(step) == num_blocks % len(step):
            compute_free += between_seconds
        fetch_ahead(position, compute_free, block)
        started = max(compute_free, arrival[block])
        stall += started - compute_free
        compute_free = started + seconds
        fetch_ahead(position + 1, compute_free, None)
    return StepTime(compute_free - start_of_step, stall, int(read))
