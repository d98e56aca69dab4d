"""Every `interval` steps, `layers` blocks at random, beside embedding, head and norm. LISA (Pan et al. 2024, algorithm 1)."""

from __future__ import annotations

from finetune.methods.selection import Selection


class Lisa(Selection):
    default_interval = 20
    default_keep_state = False

    def choose_layers(self) -> int:
        return self.options.layers or min(2, self.num_blocks)
