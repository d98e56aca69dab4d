"""Adapters with routers of their own (MixLoRA, DynMoLE): their loss over all rows of a step, beside the model's.

A router's logits are an output of the block that it is in ([Note: captured outputs] in `finetune.offload.step.lanes`). When all
lanes are through, the tuner makes its loss of the logits of all of them, one behind the other, as is done with a model's own
routers
([Note: load balance of a step] in `finetune.offload.step.router_loss`). So it does not depend on how rows are cut into
micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import install_output_capuring_hook

from finetune.adapters.tuners import Tuner
from finetune.offload.step.head import TiledHead
from finetune.offload.step.own_loss import MakeLoss, StepLoss, StepLosses

_KEY = "adapter_router_logits"


class Routed(Tuner):
    def take_over(self) -> None:
        super().take_over()
        for router in self._routers:
            install_output_capuring_hook(router, _KEY, 0)

    def make_loss(self, make: MakeLoss) -> MakeLoss:
        def made(model: nn.Module, head: TiledHead | None) -> StepLoss:
            return _WithRouters(make(model, head), self.model)

        return made

    def kept_bytes(self, tokens: int) -> int:
        """Logits of every router in fp32, a second time for the whole step, and what the loss makes of them in between and as
        gradients."""
        return 8 * 4 * tokens * sum(router.out_features for router in self._routers)

    @property
    def _routers(self) -> list[nn.Linear]:
        return self.model.base_model.routers()


class _WithRouters:
    """A `StepLoss`: another one, and that of the adapter's routers while the model trains."""

    def __init__(self, own: StepLoss, model: nn.Module) -> None:
        self._own = own
        self._model = model

    def watch(self, lanes: int) -> Sequence[AbstractContextManager]:
        own = self._own.watch(lanes)
        if not self._model.training:  # to measure, nobody asks routers
            return own
        return [_Lane(around) for around in own or [nullcontext()] * lanes]

    def backward(self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[_Lane]) -> torch.Tensor:
        loss = self._own.backward(outputs, inputs, [one.around for one in watched])
        lanes = [one.collected[_KEY] for one in watched]
        logits = [torch.cat(layer) for layer in zip(*lanes, strict=True)]
        routed = self._model.base_model.router_loss(logits, _mask(inputs, lanes))
        if routed.requires_grad:
            routed.backward()
        return loss + routed.detach().cpu()

    def values(
        self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[Any], variants: int
    ) -> StepLosses:
        return self._own.values(outputs, inputs, watched, variants)


class _Lane:
    """What one lane's code runs in. around: what it runs in without routers. collected: by key, what blocks give."""

    def __init__(self, around: AbstractContextManager) -> None:
        self.around = around
        self.collected: dict[str, list[torch.Tensor]] = {_KEY: []}

    def __enter__(self) -> None:
        self.around.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.around.__exit__(*error)


def _mask(inputs: Sequence[dict[str, Any]], lanes: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor | None:
    """Of the tokens of all lanes, [tokens]: 0 is padding; None: there is none."""
    masks = [kwargs.get("attention_mask") for kwargs in inputs]
    if all(mask is None for mask in masks):
        return None
    pairs = zip(masks, lanes, strict=True)
    return torch.cat([one[0].new_ones(len(one[0])) if mask is None else mask.reshape(-1).to(one[0]) for mask, one in pairs])
