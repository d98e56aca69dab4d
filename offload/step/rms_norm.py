"""Root mean square norms inside of blocks, with a third of the passes over memory on a CPU, and the bits of Transformers.

[Note: norms]
137 architectures of Transformers have the same forward for this norm (Zhang and Sennrich 2019): x in fp32, its squares, their
mean, x over its root, rounded to the model's dtype, times a weight. Autograd goes back through that in ten passes, over fp32
copies that it keeps. Here a graph keeps x as it is and one number a row. Sums over rows are PyTorch's own, because their order
decides the bits; everything else is done in one pass before the sum and one after it, with the roundings of the operations
that it stands for. A norm in another dtype than bf16 goes PyTorch's way: in fp32 its sums are those of the residual stream
around it, in an order that only autograd knows. So does one whose weight is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from finetune_native import rms_norm as _native
from torch import Tensor, nn

from finetune.offload.step.deferred_products import values


def norms_in_few_passes(blocks: Iterable[nn.Module]) -> None:
    """Norms inside of `blocks` whose code is the usual one compute so from now on, on a CPU."""
    for block in blocks:
        for module in block.modules():
            if "forward" not in vars(module) and _is_usual(type(module)):
                module.forward = partial(_forward, module, module.forward)


def _is_usual(kind: type[nn.Module]) -> bool:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    code, usual = (getattr(one.forward, "__code__", None) for one in (kind, LlamaRMSNorm))
    return code is not None and all(
        getattr(code, name) == getattr(usual, name) for name in ("co_code", "co_consts", "co_names", "co_varnames")
    )


def _forward(module: Any, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    weight = module.weight
    alike = x.dtype == weight.dtype == torch.bfloat16 and x.device == weight.device and (x.is_cpu or x.is_meta)
    if args or kwargs or not alike or weight.requires_grad or not (x.is_contiguous() and weight.is_contiguous()):
        return plain(x, *args, **kwargs)
    return RMSNorm.apply(x, weight, module.variance_epsilon)


class RMSNorm(torch.autograd.Function):
    """weight * (x / sqrt(mean(x^2) + epsilon)) with the gradient of x. x: bf16 [..., columns], weight: bf16 [columns], both
    contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = values(x)
        scales = torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scales)
        out = torch.empty_like(x)
        _run(_native.forward, x, weight, scales, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scales = ctx.saved_tensors
        gradient = gradient.contiguous()
        products = torch.empty_like(x, dtype=torch.float32)
        _run(_native.products, x, weight, gradient, products)
        of_scales = products.sum(-1, keepdim=True)
        del products
        slopes = -0.5 * of_scales * scales.pow(3) / x.shape[-1]
        out = torch.empty_like(x)
        _run(_native.backward, x, weight, gradient, scales, slopes, out)
        return out, None, None


def _run(kernel: Callable[..., None], x: Tensor, weight: Tensor, *more: Tensor) -> None:
    if x.is_meta or not x.numel():
        return
    columns = x.shape[-1]
    rows = x.data_ptr(), weight.data_ptr(), x.numel() // columns, columns
    kernel(rows, *(tensor.data_ptr() for tensor in more), torch.get_num_threads())
