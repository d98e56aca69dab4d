"""What the word "all-linear" means for a model: PEFT's own list of linear layers, less those that cannot have an adapter.

| left out                                                     | why                                                           |
|--------------------------------------------------------------|---------------------------------------------------------------|
| layers that PEFT forbids (Mamba's out_proj)                  | the model multiplies by their weight without calling them     |
| linear layers that return something else (Llama 4's router)  | an adapter adds to one tensor                                 |
| routed experts, and what PEFT ties to them, unless asked for | they are most of the model: of r 8 on a 30B with 3B active    |
|                                                              | weights the adapters of attention take 1.8 GiB, all take 9.5  |

Experts that the model stacks are parameters, which "all-linear" only names where PEFT knows their names from before they were
stacked; `lora.target_parameters` names them everywhere.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from finetune.memory.errors import UserError

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
    names = [name for name in _linear_layers(model) if config.task_type != "SEQ_CLS" or name != "score"]
    reasons = {name: _reason(model, config, name, experts) for name in names}
    left_out: dict[str, list[str]] = {}
    if stacks := _stacked_experts_left_out(model, config, experts):
        endings = sorted({f"experts.{name.rpartition('.')[2]}" for name in stacks})
        key = f"--set 'lora.target_parameters=[{', '.join(endings)}]'"
        left_out[f"stacked routed experts are most of the model: {key} takes them too"] = stacks
    for name, reason in reasons.items():
        if reason:
            left_out.setdefault(reason, []).append(name)
    kept = [name for name in names if not reasons[name]]
    own_word = len(kept) == len(names) and (experts or not as_peft_takes_it(model, _alone(config, word)).target_parameters)
    modules = word if own_word else kept
    if not left_out:
        return Targets(modules)
    return Targets(modules, {reason: _endings(names) for reason, names in left_out.items()}, _endings(kept))


_EXPERTS = "routed experts, or what PEFT ties to them: --set lora.target_modules=all-linear takes them too"


def _stacked_experts_left_out(model: nn.Module, config: Any, experts: bool) -> list[str]:
    """Names of the parameters, [experts, ., .], that get no adapter with "all-linear"."""
    found = as_peft_takes_it(model, config) if experts else config
    targets = tuple(f".{ending}" for ending in found.target_parameters or ())
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "experts" in name.split(".") and not f".{name}".endswith(targets)
    ]


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


def _becomes_experts(model: nn.Module, config: Any, targets: Sequence[str]) -> bool:
    """Whether PEFT makes adapters of stacked experts out of these names, as they were called before experts were stacked."""
    try:
        return bool(as_peft_takes_it(model, _alone(config, list(targets))).target_parameters)
    except ValueError:  # one of several names that go together
        return True


def _alone(config: Any, targets: str | list[str]) -> Any:
    return dataclasses.replace(config, target_modules=targets, target_parameters=None)


def as_peft_takes_it(model: nn.Module, config: Any) -> Any:
    """A copy of a `peft.LoraConfig` in which names of layers that were stacked since are those of parameters. Raises
    ValueError for only some of the names that go together."""
    found = copy.deepcopy(config)
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return found
    convert_peft_config_for_transformers(found, model, None)
    return found


def check_endings(model: nn.Module, endings: Iterable[str]) -> None:
    """Raises UserError unless parameters of the bare `model` have names with each of these endings."""
    names = [name for name, _ in model.named_parameters()]
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in names):
            raise UserError(f"lora.target_parameters: expected endings of names of parameters, and none ends in {ending!r}")


def check_parameters(model: nn.Module, config: Any) -> None:
    """Raises UserError where `target_parameters` of a `peft.LoraConfig` are parameters of the bare `model` that its streamed
    layers do not read where PEFT would change them."""
    endings = tuple(f".{ending}" for ending in as_peft_takes_it(model, config).target_parameters or ())
    for name, _ in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if f".{name}".endswith(endings) and (type(owner) is nn.Linear or isinstance(owner, nn.Embedding)):
            found = "lora.target_parameters" if config.target_parameters else f"lora.target_modules={config.target_modules}"
            raise UserError(
                f"{found}: PEFT would adapt {name} as a parameter, which is of a linear layer or an embedding: list those in "
                "lora.target_modules by their names"
            )


def check_modules(adapted: nn.Module) -> None:
    """Raises UserError for adapters that PEFT has put around linear layers whose product they cannot add to."""
    from peft.tuners.lora import Linear

    for name, module in adapted.named_modules():
        if isinstance(module, Linear) and not _returns_a_tensor(module.get_base_layer()):
            raise UserError(
                f"lora.target_modules: {name} returns more than one tensor, and an adapter adds to one: name its weight in "
                "lora.target_parameters, or the whole of it in lora.extra.modules_to_save"
            )


def _endings(names: Sequence[str]) -> tuple[str, ...]:
    """Last parts of the names, each once; numbers (of layers, of experts) are no parts."""
    return tuple(dict.fromkeys([part for part in name.split(".") if not part.isdigit()][-1] for name in names))
