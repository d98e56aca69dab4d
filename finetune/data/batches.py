"""Which examples make up which step: a pure function of (seed, step), so that a run resumes anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from finetune.data.packing import pack_flat

Row = tuple[int, ...]  # indices of the examples of one sequence: one, or several when packed


@dataclass
class BatchPlan:
    """The examples of every optimizer step.

    Every epoch visits every example once (with `drop_last`, but for the last incomplete step). An epoch's order, and
    what is packed with what, is drawn anew from (seed, epoch); the number of rows is the same in each. Within a step
    the rows are sorted by length, longest first, and then cut into micro-batches: these pad little, and which examples
    a step has is not changed by it. Rows with the same length keep the drawn order.
    Raises ValueError for sizes that make no step.
    """

    num_examples: int
    """Of the data set."""
    batch_size: int
    """Rows (sequences) a step; the last step of an epoch has what is left, unless `drop_last`."""
    micro_batch_size: int
    """Rows that go through the model together."""
    seed: int
    """Not negative; with the epoch's number it fixes the epoch's order."""
    lengths: np.ndarray
    """Tokens of each example, int [num_examples]."""
    _: KW_ONLY
    epochs: float | None = None
    """How long the plan is, maybe a fraction; None: `steps` says it."""
    steps: int | None = None
    """The same in steps."""
    packing: int | None = None
    """Tokens of a packed row: each row then holds as many examples as fit. None: one example a row."""
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.num_examples < 1 or len(self.lengths) != self.num_examples:
            counts = f"{self.num_examples}, {len(self.lengths)}"
            raise ValueError(f"expected an example or more and as many lengths, found {counts}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        self.lengths = np.asarray(self.lengths, np.int64)
        self._epoch = -1
        self._members = self._offsets = np.empty(0, np.int64)
        self._load_epoch(0)
        rows = len(self._offsets) - 1
        self.rows_per_epoch = rows
        self.steps_per_epoch = rows // self.batch_size if self.drop_last else math.ceil(rows / self.batch_size)
        if not self.steps_per_epoch:
            raise ValueError(f"drop_last leaves no step: {rows} rows are fewer than batch_size {self.batch_size}")
        # The small subtraction keeps 0.1 * 30 from being 4 steps.
        self.num_steps = self.steps
        if self.steps is None:
            self.num_steps = max(1, math.ceil(self.epochs * self.steps_per_epoch - 1e-9))

    def step(self, index: int) -> list[list[Row]]:
        """The micro-batches of step `index` (from 0), each a list of rows.

        Raises IndexError outside the plan.
        """
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of {self.num_steps}")
        epoch, position = divmod(index, self.steps_per_epoch)
        self._load_epoch(epoch)
        first = position * self.batch_size
        bounds = self._offsets[first : first + self.batch_size + 1]
        rows = [tuple(self._members[a:b].tolist()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        rows.sort(key=lambda row: -self.lengths[list(row)].sum())
        size = self.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def epoch(self, index: int) -> float:
        """Epochs done when step `index` begins."""
        return index / self.steps_per_epoch

    def skipped(self, row: Mapping[str, Any] | None) -> int:
        """Steps of the plan that were left out before the last of a run's steps was done, of which `row` of the metrics says
        the number and the epoch; None: there is no such step."""
        return 0 if row is None else round(row["epoch"] * self.steps_per_epoch) - row["step"]

    def _load_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        order = generator.permutation(self.num_examples)
        if self.packing is None:
            members, offsets = order, np.arange(self.num_examples + 1)
        else:
            packed, bounds = pack_flat(self.lengths, self.packing, order)
            # Packing sorts rows by what they hold: mix them again.
            shuffled = generator.permutation(len(bounds) - 1)
            sizes = np.diff(bounds)[shuffled]
            offsets = np.zeros(len(bounds), np.int64)
            np.cumsum(sizes, out=offsets[1:])
            members = packed[np.repeat(bounds[:-1][shuffled] - offsets[:-1], sizes) + np.arange(len(packed))]
        self._members, self._offsets, self._epoch = members, offsets, epoch
