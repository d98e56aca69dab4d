"""LoRA and its family through PEFT: adapters resident, the base streamed and frozen.

Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA); the arithmetic is PEFT's.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from finetune.methods.adapters import task_type
from memory.errors import UserError

# Initialisations that decompose or run the base weights, which are not in memory when adapters are made.
_NEEDS_BASE_WEIGHTS = ("pissa", "olora", "loftq", "eva", "corda", "lora_ga")


def attach(model: nn.Module, arguments: dict[str, Any], seed: int) -> nn.Module:
    """`model` wrapped by PEFT with a fresh adapter, as `get_peft_model` after `torch.manual_seed(seed)` makes it.

    arguments: keyword arguments of `peft.LoraConfig`. Raises UserError for what cannot be streamed or PEFT refuses.
    """
    from peft import LoraConfig, get_peft_model

    init = arguments.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_NEEDS_BASE_WEIGHTS):
        raise UserError(
            f"lora.init_lora_weights={init!r} needs all base weights in memory: use true, false, gaussian or orthogonal"
        )
    unsupported = [
        key for key in ("layer_replication", "target_parameters", "trainable_token_indices") if arguments.get(key)
    ]
    if unsupported:
        raise UserError(f"lora.extra.{unsupported[0]} cannot be combined with streamed weights: leave it out")
    arguments = {"task_type": task_type(model), **arguments}
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's, about Transformers' names: nothing a user can do
            return get_peft_model(model, LoraConfig(**arguments))
    except (ValueError, TypeError) as error:
        raise UserError(f"PEFT refuses the lora options: {error}") from error


def needs_first_visit(model: nn.Module) -> bool:
    """Whether adapters have values that follow from the base weights (DoRA's magnitudes)."""
    return any(getattr(module, "lora_magnitude_vector", None) for module in model.modules())


def first_visit(block: nn.Module) -> None:
    """Sets DoRA's magnitudes from the block's weights, which are bound: the norm of W + scaling B A, as PEFT does."""
    for module in block.modules():
        for name, magnitude in getattr(module, "lora_magnitude_vector", {}).items():
            magnitude.update_layer(
                base_layer=module.get_base_layer(),
                lora_A=module.lora_A[name].weight,
                lora_B=module.lora_B[name].weight,
                scaling=module.scaling[name],
            )
