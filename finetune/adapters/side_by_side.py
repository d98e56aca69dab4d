"""Several adapters of one base, each as if it were the only one: the layers of one of them are in their places at a time.

[Note: adapters side by side]
PEFT puts an adapter around a model by putting its own layers in the places of the model's, each around the one that was there.
These places are all that tells an adapted model from the bare one. So a second adapter is attached after the first one's layers
were taken out again; and whose layers are put back, that adapter's model is the model, with the names, modes and files that it
has alone. The layers inside, whose weights are streamed, are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from finetune.adapters.reference import ReferenceSwitch
from finetune.offload.weights.frozen import FrozenWeights
from finetune.offload.weights.streamed_parts import Room

_CONFIG = "peft_config"  # PEFT's mark on a model that it has put an adapter around


class SideBySide:
    """The adapters of one base. in_place: the one whose layers are in their places; None: the base is bare."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._shared = list(base.modules())
        self._training = base.training  # the mode of what is shared
        self.in_place: Attached | None = None

    def attach(self, wrap: Callable[[], nn.Module]) -> Attached:
        """What `wrap` gives for the bare base, an adapter around it; it is in place then."""
        self.take_off()
        before = {module: dict(module._modules) for module in self._shared}
        model = wrap()
        places = [
            (module, name, child, module._modules[name])
            for module, children in before.items()
            for name, child in children.items()
            if module._modules[name] is not child
        ]
        self.in_place = Attached(self, model, places, self._base.__dict__.get(_CONFIG))
        self.note_mode()
        return self.in_place

    def note_mode(self) -> None:
        """The model of the adapter in place was set to a mode, and with it what all share."""
        self._training = self.in_place.training = self.in_place.model.training

    def take_off(self) -> None:
        """The base is bare."""
        if self.in_place is not None:
            self.in_place.switch.enter(0)
            for module, name, own, _ in self.in_place.places:
                module._modules[name] = own
            self._base.__dict__.pop(_CONFIG, None)
            self.in_place = None

    def put_on(self, adapter: Attached) -> None:
        if self.in_place is adapter:
            return
        self.take_off()
        for module, name, _, layer in adapter.places:
            module._modules[name] = layer
        if adapter.config is not None:
            self._base.__dict__[_CONFIG] = adapter.config
        if adapter.training != self._training:
            self._training = adapter.training
            for module in self._shared:
                module.training = adapter.training
        self.in_place = adapter


class Attached:
    """One of several adapters. model: PEFT's around the base, which is this adapter's while it is in place.

    places: (module of the base, name there, what the base has there, this adapter's layer).
    """

    def __init__(
        self, among: SideBySide, model: nn.Module, places: Sequence[tuple[nn.Module, str, Any, nn.Module]], config: Any
    ) -> None:
        self._among = among
        self.model = model
        self.places = places
        self.config = config
        self.training = model.training  # the mode of its model, also of what it shares
        self.switch = ReferenceSwitch(model)

    def put_on(self) -> None:
        """Its layers are in their places."""
        self._among.put_on(self)

    def take_off(self) -> None:
        """They are not."""
        if self._among.in_place is self:
            self._among.take_off()

    def note_mode(self) -> None:
        """Its model, while it is in place, was set to another mode."""
        self._among.note_mode()

    def outside_of(self, blocks: Sequence[nn.Module]) -> list[str]:
        """Names of layers that are in none of the blocks."""
        inside = {module for block in blocks for module in block.modules()}
        return [name for module, name, _, _ in self.places if module not in inside]


class SideBySideWeights(FrozenWeights):
    """Frozen weights under the adapter that is in place: version 0 with it, 1 without, as its objective's reference."""

    def __init__(self, room: Room, adapters: SideBySide) -> None:
        super().__init__(room)
        self._adapters = adapters

    def enter(self, variant: int) -> None:
        if self._adapters.in_place is not None:
            self._adapters.in_place.switch.enter(variant)
