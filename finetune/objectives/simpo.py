"""simpo: preference optimisation with a reference-free reward (Meng et al. 2024, equation 6)."""

from __future__ import annotations

import torch

from finetune.objectives.answers import Answers, Pairs
from finetune.objectives.cpo import CPO
from finetune.objectives.pair_losses import sigmoid_loss


class SimPO(CPO):
    """The reward is beta times the mean log-probability of an answer's tokens; the chosen one's is to be larger by gamma."""

    def losses(self, pairs: Pairs) -> torch.Tensor:
        options = self._config.preference
        difference = pairs.chosen.means - pairs.rejected.means
        return sigmoid_loss(self.beta * (difference - options.simpo_gamma / self.beta), options.label_smoothing)

    def log_probs(self, answers: Answers) -> torch.Tensor:
        return answers.means
