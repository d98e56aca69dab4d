"""Adapters in PEFT's format: parameters of their own beside a frozen, streamed model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from finetune.methods.adapter_seal import CONFIG, WEIGHTS, check_adapter, seal_adapter
from memory.errors import UserError
from memory.new_directory import new_directory


def load(model: nn.Module, directory: Path, trainable: bool) -> nn.Module:
    """`model` with the adapter saved in `directory`. Raises UserError when it is not there, is damaged or does not fit the
    model."""
    from peft import PeftModel

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"{directory} is not an adapter: expected {name} in it")
    check_adapter(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)
    except (ValueError, TypeError, RuntimeError, OSError, KeyError, SafetensorError) as error:
        raise UserError(f"the adapter in {directory} does not fit this model: {error}") from error


def save(model: nn.Module, directory: Path, base: Mapping[str, str]) -> None:
    """Writes the adapter in PEFT's format; what was in `directory` stays until the new one is whole. base: "name" and "digest"
    of the model that it was trained on."""
    try:
        with new_directory(directory) as temporary:
            # Embedding and head are placeholders here: PEFT must not take them along.
            model.save_pretrained(temporary, save_embedding_layers=False)
            _order_modules(temporary / CONFIG)
            seal_adapter(temporary, base)
    except OSError as error:
        raise UserError(
            f"cannot write the adapter to {directory}: {error.strerror or error}. Make room or mend it, then "
            "go on with --resume: the training state is saved"
        ) from error


def _order_modules(path: Path) -> None:
    """PEFT keeps names of modules in a set and writes them in another order in every process; a run's bytes do not depend on
    that."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")  # as PEFT writes it


def prefix_length(model: nn.Module) -> int:
    """Positions that PEFT's prefix, where `model` has one, takes before every text."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "peft_type", None) == "PREFIX_TUNING" else 0


def check_streamable(model: nn.Module) -> None:
    """Raises UserError when weights of the base are to be trained (`modules_to_save`, `bias`): they are not in memory; and for
    adapters of another kind than LoRA's and prefixes."""
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning and not prefix_length(model):
        found = config.peft_type.value.lower()
        raise UserError(f"expected a LoRA adapter or a prefix, found {found}, which cannot be streamed")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not ("lora_" in name or name.startswith("prompt_encoder.")):
            raise UserError(
                f"the lora options would train {name}, which is a weight of the model itself: only adapters can be trained "
                "while the model is streamed. Leave lora.extra.modules_to_save and lora.extra.bias out, or target the "
                "module with an adapter"
            )


def task_type(model: nn.Module) -> str | None:
    """PEFT's word for what `model` does."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return None
