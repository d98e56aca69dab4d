"""The plan: what lives where, how many slots, what it will cost. Made before any weight is read; refused if it cannot hold.

It begins with the least that a run can go on with, and takes one step after the other in the order of their worth
(`memory/needs.py`), each only if it fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from finetune.memory.errors import UserError
from finetune.memory.fetch_policy import spread_evenly
from finetune.memory.needs import Item, Lasts, Needs, Pool, Step, Tier
from finetune.memory.slots import Slab, SlotPool
from finetune.memory.units import MIB, format_bytes, format_mib, round_up

SPREAD_BYTES = 4 * MIB  # by which the size of the process itself differs from one start to the next
MOMENTS_FACTOR = 1.15  # fragmentation, and what kernels allocate inside
REMEDY_BYTES = 32 * MIB  # of items that take less, fewer would not help
REMEDY_SHARE = 0.5  # of what is missing: nor of these, even if a visit takes as much again for them


class PlanRefused(UserError):
    """No plan fits the budget. `smallest_bytes`: the smallest budget of that tier that would, in this process. `key`: that of
    the budget. `remedies`: what the user can do, in words, a larger budget first; the last ones of the message."""

    def __init__(
        self, message: str, smallest_bytes: int, remedies: Sequence[str] = (), key: str = "host_memory"
    ) -> None:
        super().__init__(message + (f"\n  To make it fit: {'; or '.join(remedies)}." if remedies else ""))
        self.smallest_bytes = smallest_bytes
        self.key = key
        self.remedies = remedies
        self.message = message

    def noting(self, words: str) -> PlanRefused:
        """The same refusal, which says that too."""
        return PlanRefused(f"{self.message}\n  {words}", self.smallest_bytes, self.remedies, self.key)

    def with_nearest(self, plans: Sequence[str]) -> PlanRefused:
        """The same refusal, which names plans that fit, the nearest first."""
        if not plans:
            return self
        others = [f"or {remedy}" for remedy in self.remedies[1:]]
        lines = "".join(f"\n    {words}" for words in (*plans, *others))
        return PlanRefused(f"{self.message}\n  These fit, the nearest first:{lines}", self.smallest_bytes, (), self.key)


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets in bytes."""

    host_bytes: int  # of the whole process
    device_bytes: int | None = None  # None: the device computes in host memory


@dataclass(frozen=True, slots=True)
class Slots:
    """What a pool is given."""

    pool: Pool  # that asked
    ring: int  # slots that units pass through
    kept: int  # units that stay, each in a slot of its own

    @property
    def count(self) -> int:
        wanted = self.ring + self.kept
        return wanted if self.pool.most is None else min(wanted, self.pool.most)

    @property
    def slot_bytes(self) -> int:
        """Of one, whole pages."""
        return round_up(self.pool.slot_bytes)

    @property
    def num_bytes(self) -> int:
        return self.count * self.slot_bytes

    @property
    def lookahead(self) -> int:
        """Units that are read before they are used."""
        return self.ring - self.pool.busy

    @property
    def resident(self) -> frozenset[int]:
        """Indices of the kept units, evenly spaced."""
        return spread_evenly(self.pool.most_kept, self.kept) if self.kept else frozenset()

    @property
    def label(self) -> str:
        return self.pool.label.format(slots=self.count, size=format_bytes(self.slot_bytes))

    def carve_from(self, slab: Slab) -> SlotPool:
        return slab.carve(self.pool.name, self.slot_bytes, self.count)

    def after(self, step: Step) -> Slots:
        """With what a step of the planner changes."""
        name = self.pool.name
        more = min(step.kept.get(name, 0), self.pool.most_kept - self.kept)
        return replace(self, ring=step.rings.get(name, self.ring), kept=self.kept + more)


@dataclass(frozen=True, slots=True)
class Plan:
    """Frozen result of the planner; the engine allocates exactly this."""

    slots: Mapping[str, Slots]  # by the names of their pools
    host_parts: Mapping[str, int]  # what the user reads -> bytes, of the whole process
    device_parts: Mapping[str, int]  # of the device, where it has memory of its own
    disk_parts: Mapping[str, int]  # that the run writes, at most
    arena_bytes: int  # for torch's tensors in host memory; 0: the device has them
    host_budget_bytes: int  # for the whole process
    device_budget_bytes: int | None  # None: the device computes in host memory

    def count(self, pool: str) -> int:
        """Slots of a pool, which need not be there."""
        return self.slots[pool].count if pool in self.slots else 0

    @property
    def host_slab_bytes(self) -> int:
        """Of all slots in host memory; beside an accelerator, of those that it copies from."""
        on_device = self.device_budget_bytes is not None
        return sum(s.num_bytes for s in self._slots_in(Tier.HOST) if s.pool.pinned or not on_device)

    @property
    def device_slab_bytes(self) -> int:
        return sum(slots.num_bytes for slots in self._slots_in(Tier.DEVICE))

    @property
    def host_peak_bytes(self) -> int:
        """Predicted peak of the process, interpreter and libraries included."""
        return sum(self.host_parts.values())

    @property
    def device_peak_bytes(self) -> int:
        return sum(self.device_parts.values())

    def _slots_in(self, tier: Tier) -> list[Slots]:
        computing = Tier.HOST if self.device_budget_bytes is None else Tier.DEVICE
        carved = (slots for slots in self.slots.values() if slots.pool.carved)
        return [s for s in carved if (computing if s.pool.tier is Tier.COMPUTE else s.pool.tier) is tier]


