"""Tiers of experts: thousands of small units, each one's layout made when it is fetched, the least useful evicted first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune.memory.expert_use import ExpertUse
from finetune.memory.slots import Lease, SlotPool
from finetune.offload.devices import Device
from finetune.offload.residency.pieces import State
from finetune.offload.residency.tiers import DeviceTier, HostTier, Tier
from finetune.offload.weights.layout import BlockLayout, Read


class ExpertUnits:
    """The experts of some stacks in one row of numbers. sizes: stack -> experts."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self.first: dict[int, int] = {}
        self._stacks: list[int] = []
        for stack, size in sizes.items():
            self.first[stack] = len(self._stacks)
            self._stacks += [stack] * size

    def __len__(self) -> int:
        return len(self._stacks)

    def unit(self, stack: int, expert: int) -> int:
        return self.first[stack] + expert

    def place(self, unit: int) -> tuple[int, int]:
        """(stack, expert)"""
        stack = self._stacks[unit]
        return stack, unit - self.first[stack]


class _LeastUseful(Tier):
    """Evicts what is likely wanted last, see `finetune.memory.expert_use`."""

    units: ExpertUnits
    use: ExpertUse

    def _rank_by(self, units: ExpertUnits, use: ExpertUse) -> None:
        self.units, self.use = units, use
        self._in_stack: dict[int, set[int]] = {}
        self._ranked: dict[int, list[int]] = {}
        """Per stack, held units, the most useful first; none where that is not known any more."""

    def used(self, stack: int) -> None:
        """The use of a stack's experts has changed."""
        self._ranked.pop(stack, None)

    def _fetch(self, block: int) -> None:
        super()._fetch(block)
        stack = self.units.place(block)[0]
        self._in_stack.setdefault(stack, set()).add(block)
        self._ranked.pop(stack, None)

    def _evict(self, block: int) -> None:
        super()._evict(block)
        self._in_stack[self.units.place(block)[0]].discard(block)

    def _least_wanted(self, sooner: set[int]) -> int | None:
        wanted, last, chosen = {*self._upcoming}, -1.0, None
        for stack in self._in_stack:
            unit = self._least_in(stack, wanted)
            if unit is not None and (wait := self.use.wait(*self.units.place(unit))) > last:
                last, chosen = wait, unit
        return super()._least_wanted(sooner) if chosen is None else chosen

    def _least_in(self, stack: int, wanted: set[int]) -> int | None:
        ranked = self._ranked.get(stack)
        if ranked is None:
            first = self.units.first[stack]
            ranked = sorted(self._in_stack[stack], key=lambda unit: -self.use.count(stack, unit - first))
            self._ranked[stack] = ranked
        while ranked and ranked[-1] not in self._held:
            ranked.pop()
        for unit in reversed(ranked):
            if unit not in wanted and unit in self._held and self._pieces[unit].state is State.READY:
                return unit
        return None


class HostExperts(_LeastUseful, HostTier):
    """Disk to host slots. layout_of: how a unit lies in a slot, for (stack, expert)."""

    def __init__(
        self,
        units: ExpertUnits,
        use: ExpertUse,
        layout_of: Callable[[int, int], BlockLayout],
        io: Any,
        pool: SlotPool,
        lookahead: int,
    ) -> None:
        self._rank_by(units, use)
        self._layout_of = layout_of
        self._layouts: dict[int, BlockLayout]
        super().__init__(range(len(units)), io, pool, frozenset(), lookahead)

    def layout(self, block: int) -> BlockLayout:
        if block not in self._layouts:
            self._layouts[block] = self._layout_of(*self.units.place(block))
        return self._layouts[block]

    def move_to(self, layouts: Sequence[int]) -> None:
        """Layouts are made when they are asked for."""
        for file in self._files.values():
            self._io.close_file(file)
        self._files = {}
        self._layouts = {}
        self.layouts = layouts

    def _extents(self, block: int, lease: Lease) -> Sequence[Any]:
        return self._extents_of(block, self.layout(block).reads, lease)

    def _extents_of(self, block: int, reads: Sequence[Read], lease: Lease) -> Sequence[Any]:
        if (num_bytes := self.layout(block).num_bytes) > self.pool.slot_bytes:
            raise RuntimeError(f"{self._pieces[block].name}: {num_bytes} bytes for a slot of {self.pool.slot_bytes}")
        return [(self._file(r.path), r.file_offset, r.num_bytes, lease.address + r.slot_offset) for r in reads]

    def _evict(self, block: int) -> None:
        super()._evict(block)
        self._layouts.pop(block, None)


class DeviceExperts(_LeastUseful, DeviceTier):
    """Host slots to device slots."""

    def __init__(self, host: HostExperts, device: Device, pool: SlotPool, lookahead: int) -> None:
        self._rank_by(host.units, host.use)
        super().__init__(host, device, pool, frozenset(), lookahead)

    def _evict(self, block: int) -> None:
        super()._evict(block)
        self._alignments.pop(block, None)

    def used(self, stack: int) -> None:
        super().used(stack)
        self._host.used(stack)
