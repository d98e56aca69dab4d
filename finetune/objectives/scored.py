"""Objectives of what the model says of given tokens: one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.objectives.base import Objective
from finetune.objectives.errors import StepNotKept
from finetune.objectives.scoring import Asked, Scores, score
from finetune.offload.perturb.variants import Variant
from finetune.offload.streamed_model import StreamedModel
from finetune.session import Session


class Scored(Objective):
    """Counts scores of tokens; see [Note: what is asked of a sequence] in `finetune.objectives.scoring`."""

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        self._config = config
        self._data = data
        self.lengths = np.asarray(data.lengths)

    def _scores(
        self, model: StreamedModel, asked: Sequence[Asked], variants: Sequence[Variant]
    ) -> tuple[list[tuple[Asked, list[Scores]]], int]:
        """Every sequence with what each variant says of it, and their tokens."""
        asked = sorted(asked, key=lambda one: -len(one.input_ids))
        size = self._config.training.micro_batch_size
        lanes = [asked[start : start + size] for start in range(0, len(asked), size)]
        with model.weights.under(variants):
            versions = [variant for variant in range(len(variants)) for _ in lanes]
            found = score(model, lanes * len(variants), self._data.pad_token_id, versions)
        if not all(np.isfinite(scores.losses).all() for scores in found):
            # What counts, such as accuracy, would be finite all the same.
            raise StepNotKept("a token's likelihood is not finite: lower training.learning_rate or zo.epsilon")
        results = []
        for index, lane in enumerate(lanes):
            ends = np.cumsum([len(one.positions) for one in lane])[:-1]
            of_lane = [found[v * len(lanes) + index] for v in range(len(variants))]
            pieces = [
                list(zip(*(np.split(values, ends) for values in scores if values is not None), strict=True))
                for scores in of_lane
            ]
            for i, one in enumerate(lane):
                results.append((one, [Scores(*pieces[v][i]) for v in range(len(variants))]))
        return results, sum(len(one.input_ids) for one in asked)
