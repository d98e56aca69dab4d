"""LoRA layers that share their input in fp32 and add to their base's output in one pass, see
`finetune.offload.step.scaled_sum`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.offload.step.scaled_sum import ScaledSum, Widener


def sum_in_one_pass(model: nn.Module) -> None:
    """model: wrapped by PEFT, to compute on a CPU. Layers that PEFT computes otherwise, such as DoRA's, stay as they are."""
    from peft.tuners.lora import Linear

    widen = Widener()
    for layer in model.modules():
        if type(layer) is Linear and "forward" not in layer.__dict__:
            layer.forward = partial(_forward, layer, layer.forward, widen)


def _forward(layer: Any, plain: Callable[..., Tensor], widen: Widener, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = None if args or kwargs else _only_adapter(layer)
    if name is None:
        return plain(x, *args, **kwargs)
    result = layer.base_layer(x)
    update = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](widen(x))))
    return ScaledSum.apply(result, update, layer.scaling[name])


def _only_adapter(layer: Any) -> str | None:
    """The adapter that is all of what is added, in fp32; None: PEFT's own forward knows what to do."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    (name,) = active
    is_plain = name in layer.lora_A and name not in layer.lora_variant and layer.cast_input_dtype_enabled
    return name if is_plain and layer.lora_A[name].weight.dtype == layer.lora_B[name].weight.dtype == torch.float32 else None
