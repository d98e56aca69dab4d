"""Experts of an open model: tiers of their matrices, and what is fetched ahead.

[Note: experts ahead]
Before the router of a block has spoken, experts are fetched that nearly every visit has wanted; in a step's backward pass those
that its forward pass has wanted. A wrong guess costs time only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from memory.expert_use import ExpertUse
from memory.plan import Slots
from offload.residency.expert_tiers import DeviceExperts, ExpertUnits, HostExperts
from offload.sizing.needs import ExpertSize, expert_sizes
from offload.weights.experts import ExpertStack
from offload.weights.layout import BlockLayout, layout_block

if TYPE_CHECKING:
    from offload.weights.streamed_parts import Room

MOST_AHEAD = 24
"""Experts that are on their way at once: enough for any disk."""


class StreamedExperts:
    """Brings the matrices of all stacks near, as `offload.weights.experts.NearExperts`."""

    def __init__(self, room: Room) -> None:
        self._experts = experts = room.parts.experts
        self._use = ExpertUse([matrices.stack.block for matrices in experts])
        self._of_block: dict[int, list[int]] = {}
        for matrices in experts:
            self._of_block.setdefault(matrices.stack.block, []).append(matrices.number)
            matrices.near = self
        self._chosen: list[dict[int, None]] = [{} for _ in experts]
        """By all lanes of the last visit, in the order in which they were wanted."""
        self._visited: set[int] = set()
        """Stacks that the visit under way has asked for."""
        self.tiers = [self._open_tier(room, size) for size in expert_sizes(experts)]
        self._tier_of = {stack: tier for tier in self.tiers for stack in tier.units.first}

    def _open_tier(self, room: Room, size: ExpertSize) -> HostExperts | DeviceExperts:
        stacks = {number: self._experts[number].stack for number in size.stacks}
        units = ExpertUnits({number: stack.weight.shape[0] for number, stack in stacks.items()})
        slots = room.plan.slots[size.pools[0]]
        host = HostExperts(units, self._use, partial(_layout, stacks), room.io, slots.carve_from(room.host), _ahead(slots))
        if room.device.shares_host_memory:
            return host
        slots = room.plan.slots[size.pools[1]]
        return DeviceExperts(host, room.device, slots.carve_from(room.computing), _ahead(slots))

    def begin(self, order: Sequence[int]) -> None:
        """The visits of blocks to come."""
        self._use.begin(order)

    def visit(self, block: int) -> None:
        """The visit of a block begins."""
        wanted = self._guess(block)
        self._use.visit(block)
        self._visited.clear()
        if wanted:
            self._fetch(wanted)

    def expect(self, stack: int, experts: Sequence[int], backward: bool) -> None:
        chosen, is_new = self._chosen[stack], stack not in self._visited
        if is_new:
            self._visited.add(stack)
            chosen.clear()
        self._use.used(stack, [expert for expert in experts if expert not in chosen], is_new)
        self._tier_of[stack].used(stack)
        chosen.update(dict.fromkeys(experts))
        siblings = self._of_block[self._experts[stack].stack.block]
        place = siblings.index(stack)
        following = siblings[:place][::-1] if backward else siblings[place + 1 :]
        wanted = [(one, experts) for one in (stack, *following)]
        if (block := self._use.next_block) is not None:
            wanted += self._guess(block)
        self._fetch(wanted)

    def acquire(self, stack: int, expert: int) -> dict[str, Tensor]:
        tier = self._tier_of[stack]
        unit = tier.units.unit(stack, expert)
        tier.acquire(unit)
        return tier.views(unit)

    def release(self, stack: int, expert: int) -> None:
        tier = self._tier_of[stack]
        tier.release(tier.units.unit(stack, expert))

    def close(self) -> None:
        for matrices in self._experts:
            matrices.near = None
        for tier in self.tiers:
            tier.close()

    def _guess(self, block: int) -> list[tuple[int, Iterable[int]]]:
        """See [Note: experts ahead]; of stacks with slots to spare."""
        known = self._use.goes_back(block)
        stacks = [stack for stack in self._of_block.get(block, ()) if self._tier_of[stack].lookahead]
        return [(stack, self._chosen[stack] if known else self._use.likely(stack)) for stack in stacks]

    def _fetch(self, wanted: Sequence[tuple[int, Iterable[int]]]) -> None:
        """wanted: stacks, and which of their experts, in the order in which they will be."""
        for tier in self.tiers:
            mine = (pair for pair in wanted if self._tier_of[pair[0]] is tier)
            tier.begin(list(dict.fromkeys(tier.units.unit(stack, expert) for stack, experts in mine for expert in experts)))


def _ahead(slots: Slots) -> int:
    return min(slots.count - slots.pool.busy, MOST_AHEAD)


def _layout(stacks: Mapping[int, ExpertStack], stack: int, expert: int) -> BlockLayout:
    return layout_block({"": stacks[stack].matrix(expert)})
