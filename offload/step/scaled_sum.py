"""result + update * scaling, where an adapter adds to the output of the layer that it wraps: one pass over memory on a CPU.

PyTorch takes a pass for the product, one for the sum and one for its rounding, over fp32 arrays as large as the output: half
of what LoRA costs there. The bits are the same, forward and backward: product and sum are rounded to fp32, then to the dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from finetune_native import Dtype
from finetune_native import scaled_sum as _native
from torch import Tensor

from offload.step.deferred_products import Deferred, values

_DTYPES = {torch.float32: Dtype.float32, torch.bfloat16: Dtype.bfloat16}


class ScaledSum(torch.autograd.Function):
    """`(result + update * scaling).to(result.dtype)`, with its gradients. result, update: of the same shape, update in fp32."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, update: Tensor, scaling: float) -> Tensor:
        ctx.scaling = scaling
        if isinstance(result, Deferred) or isinstance(update, Deferred):
            return Deferred(
                result.shape, result.dtype, lambda: _sum(values(result), values(update), scaling), [result, update]
            )
        return _sum(result, update, scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_result, of_update, _ = ctx.needs_input_grad
        return gradient if of_result else None, _scaled(gradient, ctx.scaling) if of_update else None, None


def _sum(result: Tensor, update: Tensor, scaling: float) -> Tensor:
    if not _takes(result, update):
        return (result + update * scaling).to(result.dtype)
    out = torch.empty_like(result)
    if not out.is_meta and out.numel():
        _native.add(
            out.data_ptr(), result.data_ptr(), update.data_ptr(), scaling, _DTYPES[result.dtype], out.numel(),
            torch.get_num_threads(),
        )  # fmt: skip
    return out


def _scaled(gradient: Tensor, scaling: float) -> Tensor:
    if not _takes(gradient):
        return gradient.to(torch.float32) * scaling
    out = torch.empty_like(gradient, dtype=torch.float32)
    if not out.is_meta and out.numel():
        _native.scale(
            out.data_ptr(), gradient.data_ptr(), scaling, _DTYPES[gradient.dtype], out.numel(), torch.get_num_threads()
        )
    return out


def _takes(value: Tensor, update: Tensor | None = None) -> bool:
    if update is not None and (update.dtype != torch.float32 or update.shape != value.shape or not update.is_contiguous()):
        return False
    return value.dtype in _DTYPES and value.is_contiguous() and value.device.type in ("cpu", "meta")
