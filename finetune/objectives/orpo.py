"""orpo: odds ratio preference optimisation (Hong et al. 2024, equations 6 and 7), without a reference."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.objectives.answers import Answers, Pairs
from finetune.objectives.preference import Preference
from finetune.session import Session


class ORPO(Preference):
    """Cross entropy of the chosen text, and beta times that of the odds ratio; p is exp of the mean log-probability."""

    nll_weight = 1.0

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        super().__init__(config, session, data)
        self.nll_of_prompts = config.preference.orpo_prompt_loss

    def losses(self, pairs: Pairs) -> torch.Tensor:
        return -self.beta * functional.logsigmoid(_log_odds_ratio(pairs))

    def log_probs(self, answers: Answers) -> torch.Tensor:
        return answers.means

    def rewards(self, answers: Answers) -> torch.Tensor:
        return self.beta * answers.means

    def more_logged(self, pairs: Pairs) -> dict[str, float]:
        log_odds = _log_odds_ratio(pairs).detach()
        return {"log_odds_ratio": functional.logsigmoid(log_odds).mean(), "log_odds_chosen": log_odds.mean()}


def _log_odds_ratio(pairs: Pairs) -> torch.Tensor:
    """log of odds(chosen) / odds(rejected), with odds(p) = p / (1 - p)."""
    chosen, rejected = pairs.chosen.means, pairs.rejected.means
    return (chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))


def _log_one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012, equation 7)."""
    near = x > -math.log(2)
    # What is not taken must have a finite gradient too.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))
