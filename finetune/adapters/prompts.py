"""Prompt tuning (Lester et al. 2021) and P-tuning (Liu et al. 2021) through PEFT: vectors that stand before every text.

They are outside of blocks: their gradients come through what the first block is called with.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from finetune.adapters.base import Adapter
from finetune.memory.errors import UserError
from finetune.offload.weights.skeleton import cache_argument


class Prompt(Adapter):
    @property
    def needs_whole_texts(self) -> bool:
        return True

    @property
    def positions(self) -> int:
        return self.model.active_peft_config.num_virtual_tokens

    def check_length(self, num_tokens: int) -> None:
        check_positions(self.model, "prompt", self.positions, num_tokens)

    def lane_bytes(self, itemsize: int) -> int:
        """Of the prompt, of labels and of what the end of the model holds of these positions."""
        return self.positions * (12 * self.model.active_peft_config.token_dim * 4 + 64)

    def take_over(self) -> None:
        """Lets a text that goes on in a cache be without the prompt."""
        if not hasattr(self.model, "prepare_inputs_for_generation"):
            raise UserError(f"a prompt: expected a language model, found {type(self.model.get_base_model()).__name__}")
        self.model.forward = partial(_forward, self.model)


def check_positions(model: nn.Module, word: str, before: int, num_tokens: int) -> None:
    """Raises UserError where a `word` of so many positions and a text of so many tokens are more than the model has."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and before + num_tokens > positions:
        raise UserError(
            f"a {word} of {before} and texts of {num_tokens} tokens are more than the model's {positions} positions: lower "
            f"--sequence-length to {positions - before}"
        )


def _forward(model: nn.Module, *, input_ids: torch.Tensor, **inputs: Any) -> Any:
    """PEFT's forward; in a cache that holds a text the prompt is there already. Logits are those of the text alone."""
    past = inputs.get(cache_argument(model.base_model))
    if past is not None and past.get_seq_length():
        return model.base_model(input_ids=input_ids, **inputs)
    output = type(model).forward(model, input_ids=input_ids, **inputs)
    if inputs.get("labels") is None and getattr(output, "logits", None) is not None:
        output.logits = output.logits[:, model.active_peft_config.num_virtual_tokens :]
    return output
