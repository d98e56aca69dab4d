"""accuracy: how often the likeliest completion is another than the row's."""

from __future__ import annotations

import numpy as np

from finetune.objectives.candidates import Candidates


class Accuracy(Candidates):
    """Share of rows whose likeliest completion is another than theirs."""

    def of_rows(self, likelihoods: np.ndarray, answers: np.ndarray) -> np.ndarray:
        return likelihoods.argmax(axis=2) != answers
