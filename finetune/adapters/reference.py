"""The reference of preferences: the model with its adapter off, as one more version of the weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from finetune.offload.weights.frozen import FrozenWeights
from finetune.offload.weights.streamed_parts import Room


class ReferenceSwitch:
    """Two versions of a model: 0, with its adapter; 1, without it and without dropout.

    PEFT's layers read a flag of theirs at each call. PEFT's own `disable_adapter` freezes the adapters' parameters too, which
    takes them out of graphs that are kept: the flag alone is set.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if not hasattr(module, "_cache_clear")]
        self._adapters = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
        self._training: list[Any] = []  # what was in train mode, while version 1 is in place
        self._version = 0

    def enter(self, version: int) -> None:
        if version == self._version:
            return
        self._version = version
        for module in self._adapters:
            module._disable_adapters = version == 1
        if version:
            self._training = [module for module in self._modules if module.training]
        for module in self._training:
            module.__dict__["training"] = version == 0


class WithReference(FrozenWeights):
    """Frozen weights of these two versions."""

    def __init__(self, room: Room) -> None:
        super().__init__(room)
        self._switch = ReferenceSwitch(room.model)

    def enter(self, variant: int) -> None:
        self._switch.enter(variant)
