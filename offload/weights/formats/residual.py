"""A base weight less what an adapter begins with: W - s B A, which PiSSA and OLoRA put in the place of W.

The files stay as they are; the subtraction is part of decoding, with the operations that PEFT does once.

Source: `pissa_init` and `olora_init` of `peft/tuners/lora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.weights.formats.base import Stored, StoredWeight
from finetune.offload.weights.formats.plain import PlainTensor


class Initial(nn.Module):
    """What an adapter of a linear layer begins with: fp32 `one` [rank, columns] and `other` [rows, rank]. They are in the
    model, so that they go where it computes and are counted with it."""

    def __init__(self, one: Tensor, other: Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("one", one, persistent=False)
        self.register_buffer("other", other, persistent=False)
        self.scaling = scaling
        self.dtype = torch.float32
        """Of the layer's weight."""


@dataclass(frozen=True, slots=True)
class ResidualWeight(StoredWeight):
    """Of a linear layer."""

    word = "plain numbers less an adapter's first values"

    base: PlainTensor
    initial: Initial = field(compare=False, repr=False)

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        """None: no file has it."""
        return {}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def has_rows(self) -> bool:
        return False

    def rows(self, ranges: Iterable[tuple[int, int]]) -> ResidualWeight:
        raise ValueError("rows of a weight that is made whole")

    def decode_into(self, stored: Stored, numbers: Tensor) -> None:
        initial = self.initial
        one, other = initial.one.to(numbers.device), initial.other.to(numbers.device)
        weight = self.base.decode(stored["base"], numbers.dtype).to(torch.float32)
        numbers.copy_(weight - initial.scaling * other @ one)
