"""What a run needs, as data: bytes that are there or not, slots of which more are better, and in which order they become more.

Whoever has a need (the streamed model, a method, a device) names it once; the planner (`memory/plan.py`) knows the tags on it
and nothing of what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum


class Tier(Enum):
    """Where bytes are. COMPUTE: where the device computes, in its own memory or, where it has none, in the host's."""

    HOST = "host"
    COMPUTE = "compute"
    DEVICE = "device"
    DISK = "disk"


class Lasts(Enum):
    """How long bytes are needed. RUN: always. STEP: while a step goes on; they depend on its batch. FALLING: of a step too; an
    equal part goes with each block that backward has done. RISING: an equal part comes with each, in the place of what goes.
    MOMENT: of items with one name, no two at the same time: the largest counts, with what the allocator loses to holes between
    them."""

    RUN = "run"
    STEP = "step"
    FALLING = "falling"
    RISING = "rising"
    MOMENT = "moment"


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes that must be there. Items with the same name in the same tier are one line of a plan."""

    name: str  # as the user reads it
    num_bytes: int  # at most
    tier: Tier
    lasts: Lasts = Lasts.RUN  # how long they are needed
    parts: int = 1  # of RISING: blocks that they come with
    with_pool: str = ""  # there only while the plan gives this pool slots
    without_pool: str = ""  # there only while it gives it none
    remedy: str = ""  # what the user can do for fewer of these bytes; for whoever reads a refusal


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal slots. `ring` of them are passed on from unit to unit; each of the `kept` units has one of its own beside."""

    name: str  # by which the engine finds it
    label: str  # as the user reads it; {slots} and {size} are filled in
    tier: Tier  # where the slots are
    slot_bytes: int  # of one slot
    ring: int = 1  # slots at least
    kept: int = 0  # units that stay from the beginning
    most_kept: int = 0  # units that could stay
    most: int | None = None  # slots that are of use; None: as many as ring and kept units ask for
    busy: int = 1  # slots of the ring that are in use, so that nothing is read ahead into them
    pinned: bool = True  # whether host memory must be such as an accelerator copies from
    optional: bool = False  # no slots from the beginning where the items that they stand for take little more
    carved: bool = True  # whether slots are pieces of a slab; else a slot is what tensors of torch's own take together
    falling: bool = False  # whether slots empty one after the other as backward goes on, but for one


class Worth(IntEnum):
    """The order in which spare memory is handed out, the best use first."""

    HIDDEN_STATES = 0  # micro-batches stay in memory between visits: else every visit of every one goes by the disk
    NEXT_BLOCK = 1  # the next block is read while one computes
    STATE_BUFFERS = 2  # the state of an optimizer moves in both directions at once
    NEXT_EXPERTS = 3  # more matrices of experts are read while one computes
    SECOND_VARIANT = 4  # both variants of a pair are made in one pass
    NEXT_CHUNK = 5  # the next chunk of the head is read while one computes
    DECODED_WEIGHTS = 6  # packed weights are decoded once a visit: for every block again, and nothing hides decoding
    BLOCK_INPUTS = 7  # what backward needs stays in memory
    LANES_NEAR = 8  # more micro-batches share a pass over the head, where they wait on disk
    BLOCKS_EXPERTS = 9  # all experts of a block stay for its visit, so that all micro-batches share them
    LATER_BLOCKS = 10  # more blocks are read ahead
    WAITING_STATE = 11  # where compute takes longer than the disk, a whole block's state waits in memory
    GRAPHS_OF_COMPUTE = 12  # where a block computes longer than it is read: nothing is recomputed
    RESIDENT_BLOCKS = 13  # blocks stay
    RESIDENT_EXPERTS = 14  # experts stay: those that are likely wanted soon
    WHOLE_HEAD = 15  # the head stays: per byte, half of what a block saves
    KEPT_STATE = 16  # pieces of an optimizer's state stay
    OTHER_GRAPHS = 17  # where reading takes longer than computing: what nothing is read for, nothing is recomputed for either


