"""Rows of several sources as one stream of them, drawn as `datasets.interleave_datasets` draws with probabilities.

A function of seed, probabilities and rows alone. Sources are read in order, each as far as it is drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

_DRAWN_TOGETHER = 1000  # as there: another number would draw another order


class Row(Protocol):
    """One, or a piece of one."""

    @property
    def ends(self) -> bool:
        """Whether a row ends with it."""


Source = Callable[[], Iterator[tuple[str, Row]]]
"""Gives (place, piece) from its beginning whenever it is called."""


def interleave(
    sources: Sequence[Source], probabilities: Sequence[float], seed: int, stopping_strategy: str
) -> Iterator[tuple[int, str, Row]]:
    """The rows of the mixture as (index of the source, place, piece), the pieces of a row together.

    probabilities: of each source, above 0; divided by their sum. stopping_strategy: first_exhausted ends with the last row of
    any source, all_exhausted when each has given its last one; the others begin again. Nothing comes where a source is empty.
    """
    shares = np.asarray(probabilities, np.float64)
    if not np.isclose(shares.sum(), 1.0, rtol=0, atol=1e-9):
        shares = shares / shares.sum()
    generator = np.random.default_rng(seed)
    readers = [_Reader(source) for source in sources]
    if any(reader.is_empty for reader in readers):
        return
    ends = any if stopping_strategy == "first_exhausted" else all
    while True:
        for index in generator.choice(len(readers), size=_DRAWN_TOGETHER, p=shares).tolist():
            for place, piece in readers[index].row():
                yield index, place, piece
            if ends(reader.is_exhausted for reader in readers):
                return


class _Reader:
    """Gives the rows of a source one by one, from the first again after the last. is_exhausted: whether the last was given."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.is_exhausted = False
        self._begin()
        self.is_empty = self._next is None

    def row(self) -> Iterator[tuple[str, Row]]:
        """Its pieces."""
        if self._next is None:
            self._begin()
        piece_ends = False
        while not piece_ends:
            place, piece = self._next
            yield place, piece
            self._next, piece_ends = next(self._rows, None), piece.ends
        self.is_exhausted |= self._next is None

    def _begin(self) -> None:
        self._rows = self._source()
        self._next = next(self._rows, None)
