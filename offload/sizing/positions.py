"""How long a row a model has positions for, where they are a table and not a formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune.offload.sizing.dry_run import run_first_block
from finetune.offload.weights.parts import ModelParts


def longest_row(parts: ModelParts, model: nn.Module, inputs: dict[str, Any]) -> int:
    """Tokens of the longest row that the model (adapters included) has positions for, at most as many as `inputs` have.

    inputs: with `input_ids` [rows, tokens]. Rows are shortened until the model takes them: up to its first block on
    placeholders, through that on meta. On meta no index is out of range, so a table within blocks is told by its size.
    """
    length = inputs["input_ids"].shape[1]
    # Padding may have no position of its own.
    token = 1 if getattr(parts.model.config.get_text_config(), "pad_token_id", None) == 0 else 0
    inputs = inputs | {"input_ids": torch.full_like(inputs["input_ids"], token)}
    limit = min(length, _tabled_positions(parts.model) or length)
    if _takes(parts, model, inputs, length, limit) or not _takes(parts, model, inputs, length, min(2, limit)):
        return limit  # the latter: whatever stands in the way, it is not the length
    low, high = min(2, limit), limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _takes(parts, model, inputs, length, middle) else (low, middle)
    return low


def _takes(parts: ModelParts, model: nn.Module, inputs: dict[str, Any], length: int, shorter: int) -> bool:
    def cut(value: Any) -> Any:
        along = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == length
        return value[:, :shorter] if along else value

    try:
        run_first_block(parts, model, {name: cut(value) for name, value in inputs.items()})
    except (IndexError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _tabled_positions(model: nn.Module) -> int | None:
    """The model's largest position, where a table of so many rows (rotations, a causal mask) is among its buffers."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = (buffer.shape for buffer in model.buffers() if buffer.dim() > 1)
    return positions if any(positions in shape for shape in tables) else None
