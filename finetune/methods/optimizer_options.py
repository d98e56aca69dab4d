"""Section `optimizer`: what the methods that train weights update them by. Each optimizer's own keys stand in its rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Strict, create_model

from finetune.offload.update.rules import OPTIMIZERS, SUBSPACES
from finetune.offload.update.rules.rule import STATE_ITEMSIZES, options, reads
from finetune.options import Conflict, Number, Section

_NUMBERS = {int: Annotated[int, Strict()], float: Number}


def _own_keys() -> dict[str, tuple[Any, Any]]:
    """Key -> (type, default). One that several optimizers have is the same for all of them."""
    keys: dict[str, tuple[Any, Any]] = {}
    for rule in OPTIMIZERS.values():
        for key, option in options(rule).items():
            if keys.setdefault(key, option) != option:
                raise TypeError(f"optimizer.{key}: {rule.__name__} has it with other bounds or another default")
    number_of = {key: get_args(hint) for key, (hint, _) in keys.items()}
    return {key: (Annotated[_NUMBERS[kind], *bounds], keys[key][1]) for key, (kind, *bounds) in number_of.items()}


class _Named(Section):
    name: Literal[*OPTIMIZERS] = "adamw"
    """adafactor keeps second moments as rows times columns, apollo moments of a projection of the gradient: a step moves
    little but weights between disk and memory. lamb reads its state twice."""


class OptimizerOptions(create_model("_Keys", __base__=_Named, **_own_keys())):
    """The out-of-core optimizer of the methods that train the model's own weights; `training` has AdamW's numbers."""

    state: Literal[*STATE_ITEMSIZES] = "float32"
    """How moments are kept: bfloat16 rounds stochastically, 8bit in blocks of 256 (Dettmers et al. 2022)."""
    master: Literal["float32", "none"] = "float32"
    """Of bf16 weights: float32 keeps 16 more bits beside each; none rounds every update stochastically."""
    clipping: Literal["previous", "exact"] = "previous"
    """By which norm gradients are clipped: the step before's, so that every block is updated as soon as its gradients are
    there (the first step is computed twice, for its own norm), or this step's own, for which all gradients wait on disk."""
    versions: Annotated[int, Strict(), Field(ge=1, le=2)] = 2
    """Of everything in the working store. 1 halves the disk space, and a process that dies in a step loses the run."""

    def conflicts(self) -> Iterator[Conflict]:
        formats = OPTIMIZERS[self.name].state_formats
        if self.state not in formats:
            problem = f"expected optimizer.state {' or '.join(formats)} with {self.name}, found {self.state}"
            yield Conflict(("name", "state"), problem)


def unread_keys(config: Any) -> Iterator[tuple[str, str]]:
    """(dotted key, who reads it) for the numbers that the configured optimizer does not read and another one does."""
    subspace = SUBSPACES.get(config.selection.subspace)
    read = reads(OPTIMIZERS[config.optimizer.name]) | (reads(subspace) if subspace else set())
    for section in ("optimizer", "training"):
        for key in type(getattr(config, section)).model_fields:
            words = [
                f"{choice} {', '.join(names)}"
                for choice, rules in (("optimizer.name", OPTIMIZERS), ("selection.subspace", SUBSPACES))
                if (names := [name for name, rule in rules.items() if key in reads(rule)])
            ]
            if words and key not in read:
                yield f"{section}.{key}", " or ".join(words)
