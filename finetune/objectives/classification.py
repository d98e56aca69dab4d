"""classification: MeZO's train_as_classification (Malladi et al. 2023)."""

from __future__ import annotations

import numpy as np

from finetune.objectives.candidates import Candidates


class Classification(Candidates):
    """Mean cross entropy of the right one among the data's few completions."""

    def of_rows(self, likelihoods: np.ndarray, answers: np.ndarray) -> np.ndarray:
        most = likelihoods.max(axis=2)
        log_sum = most + np.log(np.exp(likelihoods - most[..., None]).sum(axis=2))
        return log_sum - likelihoods[:, np.arange(len(answers)), answers]
