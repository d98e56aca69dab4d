"""kto: Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equations 7 and 8), its reference the model without the adapter.

With r = log(p / reference) of an answer, z the mean of the same over mismatched pairs (each prompt of the step with the answer
of the row before it), at least 0 and without a gradient: 1 - sigmoid(beta (r - z)) of an answer that is wanted, else
1 - sigmoid(beta (z - r)). Every lane has a partner of mismatched pairs, which only goes forward, and both have a reference's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from finetune.config import Config
from finetune.data import Example, TokenDataset
from finetune.data.batches import Row
from finetune.data.cache import MASKED
from finetune.data.micro_batches import MicroBatches, make_micro_batches
from finetune.objectives.answers import LabelledLane, sums_of
from finetune.objectives.base import scored_shape
from finetune.objectives.judged import Judged
from finetune.objectives.scoring import Asked, Scores, ask_trained, score
from finetune.offload.step.engine import Versions
from finetune.offload.streamed_model import StreamedModel
from finetune.planned_run import BatchShape
from finetune.session import Session


class KTO(Judged):
    judged = "labels"

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        super().__init__(config, session, data)
        self._wanted = torch.from_numpy(data.answers == 1)
        self._rows: list[int] = []  # of the step
        self.lengths = np.asarray(data.lengths)
        prompts = np.array([_prompt_tokens(data[index]) for index in range(len(data))])
        longest = int(prompts.max() + (self.lengths - prompts).max())
        self.longest = max(int(self.lengths.max()), min(longest, data.meta["sequence_length"]))

    @classmethod
    def full_shape(cls, config: Config, session: Session, longest: int) -> BatchShape:
        cls.check_head(config, session)
        shape = scored_shape(config, longest)
        return replace(shape, forward_lanes=3 * shape.micro_batches)

    def shape(self, session: Session) -> BatchShape:
        return self.full_shape(self._config, session, self.longest)

    def lanes(self, groups: Sequence[Sequence[Row]], device: torch.device) -> MicroBatches:
        self._rows = [row[0] for rows in groups for row in rows]
        before = dict(zip(self._rows, [self._rows[-1], *self._rows[:-1]], strict=True))
        matched = make_micro_batches(self._data, groups, device)
        others = make_micro_batches(Mismatched(self._data, before), groups, device)
        labels = matched.labels + others.labels
        versions = Versions([version for version in (0, 1) for _ in labels], len(matched.labels))
        batches = replace(matched, inputs=(matched.inputs + others.inputs) * 2, labels=labels * 2)
        return self.asked(batches, [LabelledLane.of(one, None) for one in labels] * 2, versions)

    def of_lanes(
        self, lanes: Sequence[LabelledLane], log_probs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        sums = [sums_of(one.split(lane.counts)) for lane, one in zip(lanes, log_probs, strict=True)]
        size = len(sums) // 4
        matched, others, reference, others_reference = (torch.cat(sums[i : i + size]) for i in range(0, len(sums), size))
        return self.of_rows(matched, reference, others - others_reference, self._wanted[self._rows])

    def of_rows(
        self, sums: torch.Tensor, reference: torch.Tensor, mismatched: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """sums: of log-probabilities. mismatched: log(p / reference) of mismatched pairs. fp32 [rows] each. wanted: bool
        [rows]."""
        options, ratios = self._config.preference, sums - reference
        kl = mismatched.detach().mean().clamp(min=0)
        desirable = options.desirable_weight * (1 - torch.sigmoid(self.beta * (ratios - kl)))
        undesirable = options.undesirable_weight * (1 - torch.sigmoid(self.beta * (kl - ratios)))
        logged, rewards = {"kl": float(kl)}, self.beta * ratios.detach()
        for name, rows in (("chosen", wanted), ("rejected", ~wanted)):
            if rows.any():
                logged |= {
                    f"rewards/{name}": float(rewards[rows].mean()),
                    f"logps/{name}": float(sums.detach()[rows].mean()),
                }
        if wanted.any() and not wanted.all():
            logged["rewards/margins"] = logged["rewards/chosen"] - logged["rewards/rejected"]
        return torch.where(wanted, desirable, undesirable).mean(), logged

    def measured(self) -> LabelledRows:
        return LabelledRows(self, self._data)


class Mismatched:
    """Examples of the prompt of one row and the answer of another. before: whose answer each row gets."""

    def __init__(self, data: TokenDataset, before: Mapping[int, int]) -> None:
        self._data = data
        self._before = before
        self.pad_token_id = data.pad_token_id

    def __getitem__(self, index: int) -> Example:
        row, other = self._data[index], self._data[self._before[index]]
        end, start = _prompt_tokens(row), _prompt_tokens(other)
        limit = slice(self._data.meta["sequence_length"])
        return Example(
            np.concatenate([row.input_ids[:end], other.input_ids[start:]])[limit],
            np.concatenate([row.labels[:end], other.labels[start:]])[limit],
        )


class LabelledRows:
    """Rows that are measured, see `finetune.objectives.judged.MeasuredRows`: 2 r is the account of row r, 2 r + 1 that of its
    prompt with the answer of the row before it."""

    versions = 2

    def __init__(self, objective: KTO, data: TokenDataset) -> None:
        self._objective = objective
        self._data = data
        self._order = np.argsort(-objective.lengths, kind="stable")
        count = len(self._order)
        self._others = Mismatched(data, {row: (row - 1) % count for row in range(count)})
        self.num_accounts = 2 * count
        self.max_length = objective.longest
        self.tokens = 4 * int(objective.lengths.sum())
        self.pad_token_id = data.pad_token_id

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[Asked]]:
        for row in self._order.tolist():
            yield [ask_trained(self._data[row], 2 * row), ask_trained(self._others[row], 2 * row + 1)]

    def ask(self, streamed: StreamedModel, lanes: Sequence[Sequence[Asked]], versions: Sequence[int]) -> list[Scores]:
        return score(streamed, lanes, self.pad_token_id, versions)

    def result(self, totals: np.ndarray) -> dict[str, float]:
        sums = torch.from_numpy(-totals.reshape(2, -1, 2)).float()
        wanted = torch.from_numpy(self._data.answers == 1)
        loss, logged = self._objective.of_rows(sums[0, :, 0], sums[1, :, 0], sums[0, :, 1] - sums[1, :, 1], wanted)
        return {"loss": float(loss), **logged, "examples": len(self)}


def _prompt_tokens(example: Example) -> int:
    """Before the first that is trained."""
    return int(np.argmax(example.labels != MASKED))
