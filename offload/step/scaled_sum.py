"""What adapters in fp32 take from a layer's input and add to its output, with fewer passes over memory and less of it.

result + update * scaling: PyTorch takes a pass for the product, one for the sum and one for its rounding, over fp32 arrays as
large as the output: half of what LoRA costs on a CPU. The bits are the same, forward and backward: product and sum are rounded
to fp32, then to the dtype.

The input in fp32: PyTorch makes, and keeps for backward, one for each layer that gets the same input (q, k and v; gate and up).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from finetune_native import Dtype
from finetune_native import scaled_sum as _native
from torch import Tensor

from finetune.offload.step.deferred_products import Deferred, values

_DTYPES = {torch.float32: Dtype.float32, torch.bfloat16: Dtype.bfloat16}


class Widener:
    """Gives the fp32 values of an input; the same memory as before while it is still in use and the input is the one before."""

    def __init__(self) -> None:
        self._input = self._widened = lambda: None  # weak references: what is in use keeps them alive
        self._version = -1

    def __call__(self, x: Tensor) -> Tensor:
        """x: of any dtype and shape."""
        if x.dtype == torch.float32:
            return x
        known = self._widened() if self._input() is x and self._version == x._version else None
        widened = Widened.apply(x, None if known is None else known.detach())
        if known is None:
            self._input, self._widened, self._version = weakref.ref(x), weakref.ref(widened), x._version
        return widened


class Widened(torch.autograd.Function):
    """`x.to(torch.float32)` with its gradient. known: these values, if they are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, known: Tensor | None) -> Tensor:
        ctx.dtype = x.dtype
        return x.to(torch.float32) if known is None else known

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


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
    return value.dtype in _DTYPES and value.is_contiguous() and (value.is_cpu or value.is_meta)
