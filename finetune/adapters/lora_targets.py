"""What the word "all-linear" means for a model: PEFT's own list of linear layers, less those that cannot have an adapter.

| left out                                                     | why                                                           |
|--------------------------------------------------------------|---------------------------------------------------------------|
| layers that PEFT forbids (Mamba's out_proj)                  | the model multiplies by their weight without calling them     |
| linear layers that return something else (Llama 4's router)  | an adapter adds to one tensor                                 |
| routed experts, and what PEFT ties to them, unless asked for | they are most of the model: of r 8 on a 30B with 3B active    |
|                                                              | weights the adapters of attention take 1.8 GiB, all take 9.5  |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True, slots=True)
class Targets:
    """modules: for `peft.LoraConfig`. left_out: reason -> the names' last parts. kept: last parts of the names that got
    adapters, where something was left out."""

    modules: Any
    left_out: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    kept: tuple[str, ...] = ()

    @property
    def note(self) -> str | None:
        """What the user should know of what was left out."""
        if not self.left_out:
            return None
        reasons = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in self.left_out.items())
        return f"note: adapters are on {', '.join(self.kept)}; without one: {reasons}"


def choose_targets(model: nn.Module, config: Any, experts: bool) -> Targets:
    """What `config.target_modules` (of a `peft.LoraConfig`) stands for; other words than "all-linear" stand for themselves.

    experts: whether routed experts are among them.
    """
    word = config.target_modules
    if not isinstance(word, str) or word.lower() != ALL_LINEAR:
        return Targets(word)
    names = _linear_layers(model)
    reasons = {name: _reason(model, config, name, experts) for name in names}
    left_out: dict[str, list[str]] = {}
    if not experts and _becomes_experts(model, config, word):
        left_out[_EXPERTS] = ["experts"]
    for name, reason in reasons.items():
        if reason:
            left_out.setdefault(reason, []).append(name)
    if not left_out:
        return Targets(word)
    kept = [name for name in names if not reasons[name]]
    return Targets(kept, {reason: _endings(names) for reason, names in left_out.items()}, _endings(kept))


_EXPERTS = "routed experts and what belongs to them are most of the model: --set lora.target_modules=all-linear takes them too"


def _linear_layers(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]


def _reason(model: nn.Module, config: Any, name: str, experts: bool) -> str | None:
    """Why the linear layer `name` gets no adapter; None: it gets one."""
    if _is_forbidden(model, config, name):
        return f"PEFT forbids it on {model.config.model_type}"
    if not _returns_a_tensor(model.get_submodule(name)):
        return "it returns more than one tensor"
    if not experts and ("experts" in name.split(".") or _becomes_experts(model, config, [name])):
        return _EXPERTS
    return None


def _is_forbidden(model: nn.Module, config: Any, name: str) -> bool:
    from peft.tuners import tuners_utils

    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        if check is not None:
            check(config, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _returns_a_tensor(module: nn.Module) -> bool:
    """A linear layer of a class with a forward of its own is tried on a row of zeros."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    with torch.no_grad():
        return isinstance(module(module.weight.new_zeros(1, module.in_features)), torch.Tensor)


def _becomes_experts(model: nn.Module, config: Any, targets: str | Sequence[str]) -> bool:
    """Whether PEFT makes adapters of stacked experts out of these names, as they were called before experts were stacked."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return False
    trial = dataclasses.replace(config, target_modules=targets if isinstance(targets, str) else list(targets))
    trial.target_parameters = None
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:  # one of several names that go together
        return True
    return bool(trial.target_parameters)


def _endings(names: Sequence[str]) -> tuple[str, ...]:
    """Last parts of the names, each once; numbers (of layers, of experts) are no parts."""
    return tuple(dict.fromkeys([part for part in name.split(".") if not part.isdigit()][-1] for name in names))
