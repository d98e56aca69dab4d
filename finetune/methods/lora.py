"""LoRA and its family through PEFT: adapters resident, the base streamed and frozen.

Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA); the arithmetic is PEFT's.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    arguments = {"task_type": _task_type(model), **arguments}
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's, about Transformers' names: nothing a user can do
            return get_peft_model(model, LoraConfig(**arguments))
    except (ValueError, TypeError) as error:
        raise UserError(f"PEFT refuses the lora options: {error}") from error


def load(model: nn.Module, directory: Path, trainable: bool) -> nn.Module:
    """`model` with the adapter saved in `directory`. Raises UserError when it is not there or does not fit the model."""
    from peft import PeftModel

    if not (directory / "adapter_config.json").is_file():
        raise UserError(f"{directory} is not an adapter: expected adapter_config.json in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise UserError(f"the adapter in {directory} does not fit this model: {error}") from error


def save(model: nn.Module, directory: Path) -> None:
    """Writes the adapter in PEFT's format; what was in `directory` stays until the new one is whole."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(mode=0o700, parents=True)
        # Embedding and head are placeholders here: PEFT must not take them along.
        model.save_pretrained(temporary, save_embedding_layers=False)
        for path in temporary.iterdir():
            path.chmod(0o600)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the adapter to {directory}: {error.strerror or error}. Make room or mend it, then "
            "go on with --resume: the training state is saved"
        ) from error


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


def check_streamable(model: nn.Module) -> None:
    """Raises UserError when weights of the base are to be trained (`modules_to_save`, `bias`): they are not in memory."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            raise UserError(
                f"the lora options would train {name}, which is a weight of the model itself: only adapters can be trained "
                "while the model is streamed. Leave lora.extra.modules_to_save and lora.extra.bias out, or target the "
                "module with an adapter"
            )


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return None
