"""In every interval the `layers` blocks whose weights changed most when they were last trained, in the norm of the change over
the norm of the weights; blocks that were never trained come first. SlimFit (Ardakani et al. 2023, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from typing import Any

from finetune.methods.selection import Selection


class Slimfit(Selection):
    observes = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._changes = [inf] * self.num_blocks

    def choose_layers(self) -> int:
        return self.options.layers or max(1, self.num_blocks // 4)

    def choose(self, period: int) -> Sequence[int]:
        ties = self.random("slimfit").permutation(self.num_blocks)
        ranked = sorted(range(self.num_blocks), key=lambda i: (-self._changes[i], ties[i]))
        return ranked[: self.layers]

    def observe(self, changes: Mapping[int, tuple[float, float]]) -> None:
        for block, (change, weights) in changes.items():
            self._changes[block] = sqrt(change / weights) if weights else 0.0

    def notes(self) -> dict[str, Any]:
        return {"changes": [None if change == inf else change for change in self._changes]}

    def restore(self, notes: Mapping[str, Any]) -> None:
        if "changes" in notes:
            self._changes = [inf if change is None else change for change in notes["changes"]]
