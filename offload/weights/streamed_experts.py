"""Experts of an open model: tiers of their matrices, and what is fetched ahead.

[Note: experts ahead]
Before the router of a block has spoken, experts are fetched: in a step's backward pass those that its forward pass has wanted;
where few tokens choose few experts those that the router names when it is asked ahead (`finetune.offload.weights.routers`), as
far as it was right so far (`finetune.memory.expert_guesses`); else those that nearly every visit has wanted. A wrong guess
costs time only. What a lane wants for sure is fetched before what is guessed, and as long as other lanes of the visit are to
come, whose experts may be evicted by guesses, these need slots for two blocks' experts.

[Note: order of experts]
Products of experts do not depend on one another. Those that are near come first: with fewer slots than experts that are chosen,
what a lane has left behind is used by the next one before it is evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from finetune.memory.expert_use import ExpertUse
from finetune.memory.plan import Slots
from finetune.offload.residency.expert_tiers import DeviceExperts, ExpertUnits, HostExperts
from finetune.offload.residency.tiers import Tier
from finetune.offload.sizing.needs import ExpertSize, expert_sizes
from finetune.offload.weights.experts import StackedMatrices
from finetune.offload.weights.layout import BlockLayout, layout_block
from finetune.offload.weights.routers import Routers

if TYPE_CHECKING:
    from finetune.offload.weights.streamed_parts import Room

Experts = tuple[int, Iterable[int]]
"""A stack, and some of its experts."""

MOST_AHEAD = 24
"""Experts that are on their way at once: enough for any disk."""


class StreamedExperts:
    """Brings the matrices of all stacks near, as `finetune.offload.weights.experts.NearExperts`."""

    def __init__(self, room: Room, trunks: Tier, make_tier: Callable[..., HostExperts] = HostExperts) -> None:
        """trunks: the slots of blocks, which are without their experts. make_tier: of the hosts' memory."""
        self._make_tier = make_tier
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
        self._block = -1
        """That is visited, or was last."""
        self._lanes = self._lanes_before = 0
        """That have come to the experts in the visit under way, and in the last one."""
        self._is_few = False
        """Whether few tokens choose in the visit under way."""
        self._guesses = room.guesses
        sizes = expert_sizes(experts)
        self.tiers = [self._open_tier(room, size) for size in sizes]
        self._tier_of = {stack: tier for tier in self.tiers for stack in tier.units.first}
        first = {block: experts[numbers[0]].stack for block, numbers in self._of_block.items()}
        has_spare = any(tier.lookahead for tier in self.tiers)
        self._routers = Routers(room.parts.blocks, room.parts.bindings, first if has_spare else {}, trunks)
        self._is_roomy = {
            stack: tier.pool.count >= 2 * size.block_count
            for tier, size in zip(self.tiers, sizes, strict=True)
            for stack in size.stacks
        }

    def _open_tier(self, room: Room, size: ExpertSize) -> HostExperts | DeviceExperts:
        stacks = {number: self._experts[number] for number in size.stacks}
        units = ExpertUnits({number: matrices.stack.weight.shape[0] for number, matrices in stacks.items()})
        slots = room.plan.slots[size.pools[0]]
        host = self._make_tier(units, self._use, partial(_layout, stacks), room.io, slots.carve_from(room.host), _ahead(slots))
        if room.device.shares_host_memory:
            return host
        slots = room.plan.slots[size.pools[1]]
        return DeviceExperts(host, room.device, slots.carve_from(room.computing), _ahead(slots))

    def begin(self, order: Sequence[int]) -> None:
        """The visits of blocks to come."""
        self._end_visit()
        self._guesses.begin()
        self._use.begin(order)

    def visit(self, block: int) -> None:
        """The visit of a block begins."""
        self._end_visit()
        self._block = block
        guessed = self._guess(block)
        self._use.visit(block)
        self._visited.clear()
        if guessed:
            self.fetch(guessed)

    def _end_visit(self) -> None:
        if self._is_few:
            self._guesses.compare(self._block, self._chosen[self._of_block[self._block][0]])
        if self._lanes:
            self._lanes_before = self._lanes
        self._lanes, self._is_few = 0, False

    def expect(self, stack: int, experts: Sequence[int], backward: bool) -> Sequence[int]:
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
        wanted = [(one, self._nearest_first(one, experts)) for one in (stack, *following)]
        is_first = stack == siblings[0] and not backward
        self._lanes += is_first
        more_lanes = self._lanes < self._lanes_before
        if not more_lanes and not self._use.is_backward(self._block):
            self._use.end()
        self.fetch(wanted)
        if is_first:
            self._ask_ahead()
        if (block := self._use.next_block) is not None:
            guessed = [pair for pair in self._guess(block) if self._is_roomy[pair[0]] or not more_lanes]
            if guessed:
                self.fetch(wanted + guessed)
        return wanted[0][1]

    def acquire(self, stack: int, expert: int) -> dict[str, Tensor]:
        tier = self._tier_of[stack]
        unit = tier.units.unit(stack, expert)
        tier.acquire(unit)
        return tier.views(unit)

    def release(self, stack: int, expert: int) -> None:
        tier = self._tier_of[stack]
        tier.release(tier.units.unit(stack, expert))

    def place(self, stack: int, expert: int) -> tuple[HostExperts | DeviceExperts, int]:
        """The tier that a matrix is in, and its number there."""
        tier = self._tier_of[stack]
        return tier, tier.units.unit(stack, expert)

    def fetch(self, wanted: Sequence[tuple[int, Iterable[int]]]) -> None:
        """wanted: stacks, and which of their experts are acquired next, in this order."""
        for tier in self.tiers:
            mine = (pair for pair in wanted if self._tier_of[pair[0]] is tier)
            tier.begin(list(dict.fromkeys(tier.units.unit(stack, expert) for stack, experts in mine for expert in experts)))

    def move(self) -> None:
        """From now on matrices are read where their stacks have them."""
        for tier in self.tiers:
            tier.give_up()
            tier.move_to(range(len(tier.units)))

    def close(self) -> None:
        self._routers.close()
        for matrices in self._experts:
            matrices.near = None
        for tier in self.tiers:
            tier.close()

    def _guess(self, block: int) -> list[Experts]:
        """See [Note: experts ahead]; of stacks with slots to spare."""
        stacks = [stack for stack in self._of_block.get(block, ()) if self._tier_of[stack].lookahead]
        if self._use.goes_back(block):
            return [(stack, self._chosen[stack]) for stack in stacks]
        named = self._guesses.worthwhile(block)
        found = ((stack, named or self._use.likely(stack)) for stack in stacks)
        return [(stack, experts) for stack, experts in found if experts]

    def _ask_ahead(self) -> None:
        block, following = self._block, self._use.next_block
        inputs = self._routers.take_input(block)
        self._is_few = inputs is not None
        if inputs is not None and following is not None and following > block:
            self._guesses.add(following, self._routers.ask(block, inputs, following))

    def _nearest_first(self, stack: int, experts: Sequence[int]) -> list[int]:
        """See [Note: order of experts]."""
        tier = self._tier_of[stack]
        return sorted(experts, key=lambda expert: tier.distance(tier.units.unit(stack, expert)))


def _ahead(slots: Slots) -> int:
    return min(slots.count - slots.pool.busy, MOST_AHEAD)


def _layout(stacks: Mapping[int, StackedMatrices], stack: int, expert: int) -> BlockLayout:
    return layout_block({"": stacks[stack].stack.matrix(expert)})
