"""Packing: several examples in one row, so that little of a row is padding."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray | None = None) -> list[list[int]]:
    """Examples to rows by best-fit decreasing: every example once, no row over `capacity` tokens.

    lengths   int [examples], each at most `capacity`
    order     a permutation of the examples that breaks ties between equal lengths (default: as they are); the number of
              rows is the same for every order

    Deterministic. Raises ValueError for an example longer than `capacity`.
    """
    members, offsets = pack_flat(lengths, capacity, order)
    return [part.tolist() for part in np.split(members, offsets[1:-1])] if len(members) else []


def pack_flat(lengths: np.ndarray, capacity: int, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """As `pack`, in two arrays: row r is members[offsets[r]:offsets[r + 1]]. int64 each.

    Equal lengths are placed together: the fullest row with room for one example of length L takes room // L of them, as
    best fit would do one by one. So the work is by distinct (length, room), not by example.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and lengths.min() < 1:
        raise ValueError(f"example {int(lengths.argmin())} has no token")
    if lengths.size and lengths.max() > capacity:
        worst = int(lengths.argmax())
        raise ValueError(f"example {worst} has {lengths[worst]} tokens, more than the {capacity} of a packed row")
    order = np.arange(len(lengths)) if order is None else np.asarray(order)
    by_length = order[np.argsort(-lengths[order], kind="stable")]
    row_of = np.empty(len(lengths), np.int64)  # of by_length's entries
    rows_with: dict[int, list[np.ndarray]] = {}  # room -> rows, in pieces; no piece is empty
    rooms: list[int] = []  # its keys, sorted
    rows = 0

    def keep(room: int, ids: np.ndarray) -> None:
        if room and len(ids):
            if room not in rows_with:
                rows_with[room] = []
                insort(rooms, room)
            rows_with[room].append(ids)

    values, first = np.unique(-lengths[by_length], return_index=True)
    bounds = [*first.tolist(), len(by_length)]
    for index, value in enumerate(values.tolist()):
        length, start, end = -value, bounds[index], bounds[index + 1]
        while start < end:
            todo = end - start
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                pieces = rows_with[room]
                ids = pieces.pop()
                if not pieces:
                    del rows_with[room], rooms[at]
                each = room // length
            else:
                room, each = capacity, capacity // length
                ids = np.arange(rows, rows - (-todo // each))
                rows += len(ids)
            used = min(len(ids), -(-todo // each))
            placed = min(used * each, todo)
            row_of[start : start + placed] = np.repeat(ids[:used], each)[:placed]
            start += placed
            last = placed - (used - 1) * each
            keep(room, ids[used:])
            keep(room - each * length, ids[: used - 1])
            keep(room - last * length, ids[used - 1 : used])
    grouped = np.argsort(row_of, kind="stable")
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=offsets[1:])
    return by_length[grouped], offsets
