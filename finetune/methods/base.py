"""What is trained and how: each method takes a step of the open model and keeps what a later process needs to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from finetune.data.batches import Row


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: of the step's rows, before the update. tokens: of the step. grad_norm: before clipping."""

    loss: float
    tokens: int
    learning_rate: float  # of the step
    grad_norm: float


class Method(Protocol):
    """The trainer's view of a method that is under way.

    first_step: steps that earlier processes have done. notes: what the user should know of how it went on. optimizer,
    scheduler: what callbacks are shown.
    """

    first_step: int
    notes: list[str]
    optimizer: torch.optim.Optimizer
    scheduler: Any

    def step(self, step: int, groups: Sequence[Sequence[Row]]) -> StepResult:
        """Step number `step` (from 0); groups: the rows of each micro-batch. Raises StepNotKept."""

    def save(self, step: int) -> None:
        """Makes the state after `step` steps durable."""

    def finish(self, step: int) -> None:
        """Leaves the model, and what is for the user in the output directory, as after `step` steps."""

    def rescue(self, step: int) -> str:
        """After a failure in a later step or beside the steps: makes the state after `step` steps durable where that is
        possible. Returns what is left, and how to go on, in words."""

    def close(self) -> None:
        """Gives up files; also after an error."""
