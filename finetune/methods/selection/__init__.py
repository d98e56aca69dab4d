"""Which blocks a step trains: a function of the seed, the step and, for slimfit, of how much blocks have changed.

Every method that trains some of the blocks at a time is a `Selection` in a file of its own; a block that is chosen anew begins
with fresh optimizer state unless `keep_state` is set. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.memory.errors import UserError
from finetune.methods.registry import METHODS
from finetune.methods.selection_options import SelectionOptions
from finetune.plugin import load


class Selection:
    """All blocks, always (method full); what other strategies have in common.

    resident: the blocks that stay in memory, which may be preferred.
    layers: blocks that are chosen at a time. interval: steps between choices. ends: whether embedding, head and final norm are
    trained too. keeps_state: whether a block's optimizer state waits until it is chosen again. sign_scale: learning rate of
    the signs that all other blocks take, in units of the learning rate; None: they stay as they are. observes: whether it
    wants to know how much blocks have changed.
    Raises UserError for more layers than there are blocks.
    """

    default_interval = 1
    default_ends = True
    default_keep_state = True
    sign_scale: float | None = None
    observes = False

    def __init__(self, options: SelectionOptions, seed: int, num_blocks: int, resident: frozenset[int] = frozenset()) -> None:
        self.options = options
        self._seed = seed
        self.num_blocks = num_blocks
        self.layers = self.choose_layers()
        if self.layers > num_blocks:
            raise UserError(f"selection.layers: expected at most {num_blocks}, the model's blocks, found {self.layers}")
        weights = [options.prefer_resident if i in resident else 1.0 for i in range(num_blocks)]
        self._shares = _shares(weights, self.layers)
        self.interval = options.interval or self.default_interval
        self.ends = self.default_ends if options.ends is None else options.ends
        self.keeps_state = self.default_keep_state if options.keep_state is None else options.keep_state

    def choose_layers(self) -> int:
        return self.num_blocks

    def blocks(self, step: int) -> list[int]:
        """The blocks that step `step` (from 0) trains with the optimizer, ascending."""
        if self.layers == self.num_blocks:
            return list(range(self.num_blocks))
        return sorted(self.choose(step // self.interval))

    def choose(self, period: int) -> Sequence[int]:
        """`layers` blocks for the steps of an interval (from 0). Here: at random."""
        # Systematic sampling: equally spaced points on the blocks' shares, in random order: every block has exactly its chance.
        random = self.random(period)
        order = random.permutation(self.num_blocks)
        ends = np.cumsum(self._shares[order])
        points = (random.random() + np.arange(self.layers)) / self.layers * ends[-1]
        return order[np.searchsorted(ends, points, side="right").clip(max=self.num_blocks - 1)].tolist()

    def importance(self, block: int) -> float:
        """What the learning rate of a chosen block is multiplied by, so that blocks which are chosen less often make up for
        it: the chance of every block among equals, over its own."""
        return float(1 / self.num_blocks / self._shares[block])

    def observe(self, changes: Mapping[int, tuple[float, float]]) -> None:
        """Is told of every step. changes: block -> squared norms of the step's change and of the weights."""

    def notes(self) -> dict[str, Any]:
        """What cannot be computed from the step, as JSON values; the run keeps it."""
        return {}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """notes: as the last step left them, those of others among them."""

    def random(self, word: int | str) -> np.random.Generator:
        """A generator that the run's seed and `word` fix."""
        digest = hashlib.blake2b(f"{self._seed}/selection/{word}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))


def make_selection(config: Any, num_blocks: int, resident: frozenset[int] = frozenset()) -> Selection:
    """That of the configured method."""
    return _strategy(config)(config.selection, config.training.seed, num_blocks, resident)


def interval_of(config: Any) -> int:
    """Steps between the choices of the configured method."""
    return config.selection.interval or _strategy(config).default_interval


def _strategy(config: Any) -> type[Selection]:
    return load(METHODS[config.method].strategy)


def _shares(weights: Sequence[float], layers: int) -> np.ndarray:
    """Chances in proportion to `weights`, sum 1, none so large that a block would be chosen twice among `layers`."""
    shares = np.asarray(weights, dtype=float) / sum(weights)
    while (over := shares > 1 / layers + 1e-12).any():
        rest = ~over & (shares < 1 / layers)
        shares[rest] *= 1 + (shares[over] - 1 / layers).sum() / shares[rest].sum()
        shares[over] = 1 / layers
    return shares
