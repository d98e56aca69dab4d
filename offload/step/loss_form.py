"""What a step makes of the cross entropies of its tokens: smoothed labels, a z-loss, weights of tokens.

For a token with logits x [V], label y and weight w, with s = log sum exp x:
    w ((1 - e) (s - x_y) + e (s - mean x) + c s^2)
e: label smoothing (Szegedy et al. 2016, section 7), as in PyTorch's `cross_entropy` and Transformers' `LabelSmoother`. c: of
the z-loss (PaLM, Chowdhery et al. 2022, section 5). Its derivative by x_j, which a head in chunks adds up:
    w (p_j (1 + 2 c s) - (1 - e) [j = y] - e / V)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from finetune.memory.errors import UserError


@dataclass(frozen=True, slots=True)
class LossForm:
    """smoothing: e, 0 or more and below 1. z: c. Both 0: the cross entropy alone."""

    smoothing: float = 0.0
    z: float = 0.0

    @property
    def is_plain(self) -> bool:
        return not self.smoothing and not self.z

    @property
    def tiles(self) -> int:
        """Tiles of fp32 logits that it has in memory beside those of the cross entropy: a second gradient of each kind, and
        what that is made from."""
        return 2 * bool(self.smoothing) + 2 * bool(self.z)

    def total(
        self, logits: torch.Tensor, labels: torch.Tensor, ignored: int, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """The sum over the rows that have a label, fp32 [], differentiable.

        logits: fp32 [n, V]. labels: int64 [n]. weights: fp32 [n]; None: all 1.
        """
        options = {"ignore_index": ignored, "label_smoothing": self.smoothing}
        if weights is None and not self.z:
            return functional.cross_entropy(logits, labels, reduction="sum", **options)
        losses = functional.cross_entropy(logits, labels, reduction="none", **options)
        if self.z:
            squares = logits.logsumexp(dim=-1).square()
            losses = losses + self.z * squares.masked_fill(labels == ignored, 0.0)
        return (losses if weights is None else losses * weights).sum()


@dataclass(slots=True)
class StepForm:
    """The form of a run's loss, and what of it the rows of a step say.

    weights: of the labels of each lane, in their order, fp32 [labels]; empty: all 1. divisor: by which the sum of all lanes is
    divided; None: the labels of the step.
    """

    form: LossForm = LossForm()
    weights: Sequence[torch.Tensor] = field(default_factory=list)
    divisor: float | None = None

    def applied(self, losses: Sequence) -> list:
        """`losses`, the lanes' own (`finetune.offload.step.deferred_logits.DeferredLoss`; several versions of the weights one
        after the other), in this form. Raises UserError where a model's own loss is made otherwise."""
        if self.form.is_plain and not self.weights:
            return list(losses)
        found = []
        for index, loss in enumerate(losses):
            if len(loss.terms) != 1 or not loss.terms[0].is_mean:
                raise UserError(
                    "the model's own loss is not one mean of cross entropies, of which training.label_smoothing_factor, "
                    "training.z_loss and training.loss_average say the form: leave them out"
                )
            weights = self.weights[index % len(self.weights)] if self.weights else None
            found.append(loss.formed(self.form, weights, self.divisor))
        return found
