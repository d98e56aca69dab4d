"""What objectives of preferences look at: log-probabilities of answers, put together of those of a lane's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetune.data.cache import MASKED


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


@dataclass(frozen=True, slots=True)
class LabelledLane:
    """counts: labelled tokens of each sequence. of_answers: bool [labels of the lane], which are of answers; None: all are."""

    counts: list[int]
    of_answers: torch.Tensor | None

    @classmethod
    def of(cls, labels: torch.Tensor, answers: torch.Tensor | None) -> LabelledLane:
        """labels: int64 [B, T], what the model is asked. answers: the same of the answers alone; None: `labels` are."""
        counts = (labels != MASKED).sum(dim=1).tolist()
        return cls(counts, None if answers is None else (answers != MASKED)[labels != MASKED].cpu())

    def answers(self, log_probs: torch.Tensor, reference: torch.Tensor | None) -> tuple[Answers, torch.Tensor]:
        """The answers, and sums over all labels [sequences]. log_probs, reference: fp32 [labels of the lane]."""
        texts = log_probs.split(self.counts)
        if self.of_answers is None:
            answers, text_sums = texts, sums_of(texts)
        else:
            flags = self.of_answers.split(self.counts)
            answers, text_sums = [one[flag] for one, flag in zip(texts, flags, strict=True)], sums_of(texts)
        counts = torch.tensor([float(len(one)) for one in answers])
        sums = text_sums if self.of_answers is None else sums_of(answers)
        return Answers(sums, counts, None if reference is None else sums_of(reference.split(self.counts))), text_sums


def sums_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32 [parts]."""
    return torch.stack([part.sum() for part in parts])


def joined(parts: Sequence[Answers]) -> Answers:
    """One behind the other."""
    references = [one.reference for one in parts if one.reference is not None]
    return Answers(
        torch.cat([one.sums for one in parts]),
        torch.cat([one.counts for one in parts]),
        torch.cat(references) if references else None,
    )
