"""What all objectives are: rows to lanes (the micro-batches of one pass), lanes to what is made small."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.data.batches import Row
from finetune.data.micro_batches import MicroBatches
from finetune.data.model_kinds import refuse_text
from finetune.data.tensor_rows import TensorRows
from finetune.memory.errors import UserError
from finetune.methods.registry import METHODS
from finetune.objectives.registry import find_objective
from finetune.offload.perturb.variants import Variant
from finetune.offload.step.head import TiledHead
from finetune.offload.step.own_loss import StepLoss, models_own_loss
from finetune.offload.streamed_model import StreamedModel
from finetune.offload.weights.parts import ModelParts
from finetune.planned_run import BatchShape
from finetune.session import Session


class Objective(ABC):
    """Rows to lanes to loss. Objectives of method zo are had without gradients, by `values`. One that has gradients says, for
    `StreamedModel.train_step`, what the `lanes` of a step are, and what is made of their outputs.

    lengths: tokens of each row, int [rows], by which micro-batches are sorted.
    """

    has_gradient: ClassVar[bool] = False
    """Whether methods that compute gradients can train on it."""
    takes_tensors: ClassVar[bool] = False
    """Whether rows may be samples of tensors, beside text."""
    compares_choices: ClassVar[bool] = False
    """Whether rows are prepared with all their candidates."""
    judged: ClassVar[str] = ""
    """What rows say of answers, see `finetune.data.job.TokenOptions.judged`."""
    lengths: np.ndarray
    planned: BatchShape | None = None
    """What steps are planned for, once that is known."""

    @abstractmethod
    def __init__(self, config: Config, session: Session, data: TokenDataset | TensorRows) -> None:
        """data: prepared with choices for one that compares them. Raises UserError for data that does not suit."""

    @classmethod
    def check_model(cls, parts: ModelParts) -> None:
        """Raises UserError for a model that rows of text cannot train on this."""
        refuse_text(parts)

    @classmethod
    def full_shape(cls, config: Config, session: Session, longest: int) -> BatchShape:
        """Of a step whose rows have at most `longest` tokens, before there is data. Raises UserError where the model does not
        suit."""
        return scored_shape(config, longest)

    @abstractmethod
    def shape(self, session: Session) -> BatchShape:
        """Of the largest step, every variant of the weights counted."""

    def values(
        self, model: StreamedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        """What is to be made small under every variant of the weights, fp32 [variants], and how many tokens went in.

        groups: the rows of each micro-batch, as `BatchPlan.step` gives them.
        """
        raise NotImplementedError(f"{type(self).__name__} is had with a gradient only")

    def lanes(self, groups: Sequence[Sequence[Row]], device: torch.device) -> MicroBatches:
        """The same rows as the model's inputs and labels, for methods that compute gradients."""
        raise NotImplementedError(f"{type(self).__name__} has no gradient")

    def updates(self, session: Session, step: int, groups: Sequence[Sequence[Row]]) -> Iterator[MicroBatches]:
        """The lanes of each update of step `step` (from 0), one after the other, for methods that compute gradients."""
        yield self.lanes(groups, session.device.torch_device)

    def take_plan(self, shape: BatchShape) -> None:
        """shape: that the run's steps are planned for."""
        self.planned = shape

    def logged(self) -> dict[str, float]:
        """What the last step's metrics say beside its loss, by name."""
        return {}

    def make_loss(self, model: nn.Module, head: TiledHead | None) -> StepLoss:
        """What is made of the outputs of lanes: by default, the loss of the model's own forward. See `MakeLoss`."""
        return models_own_loss(model, head)


def objective_class(config: Config) -> type[Objective]:
    return find_objective(config.objective).load()


def make_objective(config: Config, session: Session, data: TokenDataset | TensorRows) -> Objective:
    """Raises UserError for data that does not suit."""
    if isinstance(data, TensorRows) and config.dataset.packing:
        raise UserError(
            "dataset.packing: expected it off with rows of tensors, each of which is computed alone, found it on"
        )
    kind = objective_class(config)
    if isinstance(data, TensorRows) and not kind.takes_tensors:
        raise UserError(
            f"objective {config.objective}: expected rows of text, found samples of tensors: use objective loss"
        )
    return kind(config, session, data)


def check_gradient(objective: Objective, method: str) -> None:
    """For methods that compute gradients. Raises UserError for an objective that has none."""
    if not objective.has_gradient:
        raise UserError(
            f"method {method}: expected an objective with a gradient, found {type(objective).__name__}, which has none: "
            "use method zo"
        )


def scored_shape(config: Config, longest: int, sequences_per_row: int = 1) -> BatchShape:
    """Of a step that takes one pass over the weights."""
    options = config.training
    sequences = options.batch_size * sequences_per_row
    rows = min(options.micro_batch_size, sequences)
    return BatchShape.of_text(
        rows, longest, -(-sequences // rows) * config.variants, METHODS[config.method].has_gradients, config.dataset.packing
    )


def rows_of(groups: Sequence[Sequence[Row]]) -> list[int]:
    """The step's rows, which are not packed."""
    return [row[0] for group in groups for row in group]
