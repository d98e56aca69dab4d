"""What tuners with routers are made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

NO_MERGE = "which experts compute is chosen for every token, and no weight can hold that: use it with --adapter"


class LoraPair(nn.Module):
    """A LoRA adapter: B A x, scaled, in the layer's dtype."""

    def __init__(self, base_layer: nn.Linear, config: Any) -> None:
        """config: with r, lora_alpha, lora_dropout and use_rslora."""
        super().__init__()
        device = None if base_layer.weight.device.type == "meta" else base_layer.weight.device
        self.lora_A = nn.Linear(base_layer.in_features, config.r, bias=False, device=device)
        self.lora_B = nn.Linear(config.r, base_layer.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * self.scaling).to(dtype)


def router(features: int, num_experts: int, like: Tensor) -> nn.Linear:
    """Of the logits of experts, fp32. like: where it lives."""
    device = None if like.device.type == "meta" else like.device
    return nn.Linear(features, num_experts, bias=False, device=device, dtype=torch.float32)


def check_linear(target: nn.Module, key: str, word: str) -> None:
    """Raises ValueError for what is no linear layer."""
    if not isinstance(target, nn.Linear):
        raise ValueError(f"{key} is a {type(target).__name__}: {word} is for linear layers")


def check_lora(config: Any) -> None:
    """Raises ValueError for options of LoRA that make no sense."""
    if config.r < 1 or not 0 <= config.lora_dropout < 1:
        raise ValueError("r is 1 or more, lora_dropout is from 0 to below 1")
    if config.router_aux_loss_coef < 0:
        raise ValueError("router_aux_loss_coef is 0 or more")
