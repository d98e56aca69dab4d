"""Ranges of a file: which are free, and where the next bytes go."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


class ExtentAllocator:
    """First fit over the free ranges of a file that grows at its end. All sizes and offsets are in bytes.

    in_use: (offset, num_bytes) ranges that must not be given away; they do not overlap.
    """

    def __init__(self, in_use: Iterable[tuple[int, int]] = ()) -> None:
        self._free: list[tuple[int, int]] = []  # (offset, num_bytes), ascending, never touching each other
        self.end = 0
        for offset, num_bytes in sorted(in_use):
            if offset > self.end:
                self._free.append((self.end, offset - self.end))
            self.end = max(self.end, offset + num_bytes)

    def allocate(self, num_bytes: int) -> int:
        for index, (offset, free_bytes) in enumerate(self._free):
            if free_bytes >= num_bytes:
                if free_bytes == num_bytes:
                    del self._free[index]
                else:
                    self._free[index] = (offset + num_bytes, free_bytes - num_bytes)
                return offset
        offset = self.end
        self.end += num_bytes
        return offset

    def free(self, offset: int, num_bytes: int) -> None:
        """Raises ValueError when a part of the range is free already."""
        if not num_bytes:
            return
        index = bisect_left(self._free, (offset, 0))
        before = self._free[index - 1] if index else None
        after = self._free[index] if index < len(self._free) else None
        if (before and sum(before) > offset) or (after and after[0] < offset + num_bytes):
            raise ValueError(f"bytes {offset} to {offset + num_bytes} are free already, in part or whole")
        if after and after[0] == offset + num_bytes:
            del self._free[index]
            num_bytes += after[1]
        if before and sum(before) == offset:
            del self._free[index - 1]
            offset, num_bytes = before[0], before[1] + num_bytes
        insort(self._free, (offset, num_bytes))
