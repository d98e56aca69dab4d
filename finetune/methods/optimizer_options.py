"""Section `optimizer`: what the methods that train weights update them by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Strict

from finetune.options import Conflict, Count, NonNegative, Section, Share


class OptimizerOptions(Section):
    """The out-of-core optimizer of the methods that train the model's own weights; `training` has AdamW's numbers."""

    name: Literal["adamw", "adafactor", "apollo", "lamb", "lion", "sgd"] = "adamw"
    """adafactor keeps second moments as rows times columns, apollo moments of a projection of the gradient: a step moves
    little but weights between disk and memory. lamb reads its state twice."""
    rank: Count = 32
    """Of apollo's projections, and of frugal's where `selection.subspace` projects. 1 with a `scale` of 128: APOLLO-Mini."""
    refresh_steps: Count = 200
    """Apollo: updates between projections."""
    scale: NonNegative = 1.0
    """Apollo: the square of a factor of its steps, as in the authors' code."""
    momentum: Share = 0.9
    """Of sgd."""
    state: Literal["float32", "bfloat16", "8bit"] = "float32"
    """How moments are kept, of all but adafactor and apollo: bfloat16 rounds stochastically, 8bit in blocks of 256 (Dettmers
    et al. 2022)."""
    master: Literal["float32", "none"] = "float32"
    """Of bf16 weights: float32 keeps 16 more bits beside each; none rounds every update stochastically."""
    clipping: Literal["previous", "exact"] = "previous"
    """By which norm gradients are clipped: the step before's, so that every block is updated as soon as its gradients are
    there (the first step is computed twice, for its own norm), or this step's own, for which all gradients wait on disk."""
    versions: Annotated[int, Strict(), Field(ge=1, le=2)] = 2
    """Of everything in the working store. 1 halves the disk space, and a process that dies in a step loses the run."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.name == "lamb" and self.state == "8bit":
            yield Conflict(("name", "state"), "expected optimizer.state float32 or bfloat16 with lamb, found 8bit")