def make_plan(needs: Needs, limits: Limits) -> Plan:
    """The best plan within `limits`. Raises PlanRefused, which says what needs how much and what would work."""
    costly = {item.with_pool for item in needs.items if item.tier is not Tier.DISK}  # whose slots are not all that they take
    optional = [pool.name for pool in needs.pools if pool.optional and pool.name in costly]
    choices = [{}, *(dict(zip(optional, chosen, strict=True)) for chosen in product((False, True), repeat=len(optional)))]
    least = [_plan_with([_least(pool, needs.items, chosen) for pool in needs.pools], needs, limits) for chosen in choices]
    fitting = (plan for plan in least if _fits(plan, limits))
    plan = next(fitting, None) or min(least, key=lambda plan: plan.host_peak_bytes + plan.device_peak_bytes)
    _refuse_what_does_not_fit(plan, needs.merged().items, limits)
    for step in sorted(needs.steps, key=lambda step: step.worth):
        if plan.count(step.without_pool) or step.with_pool and not plan.count(step.with_pool):
            continue
        candidate = _plan_with([slots.after(step) for slots in plan.slots.values()], needs, limits)
        if _fits(candidate, limits):
            plan = candidate
    return plan


def _least(pool: Pool, items: Iterable[Item], chosen: Mapping[str, bool]) -> Slots:
    """chosen: whether optional pools have slots; others of them do where the items that they stand for take much more."""
    replaced_bytes = sum(item.num_bytes for item in items if item.without_pool == pool.name)
    needless = pool.optional and replaced_bytes <= (pool.ring + 1) * pool.slot_bytes
    if pool.name in chosen:
        needless = not chosen[pool.name]
    return Slots(pool, 0 if needless else pool.ring, pool.kept)


def _plan_with(all_slots: list[Slots], needs: Needs, limits: Limits) -> Plan:
    """Fills in the sums; everything that the arena holds counts where compute happens."""
    on_device = limits.device_bytes is not None
    named = {slots.pool.name: slots for slots in all_slots if on_device or slots.pool.tier is not Tier.DEVICE}
    there = {name for name, slots in named.items() if slots.count}
    parts: dict[Tier, dict[str, int]] = {tier: {} for tier in Tier}
    for item in needs.there(there):
        factor = MOMENTS_FACTOR if item.lasts is Lasts.MOMENT else 1
        _add(parts[item.tier], item.name, int(item.num_bytes * factor))
    for slots in named.values():
        if not slots.pool.carved:
            _add(parts[slots.pool.tier], slots.label, slots.num_bytes)
    if not on_device:  # whose allocator has a place of their own for small tensors
        _let_replace(parts[Tier.COMPUTE], needs.there(there), named.values())
    arena_bytes = 0 if on_device else round_up(sum(parts[Tier.COMPUTE].values()), 2 * MIB)
    for slots in named.values():
        if slots.pool.carved:
            _add(parts[slots.pool.tier], slots.label, slots.num_bytes)
    computing = parts[Tier.COMPUTE]
    return Plan(
        slots=named,
        host_parts=parts[Tier.HOST] | ({} if on_device else computing),
        device_parts=computing | parts[Tier.DEVICE] if on_device else {},
        disk_parts=parts[Tier.DISK],
        arena_bytes=arena_bytes,
        host_budget_bytes=limits.host_bytes,
        device_budget_bytes=limits.device_bytes,
    )


def _let_replace(parts: dict[str, int], items: Sequence[Item], all_slots: Iterable[Slots]) -> None:
    """Takes from what comes with backward the bytes that it finds where others were before.

    What goes and what comes are straight lines over the blocks that are done, but for pools that empty earlier. So the most is
    there when the first block is done or when the last one is, and what goes with a block goes after its gradients have come.
    """
    for rising in (item for item in items if item.lasts is Lasts.RISING and item.num_bytes):
        kept_bytes = sum(item.num_bytes for item in items if item.lasts is Lasts.FALLING)
        pools = [slots for slots in all_slots if slots.pool.falling and slots.count]
        going = kept_bytes + sum(slots.num_bytes for slots in pools)
        left = -(-kept_bytes // rising.parts) + sum(slots.slot_bytes for slots in pools)  # when the last block's come
        parts[rising.name] = max(-(-rising.num_bytes // rising.parts), left + rising.num_bytes - going)


def _add(parts: dict[str, int], name: str, num_bytes: int) -> None:
    if num_bytes:
        parts[name] = parts.get(name, 0) + num_bytes


def _fits(plan: Plan, limits: Limits) -> bool:
    return plan.host_peak_bytes <= limits.host_bytes and (
        limits.device_bytes is None or plan.device_peak_bytes <= limits.device_bytes
    )


def _refuse_what_does_not_fit(plan: Plan, items: Iterable[Item], limits: Limits) -> None:
    tiers = [("host", plan.host_parts, limits.host_bytes, SPREAD_BYTES)]
    if limits.device_bytes is not None:
        tiers.append(("device", plan.device_parts, limits.device_bytes, 0))
    for tier, parts, budget, spread in tiers:
        need, flag = sum(parts.values()), f"--{tier}-memory"
        if need > budget:
            lines = "\n".join(f"    {size / MIB:>8.1f} MiB  {name}" for name, size in parts.items())
            least = max(REMEDY_BYTES, REMEDY_SHARE * (need - budget))
            remedies = [item.remedy for item in items if item.remedy and item.num_bytes >= least]
            raise PlanRefused(
                f"the run needs at least {format_mib(need)} of {tier} memory, {flag} allows {budget // MIB} MiB:\n{lines}",
                need,
                (f"raise {flag} to {-(-(need + spread) // MIB)}MiB, the smallest that works", *dict.fromkeys(remedies)),
                f"{tier}_memory",
            )
