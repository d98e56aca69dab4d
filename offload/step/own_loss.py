"""What a model's own loss is a mean of, where the model computes it itself, over whole logits.

The loss of a step is to be that of all its rows together, however they are cut into micro-batches. A mean over unlike numbers
of items is not the mean of means: each micro-batch's loss counts as its share of the step's items. How many items a loss is a
mean of is seen in the loss functions that the model calls: labels that are not ignored, or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from memory.errors import UserError
from offload.step.tiled_loss import IGNORE_INDEX

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


def own_loss(model: nn.Module, output: Any) -> Any:
    """The loss in the output of the model's forward. Raises UserError where there is none."""
    loss = getattr(output, "loss", None)
    if loss is None:
        raise UserError(
            f"{type(model).__name__} gives no loss for these rows: expected labels, found none: name their column "
            '"labels", or as its forward names them'
        )
    return loss
