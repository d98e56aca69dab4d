"""dpo: direct preference optimisation (Rafailov et al. 2023), its reference the model without the adapter."""

from __future__ import annotations

import torch

from finetune.objectives.answers import Answers, Pairs
from finetune.objectives.pair_losses import hinge_loss, ipo_loss, robust_loss, sigmoid_loss
from finetune.objectives.preference import Preference


class DPO(Preference):
    """The margin is beta times the difference of log(p / reference) between the answers; for ipo of their means over tokens, as
    TRL has it after asking the authors."""

    def losses(self, pairs: Pairs) -> torch.Tensor:
        options = self._config.preference
        chosen, rejected = pairs.chosen.log_ratios, pairs.rejected.log_ratios
        if options.loss_type == "ipo":
            return ipo_loss(chosen / pairs.chosen.counts - rejected / pairs.rejected.counts, self.beta)
        margin = self.beta * (chosen - rejected)
        if options.loss_type == "hinge":
            return hinge_loss(margin)
        return (robust_loss if options.loss_type == "robust" else sigmoid_loss)(margin, options.label_smoothing)

    def rewards(self, answers: Answers) -> torch.Tensor:
        return self.beta * answers.log_ratios
