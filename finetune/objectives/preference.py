"""What objectives have in common that compare two answers to one prompt.

The chosen answers of a micro-batch are one lane, the rejected ones another; with a reference there are as many more.

The loss is the mean over the pairs of a step. With `nll_weight`, the mean cross entropy of the chosen answers' tokens, over the
step, is added. What is logged has TRL's names: rewards/chosen, rewards/rejected, rewards/accuracies (how often the first is
larger), rewards/margins, logps/chosen, logps/rejected; nll_loss where it is a part.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.data.batches import Row
from finetune.data.cache import MASKED
from finetune.data.micro_batches import MicroBatches, make_micro_batches
from finetune.objectives.answers import Answers, LabelledLane, Pairs, joined
from finetune.objectives.base import scored_shape
from finetune.objectives.judged import Judged
from finetune.objectives.preference_rows import PreferenceRows
from finetune.objectives.registry import find_objective
from finetune.offload.step.engine import Versions
from finetune.planned_run import BatchShape
from finetune.session import Session


class Preference(Judged):
    """A subclass says what a pair costs, and what it calls the reward of an answer."""

    judged = "pairs"
    nll_weight: float = 0.0
    """Of the mean cross entropy of the chosen answers."""
    nll_of_prompts: bool = False
    """Whether that is over their prompts too."""

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        super().__init__(config, session, data)
        self.lengths = np.asarray(data.lengths).reshape(-1, 2).max(axis=1)
        self._has_reference = find_objective(config.objective).has_reference

    @classmethod
    def full_shape(cls, config: Config, session: Session, longest: int) -> BatchShape:
        cls.check_head(config, session)
        shape = scored_shape(config, longest)
        shape = replace(shape, micro_batches=2 * shape.micro_batches)
        return replace(shape, forward_lanes=shape.micro_batches) if find_objective(config.objective).has_reference else shape

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
        labels, lanes = list(batches.labels), []
        for index, answers in enumerate(batches.labels):
            asks_text = self.nll_of_prompts and index % 2 == 0
            if asks_text:
                labels[index] = _labels_of_text(batches.inputs[index])
            lanes.append(LabelledLane.of(labels[index], answers if asks_text else None))
        count, times = len(lanes), 2 if self._has_reference else 1
        versions = Versions([version for version in range(times) for _ in lanes], count)
        return self.asked(replace(batches, inputs=batches.inputs * times, labels=labels * times), lanes * times, versions)

    def of_lanes(
        self, lanes: Sequence[LabelledLane], log_probs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        count = len(lanes) // 2 if self._has_reference else len(lanes)
        references = log_probs[count:] or [None] * count
        parts = [lane.answers(*one) for lane, *one in zip(lanes[:count], log_probs[:count], references, strict=True)]
        chosen, rejected = joined([one for one, _ in parts[::2]]), joined([one for one, _ in parts[1::2]])
        text_sums = torch.cat([text for _, text in parts[::2]])
        return self.of_pairs(Pairs(chosen, rejected, text_sums, sum(sum(lane.counts) for lane in lanes[:count:2])))

    def measured(self) -> PreferenceRows:
        return PreferenceRows(self, self._data, 2 if self._has_reference else 1)


def _labels_of_text(inputs: dict[str, Any]) -> torch.Tensor:
    """int64 [B, T]: every token but the first and padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    labels = ids.clone() if mask is None else ids.masked_fill(mask == 0, MASKED)
    labels[:, 0] = MASKED
    return labels
