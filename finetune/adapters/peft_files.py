"""Adapters in PEFT's format: parameters of their own beside a frozen, streamed model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters.residual import convert
from finetune.adapters.seal import CONFIG, seal_adapter
from finetune.memory.errors import UserError
from finetune.offload.files.new_directory import new_directory
from finetune.offload.weights.parts import ModelParts


def save(model: nn.Module, directory: Path, about: Mapping[str, Any] | None) -> None:
    """Writes the adapter in PEFT's format; what was in `directory` stays until the new one is whole. about: what the
    run says of itself, of which the adapter keeps "model" and "run", and "step" where that is known; None: nothing is known."""
    try:
        with new_directory(directory) as temporary:
            # Embedding and head are placeholders here: PEFT must not take them along.
            model.save_pretrained(temporary, save_embedding_layers=False, selected_adapters=["default"])
            convert(model, temporary)
            _order_modules(temporary / CONFIG)
            if about is not None:
                seal_adapter(temporary, about)
    except OSError as error:
        raise UserError(
            f"cannot write the adapter to {directory}: {error.strerror or error}. Make room or mend it, then "
            "go on with --resume: the training state is saved"
        ) from error


def _order_modules(path: Path) -> None:
    """PEFT keeps names of targets in a set and writes them in another order in every process; a run's bytes do not depend on
    that."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")  # as PEFT writes it


def reads_whole(model: nn.Module, parts: ModelParts) -> tuple[bool, frozenset[str]]:
    """Whether an adapter of the head looks at it as a whole, and the names of the embedding tables that adapters look at so:
    all but LoRA's plain products, which take the rows of a batch."""
    head = parts.head is not None and model.get_output_embeddings() is not parts.head.module
    wrappers = {base_of(module): module for module in model.modules() if base_of(module) is not None}
    tables = (name for name, module, _ in parts.embeddings if module in wrappers and not _takes_rows(wrappers[module]))
    return head, frozenset(tables)


def table_bytes(model: nn.Module, parts: ModelParts) -> int:
    """What adapters make for a moment of the largest table that they look at as a whole: DoRA its change, the scaled change and
    the sum, in fp32; rows that are trained alone a copy, and two gradients."""
    head = parts.head.module if parts.head else None
    tables = (
        base
        for module in model.modules()
        if _makes_a_table(module)
        if (base := base_of(module)) is head or isinstance(base, nn.Embedding)
    )
    return 3 * 4 * max((table.weight.numel() for table in tables), default=0)


def _makes_a_table(adapter: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(adapter, LoraLayer):
        return bool(adapter.lora_magnitude_vector)
    return isinstance(adapter, BaseTunerLayer) or hasattr(adapter, "trainable_tokens_delta")


def base_of(module: nn.Module) -> nn.Module | None:
    """What an adapter is around, if `module` is one."""
    base = module._modules.get("base_layer")
    return module._modules.get("original_module") if base is None else base


def _takes_rows(adapter: nn.Module) -> bool:
    from peft.tuners.lora import Embedding

    return isinstance(adapter, Embedding) and not adapter.lora_variant


def task_type(model: nn.Module) -> str | None:
    """PEFT's word for what `model` does."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return None
