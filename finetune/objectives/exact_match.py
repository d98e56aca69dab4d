"""exact_match: how often greedy decoding gives another completion than the row's.

A completion is what greedy decoding gives where each of its tokens is the likeliest after those before it, so this takes one
pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.data.batches import Row
from finetune.objectives.base import rows_of, scored_shape
from finetune.objectives.scored import Scored
from finetune.objectives.scoring import ask_trained
from finetune.offload.perturb.variants import Variant
from finetune.offload.streamed_model import StreamedModel
from finetune.planned_run import BatchShape
from finetune.session import Session


class ExactMatch(Scored):
    """Share of rows of which some trained token is not the likeliest."""

    def shape(self, session: Session) -> BatchShape:
        return scored_shape(self._config, int(self.lengths.max()))

    def values(
        self, model: StreamedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        results, tokens = self._scores(model, [ask_trained(self._data[row]) for row in rows_of(groups)], variants)
        wrong = [[not scores.likeliest.all() for scores in versions] for _, versions in results]
        return np.mean(wrong, axis=0, dtype=np.float64).astype(np.float32), tokens
