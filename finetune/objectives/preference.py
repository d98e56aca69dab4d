"""What objectives have in common that compare two answers to one prompt.

The chosen answers of a micro-batch are one lane, the rejected ones another. An objective with a reference has every lane a
second time, under the weights without the adapter: these lanes only go forward, in the same visits of blocks. So a step reads
the base as often as one of supervised training. See [Note: losses of sequences] in `offload.step.sequence_loss`.

The loss is the mean over the pairs of a step. With `nll_weight`, the mean cross entropy of the chosen answers' tokens, over the
step, is added. What is logged has TRL's names: rewards/chosen, rewards/rejected, rewards/accuracies (how often the first is
larger), rewards/margins, logps/chosen, logps/rejected; nll_loss where it is a part.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.data.batches import Row
from finetune.data.cache import MASKED
from finetune.data.micro_batches import MicroBatches, make_micro_batches
from finetune.objectives.base import Objective, scored_shape
from finetune.objectives.registry import find_objective
from finetune.objectives.router_loss import RouterLoss
from finetune.planned_run import BatchShape
from finetune.session import Session
from memory.errors import UserError
from offload.perturb.variants import Variant
from offload.step.engine import Versions
from offload.step.head import TiledHead
from offload.step.own_loss import StepLoss, StepLosses, loss_in
from offload.streamed_model import StreamedModel


@dataclass(frozen=True, slots=True)
class Answers:
    """The chosen or the rejected answers of some pairs. All fp32 [pairs]."""

    sums: torch.Tensor  # of the log-probabilities of an answer's tokens
    counts: torch.Tensor  # of these
    reference: torch.Tensor | None = None  # the same sums, of the reference

    @property
    def means(self) -> torch.Tensor:
        return self.sums / self.counts

    @property
    def log_ratios(self) -> torch.Tensor:
        """Of the model to its reference."""
        return self.sums - self.reference


@dataclass(frozen=True, slots=True)
class Pairs:
    """Some pairs, and the text whose cross entropy is added, where one is. text_sums: fp32 [pairs], of log-probabilities."""

    chosen: Answers
    rejected: Answers
    text_sums: torch.Tensor
    text_tokens: int


class Preference(Objective):
    """A subclass says what a pair costs, and what it calls the reward of an answer."""

    has_gradient = True
    judged = "pairs"
    nll_weight: float = 0.0
    """Of the mean cross entropy of the chosen answers."""
    nll_of_prompts: bool = False
    """Whether that is over their prompts too."""

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        self._config = config
        self._data = data
        self.lengths = np.asarray(data.lengths).reshape(-1, 2).max(axis=1)
        self._routers = RouterLoss(config.training, session.parts.model)
        self.beta = config.preference.beta_of(config.objective)
        self._lanes: list[_Lane] = []
        self._loss = torch.zeros(())
        self._logged: dict[str, float] = {}

    @classmethod
    def full_shape(cls, config: Config, session: Session, longest: int) -> BatchShape:
        if session.parts.head is None:
            raise UserError(
                f"training.objective: expected a language model, whose head is a linear layer, with {config.objective}, found "
                f"{type(session.parts.model).__name__}"
            )
        shape = scored_shape(config, longest)
        shape = replace(shape, micro_batches=2 * shape.micro_batches)
        return replace(shape, forward_lanes=shape.micro_batches) if find_objective(config.objective).has_reference else shape

    def shape(self, session: Session) -> BatchShape:
        return self.full_shape(self._config, session, int(self.lengths.max()))

    @abstractmethod
    def losses(self, pairs: Pairs) -> torch.Tensor:
        """Of each pair, fp32 [pairs], differentiable."""

    @abstractmethod
    def rewards(self, answers: Answers) -> torch.Tensor:
        """Of each answer, fp32 [pairs]."""

    def more_logged(self, pairs: Pairs) -> dict[str, float]:
        """Beside what all objectives log."""
        return {}

    def of_pairs(self, pairs: Pairs) -> tuple[torch.Tensor, dict[str, float]]:
        """(the loss, fp32 [], differentiable; what is logged)."""
        loss = self.losses(pairs).mean()
        chosen, rejected = self.rewards(pairs.chosen).detach(), self.rewards(pairs.rejected).detach()
        logged = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": self.log_probs(pairs.chosen).detach().mean(),
            "logps/rejected": self.log_probs(pairs.rejected).detach().mean(),
            **self.more_logged(pairs),
        }
        if self.nll_weight:
            nll = -pairs.text_sums.sum() / pairs.text_tokens
            loss = loss + self.nll_weight * nll
            logged["nll_loss"] = nll.detach()
        return loss, {name: float(value) for name, value in logged.items()}

    def log_probs(self, answers: Answers) -> torch.Tensor:
        """That are logged of each answer, and compared: of the whole, or the mean over its tokens."""
        return answers.sums

    def lanes(self, groups: Sequence[Sequence[Row]], device: torch.device) -> MicroBatches:
        sides = [[(2 * row[0] + side,) for row in rows] for rows in groups for side in (0, 1)]
        batches = make_micro_batches(self._data, sides, device)
        batches = replace(batches, inputs=[kwargs | self._routers.inputs for kwargs in batches.inputs])
        labels, self._lanes = list(batches.labels), []
        for index, answers in enumerate(batches.labels):
            asks_text = self.nll_of_prompts and index % 2 == 0
            if asks_text:
                labels[index] = _labels_of_text(batches.inputs[index])
            self._lanes.append(_Lane.of(labels[index], answers if asks_text else None))
        count = len(labels)
        if not find_objective(self._config.objective).has_reference:
            return replace(batches, labels=labels, versions=Versions([0] * count, count))
        return replace(
            batches, inputs=batches.inputs * 2, labels=labels * 2, versions=Versions([0] * count + [1] * count, count)
        )

    def make_loss(self, model: nn.Module, head: TiledHead | None) -> StepLoss:
        return _StepLoss(self, model, head)

    def logged(self) -> dict[str, float]:
        return self._logged

    def values(
        self, model: StreamedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        raise NotImplementedError("method zo is refused with objectives that compare answers")

    def backward(self, model: nn.Module, head: TiledHead, outputs: list[Any]) -> torch.Tensor:
        """Of the lanes that `lanes` has made last. The loss, fp32 []."""
        losses, count = [loss_in(model, output) for output in outputs], len(self._lanes)
        for i, loss in enumerate(losses):
            if loss.num_items != sum(self._lanes[i % count].counts):
                raise UserError(
                    f"training.objective {self._config.objective}: expected a loss of the next token from "
                    f"{type(model).__name__}, found one of other tokens"
                )
        of_lanes = [0] * count + [1] * (len(losses) - count)
        head.sequence_backward(losses, Versions(of_lanes, count), self._weigh)
        return self._loss

    def _weigh(self, log_probs: list[torch.Tensor]) -> list[torch.Tensor]:
        count = len(self._lanes)
        leaves = [one.detach().cpu().requires_grad_() for one in log_probs[:count]]
        references = [one.cpu() for one in log_probs[count:]] or [None] * count
        with torch.enable_grad():
            lanes = zip(self._lanes, leaves, references, strict=True)
            parts = [lane.answers(leaf, reference) for lane, leaf, reference in lanes]
            chosen, rejected = _joined([one for one, _ in parts[::2]]), _joined([one for one, _ in parts[1::2]])
            text_sums = torch.cat([text for _, text in parts[::2]])
            loss, self._logged = self.of_pairs(
                Pairs(chosen, rejected, text_sums, sum(sum(lane.counts) for lane in self._lanes[::2]))
            )
        loss.backward()
        self._loss = loss.detach()
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


@dataclass(frozen=True, slots=True)
class _Lane:
    """counts: labelled tokens of each sequence. of_answers: bool [labels of the lane], which are of answers; None: all are."""

    counts: list[int]
    of_answers: torch.Tensor | None

    @classmethod
    def of(cls, labels: torch.Tensor, answers: torch.Tensor | None) -> _Lane:
        """labels: int64 [B, T], what the model is asked. answers: the same of the answers alone; None: `labels` are."""
        counts = (labels != MASKED).sum(dim=1).tolist()
        return cls(counts, None if answers is None else (answers != MASKED)[labels != MASKED].cpu())

    def answers(self, log_probs: torch.Tensor, reference: torch.Tensor | None) -> tuple[Answers, torch.Tensor]:
        """The answers, and sums over all labels [sequences]. log_probs, reference: fp32 [labels of the lane]."""
        texts = log_probs.split(self.counts)
        if self.of_answers is None:
            answers, text_sums = texts, _sums(texts)
        else:
            flags = self.of_answers.split(self.counts)
            answers, text_sums = [one[flag] for one, flag in zip(texts, flags, strict=True)], _sums(texts)
        counts = torch.tensor([float(len(one)) for one in answers])
        sums = text_sums if self.of_answers is None else _sums(answers)
        return Answers(sums, counts, None if reference is None else _sums(reference.split(self.counts))), text_sums


def _sums(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.sum() for part in parts])


def _joined(parts: Sequence[Answers]) -> Answers:
    """One behind the other."""
    references = [one.reference for one in parts if one.reference is not None]
    return Answers(
        torch.cat([one.sums for one in parts]),
        torch.cat([one.counts for one in parts]),
        torch.cat(references) if references else None,
    )


def _labels_of_text(inputs: dict[str, Any]) -> torch.Tensor:
    """int64 [B, T]: every token but the first and padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    labels = ids.clone() if mask is None else ids.masked_fill(mask == 0, MASKED)
    labels[:, 0] = MASKED
    return labels


class _StepLoss:
    """A `StepLoss` of an objective's lanes."""

    def __init__(self, objective: Preference, model: nn.Module, head: TiledHead) -> None:
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
        raise NotImplementedError("objectives that compare answers are evaluated by scores of tokens")
