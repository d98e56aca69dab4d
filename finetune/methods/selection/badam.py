"""`layers` blocks after the other, each for `interval` steps, in an order that is drawn anew for every round: random,
ascending, descending, or alternately up and down. BAdam (Luo et al. 2024, algorithm 1); with interval 1 and keep_state, HiFT
(Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.methods.selection import Selection


class Badam(Selection):
    default_interval = 50
    default_ends = False
    default_keep_state = False

    def choose_layers(self) -> int:
        return self.options.layers or 1

    def choose(self, period: int) -> Sequence[int]:
        turns = -(-self.num_blocks // self.layers)
        round_, turn = divmod(period, turns)
        order = list(range(self.num_blocks))
        if self.options.order == "random":
            order = self.random(round_).permutation(self.num_blocks).tolist()
        elif self.options.order == "descending" or (self.options.order == "alternating" and round_ % 2):
            order.reverse()
        return order[turn * self.layers : (turn + 1) * self.layers]
