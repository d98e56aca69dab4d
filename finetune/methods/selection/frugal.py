"""Every `interval` steps `layers` blocks at random have AdamW's state; all others take the sign of their gradient. FRUGAL
(Zmushko et al. 2024, algorithm 1, blockwise). With another `subspace` every matrix of every block has a part with state and
takes signs in the rest, see `finetune.offload.update.rules.frugal`."""

from __future__ import annotations

from typing import Any

from finetune.methods.selection import Selection


class Frugal(Selection):
    default_interval = 50
    default_keep_state = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sign_scale = self.options.sign_scale

    def choose_layers(self) -> int:
        if self.options.subspace != "blocks":
            return self.num_blocks
        return self.options.layers or max(1, self.num_blocks // 4)
