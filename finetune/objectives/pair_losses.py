"""Losses of a margin between two answers; each of fp32 [pairs]."""

from __future__ import annotations

import torch
from torch.nn import functional


def sigmoid_loss(margin: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m): Rafailov et al. 2023 (DPO, equation 7); with e the conservative form of
    Mitchell 2023."""
    loss = -functional.logsigmoid(margin)
    if not label_smoothing:
        return loss
    return loss * (1 - label_smoothing) - functional.logsigmoid(-margin) * label_smoothing


def robust_loss(margin: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Unbiased where a share e of pairs is the wrong way round (Chowdhury et al. 2024, robust DPO, equation 12)."""
    right, flipped = functional.logsigmoid(margin), functional.logsigmoid(-margin)
    return (-right * (1 - label_smoothing) + flipped * label_smoothing) / (1 - 2 * label_smoothing)


def hinge_loss(margin: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - m), as SLiC has it (Zhao et al. 2023)."""
    return torch.relu(1 - margin)


def ipo_loss(difference: torch.Tensor, tau: float) -> torch.Tensor:
    """(h - 1 / (2 tau))^2 of log-probabilities that are means over tokens (Azar et al. 2023, equation 17)."""
    return (difference - 1 / (2 * tau)) ** 2
