"""What objectives have in common that learn from judged answers: log-probabilities of all lanes of a step, then the loss.

See [Note: losses of sequences] in `finetune.offload.step.sequence_loss`. An objective with a reference has lanes more, under
the weights without the adapter: these only go forward, in the same visits of blocks. So a step reads the base as often as one
of supervised training.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.data.micro_batches import MicroBatches
from finetune.memory.errors import UserError
from finetune.objectives.answers import LabelledLane
from finetune.objectives.base import Objective
from finetune.objectives.router_loss import RouterLoss
from finetune.objectives.scoring import Asked, Scores
from finetune.offload.step.engine import Versions
from finetune.offload.step.head import TiledHead
from finetune.offload.step.own_loss import StepLoss, StepLosses, loss_in
from finetune.offload.streamed_model import StreamedModel
from finetune.planned_run import BatchShape
from finetune.session import Session


class MeasuredRows(Protocol):
    """Judged answers as sequences and what is asked of them, the longest rows first. versions: of the weights, under which all
    are asked. tokens: that these have together. num_accounts: that cross entropies count for."""

    versions: int
    max_length: int
    tokens: int
    pad_token_id: int
    num_accounts: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Asked]]: ...

    def ask(self, streamed: StreamedModel, lanes: Sequence[Sequence[Asked]], versions: Sequence[int]) -> list[Scores]:
        """As `finetune.objectives.scoring.score`."""

    def result(self, totals: np.ndarray) -> dict[str, float]:
        """totals: fp64 [versions, accounts], cross entropies."""


class Judged(Objective):
    """A subclass says which lanes there are, and what their log-probabilities cost."""

    has_gradient = True
    temperature = 1.0
    """That logits are divided by."""

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        self._config = config
        self._data = data
        self._routers = RouterLoss(config.training, session.parts.model)
        if self._routers.adds_loss:
            raise UserError(
                f"training.router_loss: expected without with training.objective {config.objective}, whose loss is of answers "
                f"alone, because config.json asks for a loss of routers, found {config.training.router_loss}"
            )
        self.beta = config.preference.beta_of(config.objective)
        self._lanes: list[LabelledLane] = []
        self._versions = Versions([], 0)
        self._loss = torch.zeros(())
        self._logged: dict[str, float] = {}

    @classmethod
    def check_head(cls, config: Config, session: Session) -> None:
        """Raises UserError for a model without a head whose logits come in tiles."""
        if session.parts.head is None:
            raise UserError(
                f"training.objective: expected a language model, whose head is a linear layer, with {config.objective}, found "
                f"{type(session.parts.model).__name__}"
            )

    def shape(self, session: Session) -> BatchShape:
        return self.full_shape(self._config, session, int(self.lengths.max()))

    @abstractmethod
    def of_lanes(
        self, lanes: Sequence[LabelledLane], log_probs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """(the loss, fp32 [], differentiable; what is logged) of a step. log_probs: fp32 [labels] a lane, of all lanes."""

    @abstractmethod
    def measured(self) -> MeasuredRows:
        """The data, to be evaluated on."""

    def asked(self, batches: MicroBatches, lanes: Sequence[LabelledLane], versions: Versions) -> MicroBatches:
        """The lanes of the step that comes next."""
        self._lanes, self._versions = list(lanes), versions
        inputs = [kwargs | self._routers.inputs for kwargs in batches.inputs]
        return replace(batches, inputs=inputs, versions=versions)

    def make_loss(self, model: nn.Module, head: TiledHead | None) -> StepLoss:
        return _StepLoss(self, model, head)

    def logged(self) -> dict[str, float]:
        return self._logged

    def backward(self, model: nn.Module, head: TiledHead, outputs: list[Any]) -> torch.Tensor:
        """Of the lanes that were asked last. The loss, fp32 []."""
        losses = [loss_in(model, output) for output in outputs]
        for lane, loss in zip(self._lanes, losses, strict=True):
            if loss.num_items != sum(lane.counts):
                raise UserError(
                    f"training.objective {self._config.objective}: expected a loss of the next token from "
                    f"{type(model).__name__}, found one of other tokens"
                )
        head.sequence_backward(losses, self._versions, self._weigh, self.temperature)
        return self._loss

    def _weigh(self, log_probs: list[torch.Tensor]) -> list[torch.Tensor]:
        trained = self._versions.trained
        found = [one.detach().cpu().requires_grad_(i < trained) for i, one in enumerate(log_probs)]
        with torch.enable_grad():
            loss, self._logged = self.of_lanes(self._lanes, found)
        loss.backward()
        self._loss = loss.detach()
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in found[:trained]]


class _StepLoss:
    """A `StepLoss` of an objective's lanes."""

    def __init__(self, objective: Judged, model: nn.Module, head: TiledHead) -> None:
        self._objective = objective
        self._model = model
        self._head = head

    def watch(self, lanes: int) -> Sequence[AbstractContextManager]:
        return ()

    def backward(self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[Any]) -> torch.Tensor:
        return self._objective.backward(self._model, self._head, outputs)

    def values(
        self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[Any], variants: int
    ) -> StepLosses:
        raise NotImplementedError("objectives of judged answers are evaluated by scores of tokens")
