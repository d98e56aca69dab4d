"""Which blocks a step trains: a function of the seed, the step and, for slimfit, of how much blocks have changed.

full     all, always.
lisa     every `interval` steps, `layers` blocks at random, beside embedding, head and norm. LISA (Pan et al. 2024,
         algorithm 1).
badam    `layers` blocks after the other, each for `interval` steps, in an order that is drawn anew for every round: random,
         ascending, descending, or alternately up and down. BAdam (Luo et al. 2024, algorithm 1); with interval 1 and
         keep_state, HiFT (Liu et al. 2024).
slimfit  in every interval the `layers` blocks whose weights changed most when they were last trained, in the norm of the
         change over the norm of the weights; blocks that were never trained come first. SlimFit (Ardakani et al. 2023,
         section 3.1).
frugal   every `interval` steps `layers` blocks at random have AdamW's state; all others take the sign of their gradient.
         FRUGAL (Zmushko et al. 2024, algorithm 1, blockwise). With another `subspace` every matrix of every block has a part
         with state and takes signs in the rest, see `offload.update.projections`.
A block that is chosen anew begins with fresh optimizer state unless `keep_state` is set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np

from finetune.config import Config
from memory.errors import UserError

_INTERVALS = {"full": 1, "lisa": 20, "badam": 50, "slimfit": 1, "frugal": 50}


class Selection:
    """resident: the blocks that stay in memory, which lisa may prefer. Raises UserError for more layers than there are."""

    def __init__(self, config: Config, num_blocks: int, resident: frozenset[int] = frozenset()) -> None:
        options = config.selection
        self.method = config.method
        self._seed = config.training.seed
        self._num_blocks = num_blocks
        self._order = options.order
        all_blocks = self.method == "full" or options.subspace != "blocks"
        self.layers = num_blocks if all_blocks else options.layers or default_layers(self.method, num_blocks)
        if self.layers > num_blocks:
            raise UserError(f"selection.layers: expected at most {num_blocks}, the model's blocks, found {self.layers}")
        weights = [options.prefer_resident if i in resident else 1.0 for i in range(num_blocks)]
        self._shares = _shares(weights, self.layers)
        self.interval = interval_of(config)
        self.ends = self.method != "badam" if options.ends is None else options.ends
        self.keeps_state = self.method in ("full", "slimfit") if options.keep_state is None else options.keep_state
        self._changes = [float("inf")] * num_blocks

    def blocks(self, step: int) -> list[int]:
        """The blocks that step `step` (from 0) trains with the optimizer, ascending."""
        period = step // self.interval
        if self.layers == self._num_blocks:
            return list(range(self._num_blocks))
        if self.method == "badam":
            return sorted(self._next_in_turn(period))
        if self.method == "slimfit":
            ties = self._random("slimfit").permutation(self._num_blocks)
            ranked = sorted(range(self._num_blocks), key=lambda i: (-self._changes[i], ties[i]))
            return sorted(ranked[: self.layers])
        # Systematic sampling: equally spaced points on the blocks' shares, in random order: every block has exactly its chance.
        random = self._random(period)
        order = random.permutation(self._num_blocks)
        ends = np.cumsum(self._shares[order])
        points = (random.random() + np.arange(self.layers)) / self.layers * ends[-1]
        return sorted(order[np.searchsorted(ends, points, side="right").clip(max=self._num_blocks - 1)].tolist())

    def importance(self, block: int) -> float:
        """What the learning rate of a chosen block is multiplied by, so that blocks which are chosen less often make up for
        it: the chance of every block among equals, over its own."""
        return float(1 / self._num_blocks / self._shares[block])

    def observe(self, changes: Mapping[int, tuple[float, float]]) -> None:
        """changes: block -> squared norms of the step's change and of the weights."""
        for block, (change, weights) in changes.items():
            self._changes[block] = sqrt(change / weights) if weights else 0.0

    def notes(self) -> dict[str, Any]:
        """What cannot be computed from the step, as JSON values."""
        return {"changes": [None if c == float("inf") else c for c in self._changes]} if self.method == "slimfit" else {}

    def restore(self, notes: Mapping[str, Any]) -> None:
        if "changes" in notes:
            self._changes = [float("inf") if c is None else c for c in notes["changes"]]

    def _next_in_turn(self, period: int) -> Sequence[int]:
        turns = -(-self._num_blocks // self.layers)
        round_, turn = divmod(period, turns)
        order = list(range(self._num_blocks))
        if self._order == "random":
            order = self._random(round_).permutation(self._num_blocks).tolist()
        elif self._order == "descending" or (self._order == "alternating" and round_ % 2):
            order.reverse()
        return order[turn * self.layers : (turn + 1) * self.layers]

    def _random(self, period: int | str) -> np.random.Generator:
        digest = hashlib.blake2b(f"{self._seed}/selection/{period}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))


def _shares(weights: Sequence[float], layers: int) -> np.ndarray:
    """Chances in proportion to `weights`, sum 1, none so large that a block would be chosen twice among `layers`."""
    shares = np.asarray(weights, dtype=float) / sum(weights)
    while (over := shares > 1 / layers + 1e-12).any():
        rest = ~over & (shares < 1 / layers)
        shares[rest] *= 1 + (shares[over] - 1 / layers).sum() / shares[rest].sum()
        shares[over] = 1 / layers
    return shares


def interval_of(config: Config) -> int:
    return config.selection.interval or _INTERVALS[config.method]


def default_layers(method: str, num_blocks: int) -> int:
    return {"full": num_blocks, "lisa": min(2, num_blocks), "badam": 1}.get(method, max(1, num_blocks // 4))
