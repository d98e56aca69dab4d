"""What an optimizer is: a `Rule`. Imports no torch.

[Note: a rule's numbers]
A rule is a frozen dataclass, and its fields have the names of the configuration's keys that they come from. Fields with bounds
(`Annotated`) are options of the rule: they become keys of the section `optimizer`. The others are in the section `training`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, get_type_hints

if TYPE_CHECKING:
    import torch

    from finetune.offload.update.units import UpdateUnit

STATE_ITEMSIZES = {"float32": 4, "bfloat16": 2, "8bit": 1}
"""How state may be kept -> bytes of a number. bf16 state is always rounded stochastically."""
BLOCK = 256
"""Numbers under one scale of 8-bit state."""


class Scalars(NamedTuple):
    """What a kernel multiplies with, see `Scalars` in csrc/optimizer.h; one that it does not read may be anything."""

    keep1: float = 0.0  # beta1 or momentum
    weight1: float = 0.0  # of the gradient beside it
    keep2: float = 0.0  # beta2
    weight2: float = 0.0  # of what is averaged beside it
    root_divisor: float = 1.0  # AdamW: sqrt(1 - beta2^step)
    epsilon: float = 0.0  # beside the root
    step: float = 0.0  # what the direction is multiplied by: negative


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """How a step moves parameters and the state that is kept of each of their elements. See [Note: a rule's numbers]."""

    kernel: ClassVar[str]
    """Of `finetune_native.optimizer.Rule`: the arithmetic of an element."""
    states: ClassVar[tuple[str, ...]] = ()
    """Which of "first" and "second" are kept of every element."""
    state_formats: ClassVar[tuple[str, ...]] = tuple(STATE_ITEMSIZES)
    """How these may be kept."""
    passes: ClassVar[int] = 1
    """How often a step reads them. 2: the first time, `first_pass` looks at all pieces of a unit."""
    has_directions: ClassVar[bool] = False
    """Whether it is a `DirectionRule`."""

    weight_decay: float = 0.0
    """Decoupled: theta is multiplied by 1 - learning rate * weight_decay."""

    @property
    def keeps_state(self) -> bool:
        return bool(self.states) or self.has_directions

    def scalars(self, learning_rate: float, step: int) -> Scalars:
        """step: from 1, of the state, for bias correction."""
        return Scalars(step=-learning_rate)

    def temporary_bytes(self, unit: UpdateUnit) -> int:
        """What an update of a unit allocates beside gradients, at most."""
        return 0

    def first_pass(self) -> FirstPass:
        """For a unit of a rule with two passes."""
        raise NotImplementedError(f"{type(self).__name__} has one pass")


class FirstPass(Protocol):
    """Sees all trained elements of a unit before any is changed; then says what the learning rate of each parameter is
    multiplied with."""

    def add(
        self, name: str, rule: Rule, weights: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, torch.Tensor], step: int
    ) -> None:
        """A run of elements of a parameter, all fp32 [count]. rule: what updates the parameter. step: from 1."""

    def __getitem__(self, name: str) -> float: ...


class Direction(Protocol):
    def of(self, first: int, count: int) -> torch.Tensor:
        """fp32 [count]: what the elements of a parameter from `first` on move along."""


@dataclass(frozen=True, kw_only=True)
class DirectionRule(Rule):
    """A step moves along something that is made of whole matrices, whose state ("factors") is a unit's and no element's."""

    kernel = "descent"
    has_directions = True

    @abstractmethod
    def factor_bytes(self, unit: UpdateUnit) -> int:
        """Of the state of all parameters that can be trained; it begins as zeros."""

    @abstractmethod
    def directions(
        self, unit: UpdateUnit, factors: torch.Tensor, gradients: Mapping[str, torch.Tensor], grad_scale: float, seed: int
    ) -> Mapping[str, Direction]:
        """Takes gradients, contiguous, fp32 or bf16, into the state and says where each moves its parameter.

        factors: fp32 [factor_bytes / 4]. grad_scale: what gradients are to be multiplied with. seed: of the run.
        """


@dataclass(frozen=True, kw_only=True)
class TwoBetas(Rule):
    """A rule with two decay rates of moving averages."""

    adam_beta1: float = 0.9
    """Of the gradient."""
    adam_beta2: float = 0.999
    """Of the gradient's square; lion's own second rate."""

    @property
    def betas(self) -> tuple[float, float]:
        return self.adam_beta1, self.adam_beta2


@dataclass(frozen=True, kw_only=True)
class AdamNumbers(TwoBetas):
    """A rule with AdamW's numbers."""

    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""


def reads(kind: type[Rule]) -> set[str]:
    """The configuration's keys that a rule reads, without their sections."""
    return set(kind.__dataclass_fields__) | ({"state"} if kind.states else set())


def options(kind: type[Rule]) -> dict[str, tuple[Any, Any]]:
    """Name -> (annotated type, default) of what a rule adds to the configuration's section `optimizer`."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: (hints[name], field.default)
        for name, field in kind.__dataclass_fields__.items()
        if hasattr(hints.get(name), "__metadata__")
    }
