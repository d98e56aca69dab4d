"""Operations on the meta device: what they allocate while they live, and what they multiply.

Shapes move there, numbers do not. What kernels allocate inside themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.memory.tensor_file import allocates_in_file


def peak_bytes(run: Callable[[], object]) -> int:
    """Of the tensors that `run` makes, on meta or not, the most that live at once."""
    counter = LiveBytes()
    with counter:
        run()
    return counter.peak_bytes


_PRODUCTS = {
    overload
    for product in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    for overload in (product.default, product.out)
}


def run_operation(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation of PyTorch on meta tensors."""
    if function is torch.ops.aten.slice_backward.default:
        return args[0].new_empty(args[1])  # its own shape function would load sympy, 30 MiB that stay
    return function(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages between their first appearance in a result and their end. near: without those that can lie
    in a file, see `finetune.memory.tensor_file`."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.flops = 0
        self.near_peak_bytes = self._near_bytes = 0
        self._known: dict[int, Any] = {}

    def ignore(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            self._known[tensor.untyped_storage()._cdata] = tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = run_operation(function, args, kwargs or {})
        if function in _PRODUCTS:
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        near_bytes = 0 if allocates_in_file() else num_bytes
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, num_bytes, near_bytes))
        self.live_bytes += num_bytes
        self._near_bytes += near_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.near_peak_bytes = max(self.near_peak_bytes, self._near_bytes)

    def _forget(self, key: int, num_bytes: int, near_bytes: int) -> None:
        if self._known.pop(key, None) is not None:
            self.live_bytes -= num_bytes
            self._near_bytes -= near_bytes


class _FlashShapes(torch.autograd.Function):
    """What the CPU and GPU flash kernels keep and return: the output, in memory with heads behind rows, and one log-sum-exp per
    row."""

    @staticmethod
    def forward(ctx, query, key, value):
        sizes = [*query.shape[:-1], value.shape[-1]]
        sizes[-3:-1] = reversed(sizes[-3:-1])
        output = torch.empty(sizes, dtype=query.dtype, device="meta").transpose(-3, -2)
        lse = torch.empty(query.shape[:-1], dtype=torch.float32, device="meta")
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class MetaAttention(TorchFunctionMode):
    """The meta device has no flash attention and would count the quadratic scores of the fallback."""

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention and not kwargs.get("dropout_p"):
            return _FlashShapes.apply(*args[:3]) if len(args) >= 3 else function(*args, **kwargs)
        return function(*args, **kwargs)
