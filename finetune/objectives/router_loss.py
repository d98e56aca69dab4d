"""What `training.router_loss` makes of a mixture of experts' loss."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from finetune.config.training_options import TrainingOptions
from finetune.memory.errors import UserError
from finetune.offload.step.own_loss import StepLoss
from finetune.offload.step.router_loss import StepBalance, has_balance
from finetune.planned_run import BatchShape

_SWITCH, _COEFFICIENT = "output_router_logits", "router_aux_loss_coef"  # Transformers' words


class RouterLoss:
    """Raises UserError for what `model`, the bare one, does not have. Sets its coefficient, if that was given."""

    def __init__(self, options: TrainingOptions, model: nn.Module) -> None:
        self._options = options
        self._model = model
        self._config = model.config.get_text_config()
        word, has_loss = options.router_loss, _has_loss(model)
        if word != "config" and not has_loss:
            raise UserError(
                f"training.router_loss: expected config, because {type(model).__name__} adds no loss of routers to its own (it "
                f"has no {_COEFFICIENT}), found {word}"
            )
        if word == "global_batch" and not has_balance(model):
            raise UserError(
                f"training.router_loss: expected micro_batch, config or without, because the loss of routers of "
                f"{type(model).__name__} is no load balance of Transformers' usual form, found global_batch"
            )
        coefficient = options.router_loss_coefficient
        if coefficient is not None:
            if not (has_loss and self._is_on):
                raise UserError(
                    "training.router_loss_coefficient: expected none, because the model adds no loss of routers, found "
                    f"{coefficient:g}: set training.router_loss to micro_batch or global_batch if it has one"
                )
            for holder in (model, model.config, self._config):
                if hasattr(holder, _COEFFICIENT):
                    setattr(holder, _COEFFICIENT, coefficient)

    @property
    def _is_on(self) -> bool:
        word = self._options.router_loss
        return bool(getattr(self._config, _SWITCH, False)) if word == "config" else word != "without"

    @property
    def adds_loss(self) -> bool:
        """Whether the model adds a loss of routers to its own."""
        return _has_loss(self._model) and self._is_on

    @property
    def is_of_micro_batches(self) -> bool:
        """Whether there is one, and it is another where a step is cut into other micro-batches."""
        return self.adds_loss and self._options.router_loss != "global_batch"

    @property
    def inputs(self) -> dict[str, Any]:
        """For the model's forward, in steps only: to measure and to write text nobody asks routers."""
        return {} if self._options.router_loss == "config" else {_SWITCH: self._is_on}

    def kept_bytes(self, shape: BatchShape) -> int:
        """Of all lanes, in fp32: logits of every router and their probabilities, which become gradients; for the whole step the
        logits a second time; and what those of one router take on the way."""
        if not self.adds_loss:
            return 0
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        experts = max(getattr(self._config, name, None) or 0 for name in names)
        routers = self._config.num_hidden_layers * (3 if self._options.router_loss == "global_batch" else 2) + 3
        return 4 * routers * shape.micro_batches * shape.rows * experts

    def make(self, model: nn.Module, own: StepLoss) -> StepLoss:
        """own: the loss of the model's own forward. See `MakeLoss`."""
        if self._options.router_loss != "global_batch":
            return own
        holder = model if hasattr(model, _COEFFICIENT) else self._config
        return StepBalance(own, model, getattr(holder, _COEFFICIENT))


def _has_loss(model: nn.Module) -> bool:
    takes_switch = _SWITCH in inspect.signature(type(model).forward).parameters
    return takes_switch and hasattr(model.config.get_text_config(), _COEFFICIENT)
