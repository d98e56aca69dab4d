"""Slots: fixed pieces of one slab, lent out by leases.

A tier allocates one slab at start-up and carves it into pools, one per size class; after that the step loop allocates
nothing from the tier. A lease has one owner and ends in exactly one release.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from finetune.memory.units import round_up


@dataclass(slots=True)
class Lease:
    """The right to use one slot until `release`. `buffer` is the slot's bytes: uint8 [slot_bytes]."""

    pool: SlotPool  # that lends the slot
    index: int  # of the slot in its pool
    buffer: torch.Tensor
    released: bool = False  # whether it was given back: then the buffer is another's

    @property
    def address(self) -> int:
        return self.buffer.data_ptr()

    def release(self) -> None:
        if self.released:
            raise RuntimeError(f"slot {self.index} of pool {self.pool.name!r} was released twice")
        self.released = True
        self.pool._free.append(self.index)


@dataclass(slots=True)
class SlotPool:
    """Equal slots in one piece of a slab. The slab's owner frees the memory; the pool only lends it."""

    name: str  # for messages
    buffer: torch.Tensor  # uint8 [count * slot_bytes]
    slot_bytes: int  # of one slot
    count: int  # of slots
    _free: list[int] = field(init=False)  # slots that are not lent

    def __post_init__(self) -> None:
        self._free = list(range(self.count))[::-1]

    @property
    def free_count(self) -> int:
        return len(self._free)

    def lease(self) -> Lease:
        """Raises RuntimeError when every slot is lent: the caller's schedule must not ask for more than it planned."""
        if not self._free:
            raise RuntimeError(f"pool {self.name!r}: all {self.count} slots of {self.slot_bytes} bytes are lent")
        index = self._free.pop()
        return Lease(self, index, self.buffer[index * self.slot_bytes : (index + 1) * self.slot_bytes])


class Slab:
    """One allocation of a tier, carved once, front to back, in whole pages."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer  # uint8 [num_bytes], page-aligned
        self._used_bytes = 0

    def carve(self, name: str, slot_bytes: int, count: int) -> SlotPool:
        """A pool of `count` slots, each `slot_bytes` rounded up to whole pages."""
        slot_bytes = round_up(slot_bytes)
        start, end = self._used_bytes, self._used_bytes + slot_bytes * count
        if end > self.buffer.numel():
            raise RuntimeError(
                f"slab of {self.buffer.numel()} bytes cannot hold pool {name!r} of {count} x {slot_bytes} bytes "
                f"after {start} bytes used"
            )
        self._used_bytes = end
        return SlotPool(name, self.buffer[start:end], slot_bytes, count)
