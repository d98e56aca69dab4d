"""reward: a model that gives texts scores, of pairs of which one is to have the higher one (Bradley-Terry, as in Ouyang et al.
2022, equation 1; with margins as in Touvron et al. 2023, equation 2).

-log sigmoid(s(chosen) - s(rejected) - margin), its mean over the pairs of a step, and `reward.center_rewards_coefficient` times
the mean of (s(chosen) + s(rejected))^2 (Eisenstein et al. 2023). The model is what Transformers makes with one label
(AutoModelForSequenceClassification); the score is that at the last token which is not padding. What is logged has TRL's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from finetune.config import Config
from finetune.data import Example, TokenDataset, collate
from finetune.data.batches import Row
from finetune.data.micro_batches import MicroBatches, make_micro_batches
from finetune.objectives.base import Objective, scored_shape
from finetune.objectives.scoring import Asked, Scores
from finetune.offload.step.head import TiledHead
from finetune.offload.step.own_loss import StepLoss, StepLosses
from finetune.offload.streamed_model import StreamedModel
from finetune.offload.weights.parts import ModelParts
from finetune.planned_run import BatchShape
from finetune.session import Session


class RewardModel(Objective):
    """The chosen texts of a micro-batch are one lane, the rejected ones another."""

    has_gradient = True
    judged = "scores"

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        self._config = config
        self._data = data
        self.lengths = np.asarray(data.lengths).reshape(-1, 2).max(axis=1)
        self._margins = torch.from_numpy(data.margins)
        self._rows: list[int] = []  # of the step
        self._logged: dict[str, float] = {}
        # By this the model finds the last token of a text.
        session.parts.model.config.get_text_config().pad_token_id = data.pad_token_id

    @classmethod
    def check_model(cls, parts: ModelParts) -> None:
        """Made so, it is one that gives scores."""

    @classmethod
    def full_shape(cls, config: Config, session: Session, longest: int) -> BatchShape:
        shape = scored_shape(config, longest)
        return replace(shape, micro_batches=2 * shape.micro_batches)

    def shape(self, session: Session) -> BatchShape:
        return self.full_shape(self._config, session, int(self.lengths.max()))

    def lanes(self, groups: Sequence[Sequence[Row]], device: torch.device) -> MicroBatches:
        self._rows = [row[0] for rows in groups for row in rows]
        sides = [[(2 * row[0] + side,) for row in rows] for rows in groups for side in (0, 1)]
        batches = make_micro_batches(self._data, sides, device)
        return replace(batches, labels=[None] * len(batches.inputs))

    def of_pairs(
        self, chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """(the loss, fp32 [], differentiable; what is logged) of scores and margins, fp32 [pairs] each."""
        difference = chosen - rejected
        loss = -functional.logsigmoid(difference - margins).mean()
        if (coefficient := self._config.reward.center_rewards_coefficient) is not None:
            loss = loss + coefficient * torch.mean((chosen + rejected) ** 2)
        scores = torch.cat([chosen, rejected]).detach()
        logged = {
            "min_reward": scores.min(),
            "mean_reward": scores.mean(),
            "max_reward": scores.max(),
            "accuracy": (chosen > rejected).float().mean(),
            "margin": difference.detach().mean(),
        }
        return loss, {name: float(value) for name, value in logged.items()}

    def backward(self, outputs: Sequence[Any]) -> torch.Tensor:
        """Of the lanes that were asked last. The loss, fp32 []."""
        scores = [output.logits[:, 0] for output in outputs]
        leaves = [one.detach().float().cpu().requires_grad_() for one in scores]
        with torch.enable_grad():
            chosen, rejected = torch.cat(leaves[::2]), torch.cat(leaves[1::2])
            loss, self._logged = self.of_pairs(chosen, rejected, self._margins[self._rows])
        loss.backward()
        for score, leaf in zip(scores, leaves, strict=True):
            score.backward(leaf.grad.to(score))
        return loss.detach()

    def logged(self) -> dict[str, float]:
        return self._logged

    def make_loss(self, model: nn.Module, head: TiledHead | None) -> StepLoss:
        return _StepLoss(self)

    def measured(self) -> ScoredTexts:
        return ScoredTexts(self, self._data, self._margins)


class _StepLoss:
    """A `StepLoss` of the objective's lanes."""

    def __init__(self, objective: RewardModel) -> None:
        self._objective = objective

    def watch(self, lanes: int) -> Sequence[AbstractContextManager]:
        return ()

    def backward(self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[Any]) -> torch.Tensor:
        return self._objective.backward(outputs)

    def values(
        self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[Any], variants: int
    ) -> StepLosses:
        raise NotImplementedError("scores are evaluated by rows")


class ScoredTexts:
    """Pairs that are measured, see `finetune.objectives.judged.MeasuredRows`: 2 r and 2 r + 1 are the accounts of pair r."""

    versions = 1

    def __init__(self, objective: RewardModel, data: TokenDataset, margins: torch.Tensor) -> None:
        self._objective = objective
        self._data = data
        self._margins = margins
        self._order = np.argsort(-objective.lengths, kind="stable")
        self.num_accounts = len(data)
        self.max_length = int(objective.lengths.max())
        self.tokens = int(np.asarray(data.lengths).sum())
        self.pad_token_id = data.pad_token_id

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[Asked]]:
        for pair in self._order.tolist():
            yield [self._ask(2 * pair + side) for side in (0, 1)]

    def _ask(self, index: int) -> Asked:
        ids = self._data[index].input_ids
        return Asked(ids, np.array([len(ids) - 1]), ids[-1:], np.array([index]))

    def ask(self, streamed: StreamedModel, lanes: Sequence[Sequence[Asked]], versions: Sequence[int]) -> list[Scores]:
        """Scores in place of cross entropies."""
        inputs = []
        for lane in lanes:
            batch = collate([[Example(one.input_ids, one.input_ids)] for one in lane], self.pad_token_id)
            del batch["labels"]
            on_device = {key: value.to(streamed.device.torch_device) for key, value in batch.items()}
            inputs.append(on_device | {"use_cache": False})
        found = [output.logits[:, 0].float().cpu().numpy() for output in streamed.forward(inputs, versions)]
        return [Scores(scores, np.zeros(len(scores), bool)) for scores in found]

    def result(self, totals: np.ndarray) -> dict[str, float]:
        scores = torch.from_numpy(totals.reshape(-1, 2)).float()
        loss, logged = self._objective.of_pairs(scores[:, 0], scores[:, 1], self._margins)
        return {"loss": float(loss), **logged, "examples": len(self)}
