"""LoRA and its family through PEFT: adapters resident, the base streamed and frozen.

Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA); the arithmetic is PEFT's.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters.base import Adapter
from finetune.adapters.lora_options import (
    changes_base,
    check_beside_parameters,
    check_fresh,
    check_loaded,
    check_option,
    key_of,
)
from finetune.adapters.lora_targets import (
    Targets,
    as_peft_takes_it,
    check_endings,
    check_modules,
    check_parameters,
    choose_targets,
)
from finetune.adapters.peft_files import task_type
from finetune.adapters.residual import check_beside, keeping_first_values, with_residuals
from finetune.adapters.tuners import check_memory
from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.objectives.registry import find_objective
from finetune.offload.weights.on_demand import weights_on_demand
from finetune.offload.weights.parts import ModelParts


class Lora(Adapter):
    @classmethod
    def attach(cls, parts: ModelParts, config: Config, only_shapes: bool = False) -> tuple[nn.Module, str | None]:
        options = config.lora
        experts = options.target_modules is not None
        arguments = options.peft_arguments()
        on_meta = only_shapes and arguments.get("init_lora_weights", True) is True
        scores = find_objective(config.objective).scores
        on_meta = on_meta and not scores and not any(arguments.get(key) for key in _MADE_OF_WEIGHTS)
        init = arguments.get("init_lora_weights")
        if changes_base(init):
            check_beside(arguments, config)
            if only_shapes:  # no decomposition for a plan
                arguments, on_meta = arguments | {"init_lora_weights": True}, True
        made_of_base = arguments.get("init_lora_weights") in _MADE_OF_BASE or changes_base(arguments["init_lora_weights"])
        with ExitStack() as held:
            if made_of_base:
                held.enter_context(weights_on_demand(parts, partial(check_memory, config), changes_base(init)))
                held.enter_context(keeping_first_values())
            kind = "SEQ_CLS" if scores else None
            model, targets = attach(parts.model, arguments, config.training.seed, kind, experts=experts, on_meta=on_meta)
        model.peft_config["default"].init_lora_weights = init
        return model, targets.note

    def rebased(self, parts: ModelParts) -> ModelParts:
        """Of PiSSA and OLoRA, see [Note: residuals] in `finetune/adapters/residual.py`."""
        return with_residuals(parts, self.model) if changes_base(self.model.active_peft_config.init_lora_weights) else parts

    @classmethod
    def check_loaded(cls, peft_config: Any, directory: Path) -> None:
        check_loaded(peft_config, directory)

    @classmethod
    def check_parts(cls, model: nn.Module, peft_config: Any) -> None:
        check_parameters(model, peft_config)

    def own_rates(self, config: Config) -> dict[str, float]:
        """LoRA+, with the groups that PEFT makes of parameters."""
        from peft.tuners.lora import Embedding

        ratio = config.lora.loraplus_lr_ratio
        rates: dict[str, float] = {}
        for name, parameter in self.model.named_parameters() if ratio is not None else ():
            if isinstance(self.model.get_submodule(".".join(name.split(".")[:-2])), Embedding):
                rates[name] = config.lora.loraplus_lr_embedding
            elif "lora_B" in name or parameter.ndim == 1:
                rates[name] = config.learning_rate * ratio
        return rates

    @property
    def needs_first_visit(self) -> bool:
        """DoRA's magnitudes, rows and modules that are trained."""
        return any(_magnitudes(module) or _rows(module) or _copies(module) for module in self.model.modules())

    def first_visit(self, modules: Iterable[nn.Module]) -> None:
        """DoRA's magnitudes are the norms of W + scaling B A; rows and modules that are trained are copies of the base's."""
        for module in modules:
            for name, magnitude in _magnitudes(module).items():
                _set_magnitude(module, name, magnitude)
            for name, rows in _rows(module).items():
                rows.data.copy_(module.get_base_layer().weight[module.token_indices[name]])
                module.trainable_tokens_original[name] = rows.detach().clone()
            for copy in _copies(module).values():
                copy.load_state_dict(module.original_module.state_dict())


_MADE_OF_BASE = ("mica",)
"""Values of init_lora_weights with which PEFT computes from the base's weights."""
_MADE_OF_WEIGHTS = ("use_dora", "use_bdlora", "velora_config", "modules_to_save", "trainable_token_indices")
"""Arguments with which PEFT looks at what it wraps."""


def attach(
    model: nn.Module, arguments: dict[str, Any], seed: int, kind: str | None = None, *, experts: bool = True,
    on_meta: bool = False,
) -> tuple[nn.Module, Targets]:
    """`model` wrapped by PEFT with a fresh adapter, as `get_peft_model` after `torch.manual_seed(seed)` makes it, and what
    was made of target_modules "all-linear".

    arguments: keyword arguments of `peft.LoraConfig`. kind: PEFT's word for what the model does, the head of SEQ_CLS
    being trained too; None: as its class says. experts: whether "all-linear" means routed experts too. on_meta:
    whether the adapter is on the meta device, without values. Raises UserError for what cannot be streamed or PEFT refuses.
    """
    from peft import LoraConfig, get_peft_model

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if unknown := [key for key in arguments if key not in known]:
        raise UserError(f"{key_of(unknown[0])}: PEFT's LoraConfig has no {unknown[0]}; it has {', '.join(sorted(known))}")
    if "init_lora_weights" in arguments:  # PEFT would first ask for packages that some of its values need
        check_option("init_lora_weights", arguments["init_lora_weights"])
    kind = task_type(model) if kind is None else kind
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's, about Transformers' names: nothing a user can do
            # Nor about the ranks that it gives stacked experts itself; it heeds them.
            warnings.filterwarnings("ignore", r"The following \w+_pattern keys did not match any targeted module .*\['\.\*")
            config = LoraConfig(**{"task_type": kind, **arguments})
            check_fresh(config, kind)
            targets = choose_targets(model, config, experts)
            config.target_modules = targets.modules
            check_beside_parameters(as_peft_takes_it(model, config))
            check_endings(model, config.target_parameters or ())
            check_parameters(model, config)
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
            check_modules(adapted)
    except UserError:
        raise
    except Exception as error:  # whatever its layers raise for options that do not go together
        raise UserError(f"PEFT refuses the lora options: {error or type(error).__name__}") from error
    for module in adapted.modules():
        for copy in _copies(module).values():
            for part in copy.modules():
                part.__dict__.pop("forward", None)  # the streamed module's, which looks for the weights in a slot
    return adapted, targets


def _magnitudes(module: nn.Module) -> dict[str, nn.Module]:
    return dict(getattr(module, "lora_magnitude_vector", None) or {})


def _rows(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(getattr(module, "trainable_tokens_delta", None) or {})


def _copies(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module._modules.get("modules_to_save") or {})


def _set_magnitude(module: nn.Module, name: str, magnitude: nn.Module) -> None:
    base, trained_dtype = module.get_base_layer(), magnitude.weight.dtype
    if name in module.lora_A:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
    else:
        a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
    dtype = base.weight.dtype  # PEFT takes the norm before it widens its adapters
    magnitude.update_layer(base_layer=base, lora_A=a.to(dtype), lora_B=b.to(dtype), scaling=module.scaling[name])
    magnitude.weight.data = magnitude.weight.data.to(trained_dtype)
