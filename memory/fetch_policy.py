"""Which block to fetch next, and whose slot it takes: one rule for the streamer and the simulator.

The order of visits is known (forward, then backward reversed, then the next step's forward), so the best eviction is
Belady's: give up the block whose next use is farthest away. `resident` blocks own their slots and are read once.
"""

from __future__ import annotations

from collections.abc import Sequence


def spread_evenly(num_blocks: int, resident_blocks: int) -> frozenset[int]:
    """`resident_blocks` of `num_blocks`, evenly spaced, so that reads hide behind the blocks that need none."""
    if resident_blocks >= num_blocks:
        return frozenset(range(num_blocks))
    return frozenset((2 * i + 1) * num_blocks // (2 * resident_blocks) for i in range(resident_blocks))


def next_fetch(upcoming: Sequence[int], held: set[int], resident: frozenset[int], lookahead: int) -> int | None:
    """The first block in the next `lookahead` + 1 streamed visits of `upcoming` that no slot holds; None if all are held.

    upcoming: block indices in visiting order, the visit under way (or about to start) first.
    held: blocks in a slot or on their way into one.
    """
    distinct: set[int] = set()
    for block in upcoming:
        if block in resident:
            if block not in held:  # a resident block's first read
                return block
            continue
        distinct.add(block)
        if len(distinct) > lookahead + 1:
            return None
        if block not in held:
            return block
    return None


def victim(upcoming: Sequence[int], candidates: set[int]) -> int:
    """The candidate whose next use in `upcoming` is farthest away (one never used again comes first)."""
    remaining = set(candidates)
    last = -1
    for block in upcoming:
        if block in remaining:
            remaining.discard(block)
            last = block
            if not remaining:
                return last
    return min(remaining)
