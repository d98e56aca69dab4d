"""How weights that are stored in 16 bits can be rounded."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from finetune.memory.errors import UserError
from finetune.offload.weights.parts import ModelParts


def check_stochastic_rounding(parts: ModelParts, names: Iterable[str], key: str, remedy: str) -> None:
    """Raises UserError where one of these parameters is stored in a dtype that cannot be rounded stochastically. key: what asks
    for it, as the user types it. remedy: what to set it to."""
    fp16 = next((name for name in sorted(names) if parts.sources[name].dtype == torch.float16), None)
    if fp16 is not None:
        raise UserError(
            f"{fp16} is stored as float16, which {key} cannot round stochastically: set it to {remedy}, or save the model in "
            "bfloat16"
        )
