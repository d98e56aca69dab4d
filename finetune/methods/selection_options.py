"""Section `selection`: which blocks are trained when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune.offload.update.rules import SUBSPACES
from finetune.options import Conflict, Count, NonNegative, Section, Switch


class SelectionOptions(Section):
    """What is trained when, for lisa, badam, slimfit and frugal; formulas and sources are in `finetune.methods.selection`."""

    layers: Count | None = None
    """Blocks that are trained at a time. None: 2 for lisa, 1 for badam, a quarter of them for slimfit and frugal."""
    interval: Count | None = None
    """Steps between choices. None: 20 for lisa, 50 for badam and frugal, 1 for slimfit."""
    order: Literal["random", "ascending", "descending", "alternating"] = "random"
    """badam: the order in which blocks are trained."""
    ends: Switch | None = None
    """Whether embedding, head and final norm are trained too. None: yes, but not with badam, as in the papers."""
    keep_state: Switch | None = None
    """Whether a block's optimizer state waits on disk until the block is chosen again. None: only with slimfit."""
    sign_scale: NonNegative = 1.0
    """frugal: learning rate of the signs, in units of the learning rate."""
    subspace: Literal["blocks", *SUBSPACES] = "blocks"
    """frugal: what has AdamW's state. blocks: some blocks. columns, projection: `optimizer.rank` dimensions of every matrix,
    which are rows or columns of it, or random directions."""
    prefer_resident: Annotated[float, Field(ge=1)] = 1.0
    """lisa: blocks that stay in memory are so many times likelier. Updates are weighted, so their expectation stays the same.
    Above 1, another memory limit chooses other blocks."""

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        if self.subspace != "blocks" and config.method != "frugal":
            yield Conflict(
                ("method", "selection.subspace"),
                f"expected method frugal with selection.subspace {self.subspace}, found {config.method}",
            )
        if self.subspace != "blocks" and self.layers:
            yield Conflict(
                ("selection.layers", "selection.subspace"),
                f"expected no selection.layers with selection.subspace {self.subspace}, which applies to all blocks, found "
                f"{self.layers}",
            )
        if config.method == "frugal" and self.keep_state:
            yield Conflict(
                ("method", "selection.keep_state"),
                "expected selection.keep_state off with frugal, whose blocks lose their state when they take signs, found "
                "it on",
            )
