"""What objectives share that compare a row's completion with all completions of the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.data.batches import Row
from finetune.memory.errors import UserError
from finetune.objectives.base import rows_of, scored_shape
from finetune.objectives.scored import Scored
from finetune.objectives.scoring import Asked, ask_candidates
from finetune.offload.perturb.variants import Variant
from finetune.offload.streamed_model import StreamedModel
from finetune.planned_run import BatchShape
from finetune.session import Session


class Candidates(Scored):
    """The score of a candidate is the sum of its tokens' log-probabilities; an end-of-text token after it does not count."""

    compares_choices = True

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        super().__init__(config, session, data)
        self._num = data.num_choices
        if self._num < 2:
            raise UserError(
                f"zo.objective {config.objective}: expected rows that choose among 2 or more different completions, "
                "all rows have the same one"
            )
        self.lengths = self.lengths.reshape(-1, self._num).max(axis=1)

    def shape(self, session: Session) -> BatchShape:
        most = max(len(self._ask(row, 0)) for row in range(len(self.lengths)))
        return scored_shape(self._config, int(self.lengths.max()), most)

    def values(
        self, model: StreamedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        rows = rows_of(groups)
        asked = [one for i, row in enumerate(rows) for one in self._ask(row, i * self._num)]
        results, tokens = self._scores(model, asked, variants)
        losses = np.zeros((len(variants), len(rows) * self._num))
        for one, versions in results:
            for variant, scores in enumerate(versions):
                np.add.at(losses[variant], one.accounts, scores.losses)
        likelihoods = -losses.reshape(len(variants), len(rows), self._num)
        return self.of_rows(likelihoods, self._data.answers[rows]).mean(axis=1).astype(np.float32), tokens

    @abstractmethod
    def of_rows(self, likelihoods: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """What counts of each row, [variants, rows].

        likelihoods: fp64 [variants, rows, candidates], logarithms. answers: int [rows], the right candidates.
        """

    def _ask(self, row: int, account: int) -> list[Asked]:
        candidates = [self._data[row * self._num + k].input_ids for k in range(self._num)]
        return ask_candidates(candidates, account)
