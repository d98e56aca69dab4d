"""What a method is: one object for the whole life of a run, from what it does to the bare model to what the run leaves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters.base import adapter_of
from finetune.adapters.registry import ADAPTERS
from finetune.config import Config
from finetune.data.batches import Row
from finetune.methods.embedding_noise import add_embedding_noise
from finetune.methods.registry import METHODS
from finetune.objectives.base import Objective
from finetune.offload.weights.parts import ModelParts
from finetune.plugin import load
from finetune.runs.exports import Export
from finetune.session import Session
from finetune.setup import Setup


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step tells the loop."""

    loss: float  # of the step's rows, before the update
    tokens: int  # of the step
    learning_rate: float  # of the step
    grad_norm: float  # before clipping
    more: dict[str, float] = field(default_factory=dict)  # what the objective logs, by name


class Method(Setup):
    """A session's setup until the model is open, then `begin`, and `step` for every step.

    num_steps: of the run; None: not known yet. about: what the run's files are to say of it, from `begin` on, see
    `finetune.runs.directory`. first_step: steps that earlier processes have done. optimizer, scheduler: what callbacks are
    shown.
    """

    num_steps: int | None
    about: dict[str, Any]
    first_step: int
    optimizer: torch.optim.Optimizer
    scheduler: Any

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        entry = METHODS[config.method]
        self.has_gradients = entry.has_gradients
        self.kind = entry.adapter(config)  # of the adapter that is trained; None: the model's own weights are
        self.num_steps = config.training.max_steps
        self.about = {}

    def wrap(self, parts: ModelParts) -> tuple[nn.Module, ModelParts]:
        model = parts.model
        if self.kind is not None:
            model, note = load(ADAPTERS[self.kind].code).attach(parts, self.config, self.only_plan)
            self.notes += filter(None, [note])
            parts = adapter_of(model).rebased(parts)
        alpha = self.config.training.neftune_noise_alpha
        if alpha is not None:
            add_embedding_noise(model, alpha)
        return model, parts

    def set_mode(self, model: nn.Module, training: bool) -> None:
        model.train(training and self.has_gradients)

    @property
    def adapter_directory(self) -> Path | None:
        """Of the adapter that a run leaves; None: it leaves a model, see `export`."""
        return None if self.kind is None else self.config.output / "adapter"

    @property
    def schedule_notes(self) -> list[str]:
        """What its settings do not do, though one might think so."""
        return []

    @abstractmethod
    def begin(self, session: Session, objective: Objective) -> list[str]:
        """The model is open: takes up what earlier processes have kept, or begins. Returns what the user should know of that.

        Raises UserError when what is there is another run's or damaged.
        """

    @property
    def may_stop_inside(self) -> bool:
        """Whether a process may stop within a step without losing more than that step."""
        return True

    @abstractmethod
    def step(self, step: int, groups: Sequence[Sequence[Row]]) -> StepResult:
        """Step number `step` (from 0); groups: the rows of each micro-batch. Raises StepNotKept."""

    def watch(self, before_update: Callable[[], None], after_update: Callable[[], None]) -> None:
        """Has these called in every step; before_update: where gradients are there together."""
        self.optimizer.register_step_post_hook(lambda *_: after_update())

    @abstractmethod
    def save(self, step: int) -> None:
        """Makes the state after `step` steps durable."""

    def finish(self, step: int) -> None:
        """Leaves the model, and what is for the user in the output directory, as after `step` steps."""
        if self.adapter_directory is not None:
            self.write_adapter(self.adapter_directory, step)

    def write_adapter(self, directory: Path, step: int) -> None:
        """The adapter as it is now, after `step` steps, in PEFT's format; of methods that train one."""
        raise NotImplementedError(f"{type(self).__name__} trains no adapter")

    @abstractmethod
    def rescue(self, step: int) -> str:
        """After a failure in a later step or beside the steps: makes the state after `step` steps durable where that is
        possible. Returns what is left, and how to go on, in words."""

    @classmethod
    def tuned_weights(cls, config: Config, run: Path) -> Setup | None:
        """What puts the weights that the run in `run` has tuned in place of the model's; None: there are none of this method.

        No run begins there until its `close`. Raises UserError for files that are damaged, or are written now.
        """
        return None

    @classmethod
    def export(cls, job: Export) -> int | None:
        """Writes the model with these weights; returns after how many steps. None: there are none of this method."""
        return None


def make_method(config: Config) -> Method:
    """The configured one; nothing is read or written yet."""
    return METHODS[config.method].load()(config)