@dataclass(frozen=True, slots=True)
class Step:
    """One use of spare memory: all of it if it fits, else nothing."""

    worth: Worth  # its place in the order
    rings: Mapping[str, int] = field(default_factory=dict)  # pool -> its ring from now on
    kept: Mapping[str, int] = field(default_factory=dict)  # pool -> so many more units kept, as far as there are any
    without_pool: str = ""  # only where the plan gives this pool no slots
    with_pool: str = ""  # only where it gives this one slots


def ascent(worth: Worth, pool: str, units: int, without_pool: str = "") -> list[Step]:
    """Keeps as many of `units` as there is room for: whether 2^i more fit, the largest first."""
    return [Step(worth, kept={pool: 1 << i}, without_pool=without_pool) for i in reversed(range(units.bit_length()))]


@dataclass(frozen=True, slots=True)
class Needs:
    """All needs of a run, or some that are added to others. Lines of a plan keep the order in which needs are added."""

    items: tuple[Item, ...] = ()  # bytes that must be there
    pools: tuple[Pool, ...] = ()  # slots of which more are better
    steps: tuple[Step, ...] = ()  # uses of spare memory, by their worth

    @classmethod
    def of(cls, *needs: Item | Pool | Step) -> Needs:
        return cls(*(tuple(need for need in needs if isinstance(need, kind)) for kind in (Item, Pool, Step)))

    def __add__(self, other: Needs) -> Needs:
        return Needs(self.items + other.items, self.pools + other.pools, self.steps + other.steps)

    def bytes_of(self, name: str) -> int:
        """Of the items with this name, whatever their tier."""
        return sum(item.num_bytes for item in self.merged().items if item.name == name)

    def ring_of(self, pool: str) -> int:
        """Slots that the pool of this name has at least; 0 where there is none."""
        return next((one.ring for one in self.pools if one.name == pool), 0)

    def merged(self) -> Needs:
        """With one item in place of those with the same name, tier and conditions. Bytes that are always there beside those of
        a moment are a part of it."""
        return replace(self, items=merge(self.items, _key))

    def there(self, pools: Collection[str]) -> tuple[Item, ...]:
        """The items of a plan that gives slots to these pools, one with each name in a tier."""
        found = (item for item in self.items if item.without_pool not in pools and item.with_pool in ("", *pools))
        return merge(found, lambda item: (item.name, item.tier))

    def covering(self, other: Needs) -> Needs:
        """Of the same run, for batches of either size: what depends on them is as large as the larger."""
        ours, theirs = self.merged(), {_key(item): item for item in other.merged().items}
        sizes = {pool.name: pool.slot_bytes for pool in other.pools}
        return replace(
            ours,
            items=tuple(
                item
                if item.lasts is Lasts.RUN or _key(item) not in theirs
                else replace(item, num_bytes=max(item.num_bytes, theirs[_key(item)].num_bytes))
                for item in ours.items
            ),
            pools=tuple(replace(pool, slot_bytes=max(pool.slot_bytes, sizes.get(pool.name, 0))) for pool in ours.pools),
        )


def merge(items: Iterable[Item], key: Callable[[Item], tuple]) -> tuple[Item, ...]:
    """One item in place of those with the same key."""
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return tuple(map(_merge, groups.values()))


def _key(item: Item) -> tuple:
    return item.name, item.tier, item.with_pool, item.without_pool


def _merge(items: list[Item]) -> Item:
    moments = [item.num_bytes for item in items if item.lasts is Lasts.MOMENT]
    others = sum(item.num_bytes for item in items if item.lasts is not Lasts.MOMENT)
    # In the order of their lasting: what has a part that changes changes.
    lasts = max((item.lasts for item in items), key=list(Lasts).index)
    return replace(items[0], num_bytes=others + max(moments, default=0), lasts=lasts)
