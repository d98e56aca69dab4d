"""The loss that a step makes small; by default that of the model's own forward, of all rows of the step together.

[Note: shares of a step]
The loss of a step is to be that of all its rows together, however they are cut into micro-batches. A mean over unlike numbers
of items is not the mean of means: each micro-batch's loss counts as its share of the step's items. How many items a loss is a
mean of is seen in the loss functions that the model calls: labels that are not ignored, or values; where the head is tiled,
in the deferred loss that it makes of deferred logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from finetune.memory.errors import UserError
from finetune.offload.step.head import TiledHead
from finetune.offload.step.loss_form import StepForm
from finetune.offload.step.tiled_loss import IGNORE_INDEX


class StepLosses(NamedTuple):
    """losses: fp32 [variants]. num_items: that one of them is a mean of (samples, where is_sum says that it is a sum).
    outputs: the model's own, of all lanes; empty where they are not asked for."""

    losses: torch.Tensor
    num_items: int
    is_sum: bool
    outputs: list[Any]


class StepLoss(Protocol):
    """What a step makes of the outputs of its lanes. inputs: of each micro-batch; watched: what `watch` gave."""

    def watch(self, lanes: int) -> Sequence[AbstractContextManager]:
        """What the model's own code runs in, a lane each; empty: nothing."""

    def backward(self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[Any]) -> torch.Tensor:
        """The loss, fp32 []; backward runs from it through what follows the last block."""

    def values(
        self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[Any], variants: int
    ) -> StepLosses:
        """The loss of every variant of the weights, without gradients. outputs: of all lanes of variant 0, of variant 1, ..."""


MakeLoss = Callable[[nn.Module, TiledHead | None], StepLoss]
"""Called with the base model and the head that tiles its loss; None: logits are whole."""


def models_own_loss(model: nn.Module, head: TiledHead | None, form: StepForm | None = None) -> StepLoss:
    """Of the model's forward: a `MakeLoss`. form: of the cross entropies, where the head is tiled; None: the model's own."""
    return WholeLoss(model) if head is None else TiledLoss(model, head, form)


class TiledLoss:
    """A `StepLoss` of deferred losses."""

    def __init__(self, model: nn.Module, head: TiledHead, form: StepForm | None = None) -> None:
        self._model = model
        self._head = head
        self._form = StepForm() if form is None else form

    def watch(self, lanes: int) -> Sequence[AbstractContextManager]:
        return ()

    def _losses(self, outputs: list[Any]) -> list[Any]:
        return self._form.applied([loss_in(self._model, output) for output in outputs])

    def backward(self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[Any]) -> torch.Tensor:
        return self._head.loss_and_backward(self._losses(outputs))

    def values(
        self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[Any], variants: int
    ) -> StepLosses:
        losses = self._losses(outputs)
        num_items = sum(loss.num_items for loss in losses[: len(inputs)])
        return StepLosses(self._head.losses(losses, variants), num_items, False, outputs)


class WholeLoss:
    """A `StepLoss` that the model computes itself, over whole logits."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def watch(self, lanes: int) -> Sequence[LossItems]:
        return [LossItems() for _ in range(lanes)]

    def backward(
        self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[LossItems]
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32)
        for output, share in zip(outputs, shares(watched, inputs)[0], strict=True):
            loss = loss_in(self._model, output) * share
            loss.backward()
            total = total + loss.detach().float().cpu()
        return total

    def values(
        self, outputs: list[Any], inputs: Sequence[dict[str, Any]], watched: Sequence[LossItems], variants: int
    ) -> StepLosses:
        parts, num_items = shares(watched[: len(inputs)], inputs)
        own = [loss_in(self._model, output) * share for output, share in zip(outputs, parts * variants, strict=True)]
        each = torch.stack([loss.float().cpu() for loss in own]).view(variants, len(inputs))
        return StepLosses(each.sum(dim=1), num_items, watched[0].is_sum, outputs)


_OF_VALUES = {
    functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss,
    functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits,
}  # fmt: skip


class LossItems(TorchFunctionMode):
    """Counts, while a lane's model runs, what its loss functions take the mean of.

    is_sum: whether the loss is a sum instead, which adds up over micro-batches as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._means = 0
        self._is_mean = self._has_sum = False

    @property
    def is_sum(self) -> bool:
        return self._has_sum and not self._is_mean

    def count(self, inputs: dict[str, Any]) -> int:
        """Items of the loss; samples, where no loss function is known."""
        if self._is_mean:
            return self._means
        return len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function in (functional.cross_entropy, functional.nll_loss):
            target = args[1] if len(args) > 1 else kwargs["target"]
            if target.is_floating_point():  # probabilities of classes, [B, classes, ...]
                self._note(target.numel() // target.shape[1], kwargs)
            else:
                items = int((target != kwargs.get("ignore_index", IGNORE_INDEX)).sum())
                self._note(items, kwargs)
                if not items:  # a mean of none is NaN; of the step's mean it is no part
                    kwargs = kwargs | {"reduction": "sum"}
        elif function in _OF_VALUES:
            self._note((args[0] if args else kwargs["input"]).numel(), kwargs)
        elif function is functional.ctc_loss:
            self._note(len(args[3] if len(args) > 3 else kwargs["target_lengths"]), kwargs)
        return function(*args, **kwargs)

    def _note(self, items: int, kwargs: dict[str, Any]) -> None:
        reduction = kwargs.get("reduction", "mean")
        self._has_sum |= reduction == "sum"
        if reduction == "mean":
            self._is_mean = True
            self._means += items


def shares(items: Sequence[LossItems], inputs: Sequence[dict[str, Any]]) -> tuple[list[float], int]:
    """(by what each micro-batch's own loss counts for the step's, items of the step)."""
    counts = [one.count(batch) for one, batch in zip(items, inputs, strict=True)]
    total = sum(counts)
    return [1.0 if one.is_sum else count / max(1, total) for one, count in zip(items, counts, strict=True)], total


def loss_in(model: nn.Module, output: Any) -> Any:
    """The loss in the output of the model's forward. Raises UserError where there is none."""
    loss = getattr(output, "loss", None)
    if loss is None:
        raise UserError(
            f"{type(model).__name__} gives no loss for these rows: expected labels, found none: name their column "
            '"labels", or as its forward names them'
        )
    return loss
