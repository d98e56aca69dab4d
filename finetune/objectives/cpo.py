"""cpo: contrastive preference optimisation (Xu et al. 2024), without a reference."""

from __future__ import annotations

import torch

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.objectives.answers import Answers, Pairs
from finetune.objectives.pair_losses import hinge_loss, ipo_loss, sigmoid_loss
from finetune.objectives.preference import Preference
from finetune.session import Session


class CPO(Preference):
    """The margin is beta times the difference of log-probabilities; cross entropy of the chosen answers is added."""

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        super().__init__(config, session, data)
        self.nll_weight = config.preference.cpo_alpha_of(config.objective)

    def losses(self, pairs: Pairs) -> torch.Tensor:
        options = self._config.preference
        difference = self.log_probs(pairs.chosen) - self.log_probs(pairs.rejected)
        if options.loss_type == "ipo":
            return ipo_loss(difference, self.beta)
        if options.loss_type == "hinge":
            return hinge_loss(self.beta * difference)
        return sigmoid_loss(self.beta * difference, options.label_smoothing)

    def log_probs(self, answers: Answers) -> torch.Tensor:
        return answers.means if self._config.preference.loss_type == "ipo" else answers.sums

    def rewards(self, answers: Answers) -> torch.Tensor:
        return self.beta * self.log_probs(answers)
