"""What an optimizer updates, cut into pieces: units of weights (a block, a matrix of an expert, a chunk of the head, rows of an
embedding table, the edges), and the runs of their bytes that are read, updated and written together.

[Note: images and pieces]
A unit's weights lie in a slot as its `BlockLayout` says: its *image*. A piece is a run of whole pages of the image. Optimizer
state is an array beside the image: the element of a weight at byte b of a piece has its state at index b / itemsize, with the
smallest itemsize in the unit, so neither gaps nor unlike dtypes need a table. On disk a piece is its part of the image,
then its state, in one extent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from finetune.offload.weights.layout import BlockLayout, Read, View

PIECE_BYTES = 2 << 20  # of weights: with its state, what a level 3 cache holds and a disk reads at full speed


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements of one parameter in a piece. offset: of the first one's bytes in the image; first_element: in the parameter."""

    name: str  # local, of the parameter
    view: View  # of the whole parameter in the image
    offset: int
    first_element: int
    count: int  # of elements

    @property
    def end(self) -> int:
        return self.offset + self.count * self.view.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, start + num_bytes) of an image; `units` of state. others: names of what else has bytes in it."""

    start: int
    num_bytes: int
    units: int
    segments: tuple[Segment, ...]  # of what can be trained
    others: frozenset[str]


@dataclass(frozen=True, slots=True)
class UpdateUnit:
    """name: unique, for people and manifests. fqns: local name -> fully qualified name of each parameter that can be trained.
    itemsize: of the smallest of them. first_element: of a parameter that is a part of another, where it begins there."""

    name: str
    layout: BlockLayout  # of its image
    fqns: dict[str, str]
    itemsize: int
    pieces: tuple[Piece, ...]  # from the image's first byte to its last
    first_element: int = 0


def make_unit(name: str, layout: BlockLayout, fqns: dict[str, str], first_element: int = 0) -> UpdateUnit:
    """fqns: what of the layout can be trained, by local name. first_element: as in `UpdateUnit`."""
    itemsize = min((layout.views[local].dtype.itemsize for local in fqns), default=1)
    # Names of tied parameters share their bytes: one of them stands for all.
    views = {layout.views[local].slot_offset: (local, layout.views[local]) for local in reversed(fqns)}
    pieces = []
    for start in range(0, layout.num_bytes, PIECE_BYTES):
        num_bytes = min(PIECE_BYTES, layout.num_bytes - start)
        segments = []
        for offset, (local, view) in sorted(views.items()):
            size = view.dtype.itemsize
            low, high = max(offset, start), min(view.end, start + num_bytes)
            if low < high:
                segments.append(Segment(local, view, low, (low - offset) // size, (high - low) // size))
        others = {
            local
            for local, view in layout.views.items()
            if view.slot_offset not in views
            and view.slot_offset < start + num_bytes
            and view.end > start
        }
        pieces.append(Piece(start, num_bytes, num_bytes // itemsize, tuple(segments), frozenset(others)))
    return UpdateUnit(name, layout, fqns, itemsize, tuple(pieces), first_element)


def clipped_reads(reads: Sequence[Read], start: int, stop: int) -> list[Read]:
    """The parts of `reads` that fill bytes [start, stop) of the slot."""
    parts = []
    for read in reads:
        low, high = max(read.slot_offset, start), min(read.slot_offset + read.num_bytes, stop)
        if low < high:
            skip = low - read.slot_offset
            parts.append(Read(read.path, read.file_offset + skip, high - low, low))
    return parts


def missing_ranges(pieces: Sequence[Piece], stored: Collection[int]) -> list[tuple[int, int]]:
    """[start, stop) of the image that lie in no piece of `stored`, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for index, piece in enumerate(pieces):
        if index not in stored:
            if ranges and ranges[-1][1] == piece.start:
                ranges[-1] = (ranges[-1][0], piece.start + piece.num_bytes)
            else:
                ranges.append((piece.start, piece.start + piece.num_bytes))
    return ranges

