"""A device that exists for tests and planning: a link with a set speed, and memory that shows every missing wait.

[Note: what a race becomes] On a GPU a missing wait usually gives the right numbers. Here it never does:

- From the call of `copy_async` on, `dst` is poison (bytes 0xFF: NaN in bf16, fp16, fp32 and fp8). The copied bytes land
  in a staging buffer and reach `dst` only when an event that covers the copy is waited for: `wait` publishes to the
  device, `synchronize` (or `query` that says True) to both sides.
- The source is read at the end of the simulated transfer. A host slot refilled before that delivers the refilled bytes.
- A released slot is poison. What was still on its way into it, or out of it, is lost.
- A slot taken by a new copy, while an older copy out of it is pending, keeps its bytes for the older copy only if the
  new one was ordered after it. Otherwise the older copy delivers poison.

[Note: clocks] What an event covers is a pair of counts: how many copies of each direction have happened by then. A
copy's clock is the larger of its stream's and of `after`'s, plus itself. Compute has a clock too, of what it waited
for; it runs at once on the calling thread, so `record` returns an event that is already done.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from finetune.memory.errors import UserError
from finetune.offload.devices.base import COMPLETED, Device, Direction, Event, RaceError, check_copy, map_host_bytes

_POISON = 0xFF
_START = {Direction.H2D: 0, Direction.D2H: 0}

Clock = dict[Direction, int]
Range = tuple[int, int]  # addresses, end exclusive


@dataclass(slots=True, eq=False)
class _Copy:
    direction: Direction  # which link it takes
    clock: Clock  # see [Note: clocks]
    dst: np.ndarray  # uint8 [num_bytes], a view that keeps its memory alive; so is src
    src: np.ndarray  # uint8 [num_bytes]
    kept_src: np.ndarray | None = None  # the source's bytes, when a later copy has taken its place
    staged: np.ndarray | None = None  # the result, until it is published
    error: BaseException | None = None  # that it ended in
    discarded: bool = False  # its slot was released first: nothing of it counts

    @property
    def name(self) -> str:
        return f"copy {self.clock[self.direction]} from {self.direction.value} of {self.dst.nbytes} bytes"


class _SimulatedEvent:
    __slots__ = ("clock", "device")

    def __init__(self, device: SimulatedDevice, clock: Clock) -> None:
        self.device = device
        self.clock = clock

    def query(self) -> bool:
        return self.device._try_publish(self.clock)


class SimulatedDevice(Device):
    """`total_bytes` of memory (None: as much as the host has) behind a link with `bytes_per_second` a direction.

    Each copy takes `delay_seconds` plus its bytes over the speed, or what this machine needs to copy them where that is
    more. Memory is counted for slabs only: temporaries of compute are ordinary host tensors here.
    """

    kind = "simulated"
    torch_device = torch.device("cpu")

    def __init__(
        self, bytes_per_second: float = float("inf"), delay_seconds: float = 0.0, total_bytes: int | None = None
    ) -> None:
        if not bytes_per_second > 0 or not delay_seconds >= 0 or (total_bytes is not None and total_bytes <= 0):
            raise UserError(
                "a simulated device needs a speed above 0, a delay of at least 0 and a size above 0, got "
                f"{bytes_per_second} bytes/s, {delay_seconds} s, {total_bytes} bytes"
            )
        self._bytes_per_second = bytes_per_second
        self._delay_seconds = delay_seconds
        self._total_bytes = psutil.virtual_memory().total if total_bytes is None else total_bytes
        self._allocated_bytes = 0
        self._slabs: list[torch.Tensor] = []
        self._host_slabs: list[torch.Tensor] = []
        # One lock for all that follows, and for every access to memory by a copy; a copy thread lets go of it to sleep.
        self._changed = threading.Condition()
        self._closed = False
        self._submitted: Clock = dict(_START)
        self._done: Clock = dict(_START)
        self._stream_clock: dict[Direction, Clock] = {direction: dict(_START) for direction in Direction}
        self._compute_clock: Clock = dict(_START)
        self._unpublished: list[_Copy] = []  # in order of submission
        self._failed: list[_Copy] = []
        self._readable: list[Range] = []  # of the slabs: what was copied in, published and not released since
        self._threads = [
            threading.Thread(target=self._run_stream, args=(direction,), name=f"copy-{direction.name}", daemon=True)
            for direction in Direction
        ]
        for thread in self._threads:
            thread.start()

    def allocate_slab(self, num_bytes: int) -> torch.Tensor:
        with self._changed:
            if self._allocated_bytes + num_bytes > self._total_bytes:
                raise UserError(
                    f"the simulated device did not grant {num_bytes} bytes: {self._allocated_bytes} of its "
                    f"{self._total_bytes} are taken. Lower --device-memory or simulate a larger device"
                )
            slab = map_host_bytes(num_bytes).fill_(_POISON)
            self._allocated_bytes += num_bytes
            self._slabs.append(slab)
        return slab

    def free_slab(self, slab: torch.Tensor) -> None:
        start, end = _range(slab)
        with self._changed:
            self._slabs = [kept for kept in self._slabs if kept is not slab]
            self._readable = _without(self._readable, (start, end))
            self._allocated_bytes -= end - start

    def allocate_host_slab(self, num_bytes: int) -> torch.Tensor:
        slab = super().allocate_host_slab(num_bytes)
        with self._changed:
            self._host_slabs.append(slab)
        return slab

    def copy_async(
        self, dst: torch.Tensor, src: torch.Tensor, direction: Direction, after: Event | None = None
    ) -> Event:
        check_copy(dst, src)
        host, device = (src, dst) if direction is Direction.H2D else (dst, src)
        after_clock = _START if after is None else self._clock_of(after)
        with self._changed:
            self._check_open()
            if _lies_in(host, self._slabs) or _lies_in(device, self._host_slabs):
                raise ValueError(f"a copy from {direction.value} got src or dst on the wrong side")
            clock = _later(self._stream_clock[direction], after_clock)
            clock[direction] += 1
            copy = _Copy(direction, clock, _bytes_of(dst), _bytes_of(src))
            self._take_place(copy)
            self._stream_clock[direction] = clock
            self._submitted[direction] += 1
            self._unpublished.append(copy)
            self._changed.notify_all()
        return _SimulatedEvent(self, clock)

    def record(self) -> Event:
        with self._changed:
            return _SimulatedEvent(self, dict(self._compute_clock))

    def wait(self, event: Event) -> None:
        """Blocks the calling thread, which is the device's compute."""
        self._wait(event, device_only=True)

    def synchronize(self, event: Event) -> None:
        self._wait(event, device_only=False)

    def release(self, slot: torch.Tensor) -> None:
        slot_bytes = _bytes_of(slot)
        with self._changed:
            for copy in self._unpublished:
                if _overlap(copy.dst, slot_bytes):
                    copy.discarded = True
                if copy.staged is None and _overlap(copy.src, slot_bytes):
                    copy.kept_src = None
            self._poison(slot_bytes)

    def check_readable(self, slot: torch.Tensor) -> None:
        """Padding at the end of a slot, that no copy ever fills, counts as not readable: name the part that is used."""
        wanted = _range(_bytes_of(slot))
        with self._changed:
            place = self._place(wanted)
            missing = [wanted]
            for readable in self._readable:
                missing = _without(missing, readable)
            if not missing:
                return
            pending = [copy.name for copy in self._unpublished if _intersect(_range(copy.dst), wanted)]
            raise RaceError(
                f"{place} would be read, but {sum(end - start for start, end in missing)} of its bytes are not there: "
                + (f"not waited for: {', '.join(pending)}" if pending else "never fetched, or released")
            )

    def peak_bytes(self) -> int:
        """Bytes of the slabs that a run begins with: it frees none."""
        return self._allocated_bytes

    def reset_peak(self) -> None:
        """Slabs stay, so the peak does."""

    def total_bytes(self) -> int:
        return self._total_bytes

    def close(self) -> None:
        """Copies that have not happened by now never will; waiting for them raises RuntimeError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._slabs.clear()
        self._host_slabs.clear()
        self._unpublished.clear()

    # The copy threads

    def _run_stream(self, direction: Direction) -> None:
        seconds_per_byte = 0.0  # that copying took for real, the last time: it is part of the set time, at its end
        while (copy := self._next(direction)) is not None:
            end = time.monotonic() + self._delay_seconds + copy.dst.nbytes / self._bytes_per_second
            with self._changed:
                self._sleep_until(end - copy.dst.nbytes * seconds_per_byte)
                if self._closed:
                    return
                start = time.monotonic()
                try:
                    copy.staged = self._read_source(copy)
                except BaseException as error:  # whatever it is, the thread that waits for this copy has to see it
                    copy.error = error
                    self._failed.append(copy)
                    self._unpublished.remove(copy)
                seconds_per_byte = (time.monotonic() - start) / max(copy.dst.nbytes, 1)
                self._sleep_until(end)
                copy.kept_src = None
                self._done[direction] += 1
                self._changed.notify_all()

    def _sleep_until(self, end: float) -> None:
        """Lets go of the lock, which is held; returns early when the device is closed."""
        while not self._closed and (left := end - time.monotonic()) > 0:
            self._changed.wait(left)

    def _next(self, direction: Direction) -> _Copy | None:
        """The stream's next copy once all that it comes after is done; None when the device is closed."""
        with self._changed:
            while not self._closed:
                if self._done[direction] < self._submitted[direction]:
                    number = self._done[direction] + 1
                    copy = next(
                        c for c in self._unpublished if c.direction is direction and c.clock[direction] == number
                    )
                    before = {**copy.clock, direction: number - 1}
                    if self._is_done(before):
                        return copy
                self._changed.wait()
            return None

    def _read_source(self, copy: _Copy) -> np.ndarray:
        """The source as a stream sees it: memory, and over it what earlier copies left there, published or not."""
        staged = (copy.src if copy.kept_src is None else copy.kept_src).copy()
        for earlier in self._unpublished:
            if earlier.staged is not None and not earlier.discarded and _covers(copy.clock, earlier):
                _overlay(staged, copy.src, earlier)
        return staged

    # What is in memory (the lock is held)

    def _take_place(self, copy: _Copy) -> None:
        """From now on `copy.dst` belongs to `copy`."""
        place = _range(copy.dst)
        for reader in self._unpublished:
            if reader.staged is None and reader.kept_src is None and _covers(copy.clock, reader):
                if _intersect(_range(reader.src), place):
                    reader.kept_src = reader.src.copy()
        superseded = [
            earlier
            for earlier in self._unpublished
            if earlier.staged is not None and not _without([_range(earlier.dst)], place)
        ]
        for earlier in superseded:
            self._hand_to_readers(earlier)
            self._unpublished.remove(earlier)
        self._poison(copy.dst)

    def _hand_to_readers(self, landed: _Copy) -> None:
        """What leaves the staging buffer stays visible to pending copies that kept their source before it came."""
        for reader in self._unpublished:
            if reader.kept_src is not None and not landed.discarded and _covers(reader.clock, landed):
                _overlay(reader.kept_src, reader.src, landed)

    def _poison(self, data: np.ndarray) -> None:
        data.fill(_POISON)
        self._readable = _without(self._readable, _range(data))

    # Events

    def _wait(self, event: Event, device_only: bool) -> None:
        clock = self._clock_of(event)
        with self._changed:
            while not self._is_done(clock):
                self._check_open()
                self._changed.wait()
            if device_only:
                self._compute_clock = _later(self._compute_clock, clock)
            self._publish(clock, device_only)

    def _try_publish(self, clock: Clock) -> bool:
        with self._changed:
            if not self._is_done(clock):
                return False
            self._publish(clock, device_only=False)
            return True

    def _publish(self, clock: Clock, device_only: bool) -> None:
        for copy in self._failed:
            if _covers(clock, copy):
                raise RuntimeError(f"{copy.name} failed on the simulated device: {copy.error}") from copy.error
        due = [
            copy
            for copy in self._unpublished
            if _covers(clock, copy) and not (device_only and copy.direction is Direction.D2H)
        ]
        self._unpublished = [copy for copy in self._unpublished if copy not in due]
        for copy in due:
            if copy.discarded:
                continue
            self._hand_to_readers(copy)
            copy.dst[:] = copy.staged
            if _lies_in(copy.dst, self._slabs):
                self._readable = [*_without(self._readable, _range(copy.dst)), _range(copy.dst)]
            for newer in self._unpublished:
                if not newer.discarded and _overlap(newer.dst, copy.dst):
                    self._poison(newer.dst)

    def _is_done(self, clock: Clock) -> bool:
        return all(self._done[direction] >= count for direction, count in clock.items())

    def _clock_of(self, event: Event) -> Clock:
        if event is COMPLETED:
            return _START
        if not isinstance(event, _SimulatedEvent) or event.device is not self:
            raise ValueError("the event was made by another device")
        return event.clock

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the simulated device is closed")

    def _place(self, wanted: Range) -> str:
        for number, slab in enumerate(self._slabs):
            base = slab.data_ptr()
            if _intersect(wanted, (base, base + slab.numel())):
                return f"slot at bytes {wanted[0] - base}..{wanted[1] - base} of device slab {number}"
        raise ValueError("the tensor is not part of a slab of this device")


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _range(data: np.ndarray | torch.Tensor) -> Range:
    start = data.data_ptr() if isinstance(data, torch.Tensor) else data.ctypes.data
    return start, start + data.nbytes


def _intersect(a: Range, b: Range) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return _intersect(_range(a), _range(b))


def _lies_in(data: np.ndarray | torch.Tensor, slabs: list[torch.Tensor]) -> bool:
    return any(_intersect(_range(data), _range(slab)) for slab in slabs)


def _without(ranges: list[Range], hole: Range) -> list[Range]:
    pieces = []
    for start, end in ranges:
        pieces += [(start, min(end, hole[0])), (max(start, hole[1]), end)]
    return [(start, end) for start, end in pieces if start < end]


def _later(a: Clock, b: Clock) -> Clock:
    return {direction: max(a[direction], b[direction]) for direction in Direction}


def _covers(clock: Clock, copy: _Copy) -> bool:
    return clock[copy.direction] >= copy.clock[copy.direction]


def _overlay(target: np.ndarray, target_place: np.ndarray, landed: _Copy) -> None:
    """Writes into `target`, which holds the bytes of the memory of `target_place`, what `landed` put there."""
    place, source = _range(target_place), _range(landed.dst)
    start, end = max(place[0], source[0]), min(place[1], source[1])
    if start < end:
        target[start - place[0] : end - place[0]] = landed.staged[start - source[0] : end - source[0]]
