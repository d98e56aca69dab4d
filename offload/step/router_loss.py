"""The load balance of routers over a whole step, in place of the model's own, which is over one micro-batch.

[Note: load balance of a step]
A mixture of experts adds N sum_i f_i p_i to its loss: N experts, f_i the share of tokens that chose expert i, p_i the mean
probability that routers gave it (Fedus et al. 2021, Switch Transformers, equations 4 to 6). The model's forward computes it, so
over a micro-batch, which is asked to be balanced by itself: experts cannot specialise in what one text is about. With f_i
counted over the whole batch they can (Qiu et al. 2025, Demons in the Detail).

Here the model's function notes with what it is called, in the lane that runs, and gives 0. When all lanes are through it is
called once, with the logits of all of them, one behind the other: that is the loss of a step in one micro-batch, whatever the
formula. f_i has no gradient. That of p_i goes to the logits, which are outputs of visits ([Note: captured outputs] in
`finetune.offload.step.lanes`), and through their recomputation into the routers and what stands before them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from finetune.memory.errors import UserError
from finetune.offload.step.own_loss import StepLoss, StepLosses

_FUNCTION = "load_balancing_loss_func"
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def has_balance(model: nn.Module) -> bool:
    """Whether the model's own code calls a function that `StepBalance` can call in its place: once a pass, not for encoder and
    decoder apart."""
    function = getattr(sys.modules[type(model).__module__], _FUNCTION, None)
    known = function is not None and list(inspect.signature(function).parameters) == _ARGUMENTS
    return known and not getattr(model.config, "is_encoder_decoder", False)


class StepBalance:
    """A `StepLoss`: another one, and `coefficient` times the load balance of all lanes together. See
    [Note: load balance of a step]."""

    def __init__(self, own: StepLoss, model: nn.Module, coefficient: float) -> None:
        self._own = own
        self._module = sys.modules[type(model).__module__]
        self._function = getattr(self._module, _FUNCTION)
        self._coefficient = coefficient

    def watch(self, lanes: int) -> Sequence[_Calls]:
        return [_Calls(self._module, around) for around in self._own.watch(lanes) or [nullcontext()] * lanes]

    def backward(self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[_Calls]) -> torch.Tensor:
        loss = self._own.backward(outputs, inputs, [one.around for one in watched])
        balance = self._balance(watched)
        if balance.requires_grad:
            balance.backward()
        return loss + balance.detach().cpu()

    def values(
        self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[_Calls], variants: int
    ) -> StepLosses:
        found = self._own.values(outputs, inputs, [one.around for one in watched], variants)
        count = len(inputs)
        balances = [self._balance(watched[i * count : (i + 1) * count]).cpu() for i in range(variants)]
        return found._replace(losses=found.losses + torch.stack(balances))

    def _balance(self, lanes: Sequence[_Calls]) -> torch.Tensor:
        """fp32 []; 0 where the model was not asked for it."""
        calls = [lane.call for lane in lanes if lane.call is not None]
        for lane in lanes:
            lane.call = None  # the logits go once their gradients are there
        if not calls:
            return torch.zeros(())
        logits, masks = [one["gate_logits"] for one in calls], [one["attention_mask"] for one in calls]
        mask = None
        if any(one is not None for one in masks):
            pairs = zip(logits, masks, strict=True)
            mask = torch.cat([x[0].new_ones(x[0].shape[0]) if one is None else one.reshape(-1).to(x[0]) for x, one in pairs])
        layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
        return self._coefficient * self._function(layers, calls[0]["num_experts"], calls[0]["top_k"], mask).float()


class _Calls:
    """Stands in for the model's function while its code runs in one lane. around: what else that code runs in."""

    def __init__(self, module: Any, around: AbstractContextManager) -> None:
        self.around = around
        self.call: dict[str, Any] | None = None
        self._module = module

    def __enter__(self) -> None:
        self.around.__enter__()
        self._own = getattr(self._module, _FUNCTION)
        setattr(self._module, _FUNCTION, self._note)

    def __exit__(self, *error: Any) -> None:
        setattr(self._module, _FUNCTION, self._own)
        self.around.__exit__(*error)

    def _note(
        self,
        gate_logits: tuple[torch.Tensor, ...],
        num_experts: int | None = None,
        top_k: int = 2,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """gate_logits: of every router, [tokens, experts]. attention_mask: [rows, length]; a token that is padding counts for
        nothing."""
        if self.call is not None:
            raise UserError(
                "training.router_loss: the model adds more than one load balance to its loss: expected micro_batch, found "
                "global_batch"
            )
        self.call = {
            "gate_logits": gate_logits, "num_experts": num_experts, "top_k": top_k, "attention_mask": attention_mask
        }  # fmt: skip
        return torch.zeros((), device=gate_logits[0].device)
