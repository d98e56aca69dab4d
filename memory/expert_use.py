"""Which expert gives its slot away: the one that is likely wanted last.

Blocks are visited in an order that is known, so for whole blocks the best choice is known (`memory/fetch_policy.py`). Which
experts a visit wants, only its router knows. What was wanted so far says how likely each is: with probability p at every visit,
an expert waits for 1 / p - 1 more visits of its block than the next one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

LIKELY = 0.8
"""Of visits: who was wanted so often is fetched before the router has spoken."""


class ExpertUse:
    """Of the experts of stacks: (stack, expert). blocks: of each stack, the block that it is in."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._blocks = blocks
        self._with_experts = frozenset(blocks)
        self._counts: list[dict[int, int]] = [{} for _ in blocks]
        self._visits = [0] * len(blocks)
        self._places: dict[int, list[int]] = {}
        self._order: Sequence[int] = ()
        self._at = -1
        self._is_over = False
        self._met: dict[int, int] = {}

    def begin(self, order: Sequence[int]) -> None:
        """order: blocks as they will be visited."""
        self._order, self._at, self._places, self._met = order, -1, {}, {}
        for place, block in enumerate(order):
            self._places.setdefault(block, []).append(place)

    def visit(self, block: int) -> None:
        """The visit of a block begins."""
        self._at, self._is_over = self._next(block, self._at + 1), False
        self._met[block] = self._met.get(block, 0) + 1

    def end(self) -> None:
        """What the visit under way still wants of experts is announced. Others of its block wait for the next visit."""
        self._is_over = True

    def is_backward(self, block: int) -> bool:
        """Whether the last visit of the block was that of a backward pass."""
        return self._met.get(block) == 2 and len(self._places.get(block, ())) > 2

    def goes_back(self, block: int) -> bool:
        """Whether the next visit of the block is that of the backward pass, which wants the experts of the forward one. A step
        with gradients announces three passes: forward, backward and the next step's forward."""
        return self._met.get(block) == 1 and len(self._places.get(block, ())) > 2

    @property
    def next_block(self) -> int | None:
        """That is visited after this one and has experts."""
        coming = (self._order[at] for at in range(self._at + 1, len(self._order)))
        return next((block for block in coming if block in self._with_experts), None)

    def used(self, stack: int, experts: Iterable[int], is_new: bool) -> None:
        """A visit has wanted these, and not before. is_new: whether it is another visit than that of the last call."""
        counts = self._counts[stack]
        self._visits[stack] += is_new
        for expert in experts:
            counts[expert] = counts.get(expert, 0) + 1

    def likely(self, stack: int) -> list[int]:
        """Experts that nearly every visit has wanted, in ascending order; none as long as visits were few."""
        least = LIKELY * (self._visits[stack] + 1)
        return sorted(expert for expert, count in self._counts[stack].items() if count >= least)

    def count(self, stack: int, expert: int) -> int:
        """Visits that have wanted it."""
        return self._counts[stack].get(expert, 0)

    def wait(self, stack: int, expert: int) -> float:
        """Visits of blocks until it is wanted next, as expected: 0 for those of the block under way that are always wanted."""
        until = self._next(self._blocks[stack], self._at + self._is_over) - self._at
        often = (self._counts[stack].get(expert, 0) + 1) / (self._visits[stack] + 1)
        return until + len(self._places) * (1 / often - 1)

    def _next(self, block: int, at: int) -> int:
        places = self._places.get(block, ())
        found = bisect_left(places, at)
        return places[found] if found < len(places) else len(self._order)
