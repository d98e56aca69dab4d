"""Pairs of answers that are measured: sequences and what is asked of them, and what an objective makes of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from finetune.data import TokenDataset
from finetune.data.cache import MASKED
from finetune.objectives.answers import Answers, Pairs
from finetune.objectives.scoring import Asked, Scores, score
from finetune.offload.streamed_model import StreamedModel

if TYPE_CHECKING:
    from finetune.objectives.preference import Preference


class PreferenceRows:
    """Pairs, of each the chosen answer, then the rejected one.

    accounts: 3 r and 3 r + 1 for the answers of pair r; 3 r + 2 for the rest of a chosen text whose cross entropy is asked for.
    """

    def __init__(self, objective: Preference, data: TokenDataset, versions: int) -> None:
        self._objective = objective
        self._data = data
        self._order = np.argsort(-objective.lengths, kind="stable")
        self._counts = np.zeros(3 * len(self._order))
        self.versions = versions
        self.max_length = int(objective.lengths.max())
        self.tokens = self.versions * int(np.asarray(data.lengths).sum())
        self.pad_token_id = data.pad_token_id

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[Asked]]:
        for pair in self._order:
            yield [self._ask(int(pair), side) for side in (0, 1)]

    @property
    def num_accounts(self) -> int:
        return len(self._counts)

    def ask(self, streamed: StreamedModel, lanes: Sequence[Sequence[Asked]], versions: Sequence[int]) -> list[Scores]:
        return score(streamed, lanes, self.pad_token_id, versions)

    def result(self, totals: np.ndarray) -> dict[str, float]:
        sums = torch.from_numpy(-totals.reshape(self.versions, -1, 3)).float()
        counts = torch.from_numpy(self._counts.reshape(-1, 3)).float()
        chosen, rejected = (
            Answers(sums[0, :, side], counts[:, side], sums[1, :, side] if self.versions == 2 else None) for side in (0, 1)
        )
        texts, tokens = sums[0, :, 0], counts[:, 0]
        if self._objective.nll_of_prompts:
            texts, tokens = texts + sums[0, :, 2], tokens + counts[:, 2]
        loss, logged = self._objective.of_pairs(Pairs(chosen, rejected, texts, int(tokens.sum())))
        return {"loss": float(loss), **logged, "examples": len(self)}

    def _ask(self, pair: int, side: int) -> Asked:
        example = self._data[2 * pair + side]
        of_answer = example.labels[1:] != MASKED
        asked = of_answer | (self._objective.nll_of_prompts and side == 0)
        positions = np.flatnonzero(asked)
        accounts = np.where(of_answer[positions], 3 * pair + side, 3 * pair + 2)
        self._counts[3 * pair + side] = of_answer.sum()
        if side == 0:
            self._counts[3 * pair + 2] = (~of_answer).sum()
        return Asked(example.input_ids, positions, example.input_ids[1:][positions], accounts)
