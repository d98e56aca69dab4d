"""What a kind of adapter is to a streamed model: parameters of its own beside frozen weights, in PEFT's layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.registry import ADAPTERS
from finetune.plugin import load

if TYPE_CHECKING:  # a kind's options may stand beside its code, and are read without torch
    import torch
    from torch import nn

    from finetune.config import Config
    from finetune.offload.step.own_loss import MakeLoss
    from finetune.offload.streamed_model import StreamedModel
    from finetune.offload.weights.parts import ModelParts


class Adapter:
    """The adapter of `model`, which PEFT has wrapped. The base: none, or of a kind that asks for nothing of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def attach(cls, parts: ModelParts, config: Config, only_shapes: bool = False) -> tuple[nn.Module, str | None]:
        """The model of `parts` wrapped with a fresh adapter, and what the user should know of it. only_shapes: whether nobody
        looks at its values, so that they may be on the meta device. Raises UserError for what cannot be streamed, or PEFT
        refuses."""
        raise NotImplementedError

    def rebased(self, parts: ModelParts) -> ModelParts:
        """The parts with the weights that a fresh adapter expects in place of the base's."""
        return parts

    @classmethod
    def check_loaded(cls, peft_config: Any, directory: Path) -> None:
        """Raises UserError for a saved adapter, in `directory`, whose options a streamed model cannot have."""

    @classmethod
    def check_parts(cls, model: nn.Module, peft_config: Any) -> None:
        """Raises UserError for a saved adapter of parts of the bare `model` that cannot have one while it is streamed."""

    @property
    def positions(self) -> int:
        """That it takes before every text."""
        return 0

    @property
    def needs_whole_texts(self) -> bool:
        """Whether its layers may compute other numbers where they get a part of a text."""
        return False

    @property
    def reads_weights(self) -> frozenset[nn.Module]:
        """Modules of the base whose weights it computes with itself, besides calling them."""
        return frozenset(self.model.modules()) if self.needs_first_visit else frozenset()

    def check_length(self, num_tokens: int) -> None:
        """Raises UserError when it leaves no positions for texts of so many tokens."""

    def lane_bytes(self, itemsize: int) -> int:
        """What it takes of memory in every lane, in numbers of so many bytes."""
        return 0

    def take_over(self) -> None:
        """Changes the model's forward where streaming asks for it."""

    @property
    def needs_first_visit(self) -> bool:
        """Whether it has values that follow from the base's weights."""
        return False

    def first_visit(self, modules: Iterable[nn.Module]) -> None:
        """Gives adapters among `modules`, whose base weights are bound, the values that follow from these."""

    def own_rates(self, config: Config) -> dict[str, float]:
        """Names of parameters that have another learning rate than the run's, at its highest, and that rate."""
        return {}

    @property
    def gradients_rise(self) -> bool:
        """Whether a block's parameters have no gradients before its backward."""
        return True

    def begin_step(self) -> None:
        """Before the forward of a step with gradients."""

    def after_backward(self) -> None:
        """After the backward of a step, when blocks have their gradients."""

    def make_loss(self, make: MakeLoss) -> MakeLoss:
        """What makes the loss of a step, given what makes it without the adapter."""
        return make

    def kept_bytes(self, tokens: int) -> int:
        """What a step of so many tokens keeps for that loss."""
        return 0

    def own_loss(self) -> torch.Tensor | None:
        """What it adds to the loss of a step beside the model's, fp32 []; gradients are left in `.grad`. None: nothing."""
        return None

    def after_update(self, step: int) -> None:
        """After the optimizer's update of step `step` (from 0), while gradients are there."""

    def state(self) -> dict[str, torch.Tensor]:
        """What it keeps from step to step beside its parameters, by name."""
        return {}

    @property
    def state_bytes(self) -> int:
        """Of what `state` gives."""
        return 0

    def set_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes up what `state` has given. Raises ValueError for what it cannot be."""

    def begin(self, streamed: StreamedModel, seed: int) -> None:
        """Sets it to what a run begins with, where that takes a pass over the weights (`AdapterEntry.kept_initial`)."""

    def read(self, directory: Path, digest: str) -> bool:
        """Sets it to that saved in `directory`; False when the one with this digest is not there."""
        return False

    def digest(self) -> str:
        """Of its values."""
        return ""


def adapter_of(model: nn.Module) -> Adapter:
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    return (Adapter if kind is None else class_of(kind))(model)


_OWN_CODE = {
    "ADALORA": "finetune.adapters.adalora:AdaLora",
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING"), "finetune.adapters.prompts:Prompt"),
    "CARTRIDGE": "finetune.adapters.prefix:Prefix",
    **dict.fromkeys(("MIXLORA", "DYNMOLE"), "finetune.adapters.routed:Routed"),
}
"""PEFT's word -> "module:Class" of tuners that are more than layers."""


def class_of(kind: str) -> type[Adapter]:
    """Of adapters that PEFT calls so."""
    if kind in _OWN_CODE:
        return load(_OWN_CODE[kind])
    entry = next((entry for entry in ADAPTERS.values() if entry.peft_type == kind), ADAPTERS["adapter"])
    return load(entry.code)
