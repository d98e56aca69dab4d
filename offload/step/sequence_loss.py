"""Log-probabilities of the labels of whole sequences, and then the gradient of a loss that is made of them.

[Note: losses of sequences]
The loss of a preference pair is a function of the log-probabilities of whole sequences, which are those of several lanes and of
several versions of the weights. Its derivative by the log-probability of a token is a number that is known only when all lanes
have been through the head. So the head goes over the rows twice: without a graph, for the log-probabilities; and, once the
weights are known, tile by tile with a graph, backward from the sum of weight times log-probability. A head of one chunk is
plain PyTorch both times, and stays where it is in between. A head in chunks is read once: the sums of [Note: loss tiles] in
`finetune.offload.step.tiled_loss` are those of the gradient of each row, of which its weight is a factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from finetune.memory.errors import UserError
from finetune.memory.tensor_file import in_file
from finetune.offload.step.deferred_logits import DeferredLoss
from finetune.offload.step.random_state import set_random_state
from finetune.offload.step.tiled_loss import IGNORE_INDEX, TiledCrossEntropy, apply_operations

Weigh = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""From the log-probabilities of all lanes, each fp32 [labels of the lane], to the derivatives of the loss by those of the lanes
that have gradients, of the same shapes."""


class TokenLogProbs(TiledCrossEntropy):
    """The labelled rows of one lane's own loss, in order; `log_probs`, fp32 [labels], once the head has been over them.

    Raises UserError for a loss that is more than one cross entropy.
    """

    log_probs: torch.Tensor

    def __init__(self, loss: DeferredLoss, tile_tokens: int, backward: bool, temperature: float = 1.0) -> None:
        if len(loss.terms) != 1 or isinstance(loss.added, torch.Tensor):
            raise UserError(
                "the model's own loss is more than one cross entropy: losses of preferences are made of the likelihood of the "
                "next token alone: set training.router_loss to without, or train on training.objective loss"
            )
        super().__init__(loss.terms[0].logits, loss.terms[0].labels, tile_tokens, backward=backward)
        self._valid = self._labels != IGNORE_INDEX
        if temperature != 1.0:
            self._operations = [*self._operations, lambda logits, _: logits / temperature]

    def plain_log_probs(self, forward: Callable) -> None:
        set_random_state(self._random_state)
        with torch.no_grad():
            losses = [self._losses(forward, self._hidden[tile], tile) for tile in self._tiles]
        self.log_probs = -torch.cat(losses)[self._valid]

    def plain_backward(self, forward: Callable, weights: torch.Tensor) -> None:
        """weights: of the log-probabilities, fp32 [labels]. Dropout is that of `plain_log_probs`."""
        with in_file():
            self._grad = torch.zeros_like(self._hidden)
        spread = self._spread(weights)
        set_random_state(self._random_state)
        for tile in self._tiles:
            hidden = self._hidden[tile].detach().requires_grad_(self._outer.requires_grad)
            with torch.enable_grad():
                loss = (self._losses(forward, hidden, tile) * -spread[tile]).sum()
            if loss.requires_grad:
                loss.backward()
            if hidden.grad is not None:
                self._grad[tile] = hidden.grad

    def finish_log_probs(self) -> None:
        self.log_probs = (self._label_logit - self._log_sum())[self._valid]

    def finish_backward(self, weights: torch.Tensor) -> None:
        """As `plain_backward`, where chunks have been added up."""
        self._weights = -self._spread(weights)  # of the cross entropies, for the gradient of the head too
        grad = self._weighted.div_(self._sum[:, None]).sub_(self._label_row).mul_(self._weights[:, None])
        grad[~self._valid] = 0
        with in_file():
            self._grad = grad.to(self._hidden.dtype)
        del self._weighted, self._label_row

    def backward(self) -> None:
        """Through what the model computed before the head."""
        hidden, grad = self.take_gradient()
        if hidden.requires_grad:
            with in_file():
                torch.autograd.backward(hidden, grad)

    def _losses(self, forward: Callable, hidden: torch.Tensor, tile: slice) -> torch.Tensor:
        """Cross entropies, fp32 [rows of the tile]; 0 where there is no label."""
        logits = apply_operations(self._operations, forward(hidden), self._columns).float()
        return functional.cross_entropy(logits, self._labels[tile], ignore_index=IGNORE_INDEX, reduction="none")

    def _spread(self, weights: torch.Tensor) -> torch.Tensor:
        """[labels] to [rows]."""
        spread = torch.zeros(self._labels.shape, device=self._hidden.device)
        spread[self._valid] = weights.to(spread)
        return spread
