"""Puts the bytes of a slot under a module's parameters for the length of a visit.

[Note: stored and compute dtype]
Weights stay in the checkpoint's dtype in slots. Where the model computes in another dtype (fp32 on a CPU that multiplies
bf16 slowly), linear layers convert their weight at each use, strip by strip, so that no converted weight ever exists
whole; other parameters (norms, biases, stacked experts) are converted when they are bound. bf16 and fp16 to fp32 is exact: the
result is that of a model loaded in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from memory.errors import UserError
from offload.step.deferred_products import DeferProducts, values

LAZY_MIN_BYTES = 65536  # smaller weights are converted once, at bind
STRIP = 768  # columns of the result per converted strip: some MiB, less than a level 3 cache


class _CastLinear(torch.autograd.Function):
    """y = x W^T + b with W converted to x's dtype, a strip at a time. W is frozen: it gets no gradient.

    Strips cut the result's columns, never the sum over the inner dimension, so every element is the same dot product as in
    one large product: the same bits (held by tests), and the strip is still in cache when it is multiplied.
    The stored weight is a view of the visit's slot and outlives the graph by the engine's order, so nothing is saved.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.stored = stored
        rows = values(x).reshape(-1, x.shape[-1])
        product = partial(linear_product, rows, stored, bias)
        deferring = DeferProducts.entered
        y = deferring.defer((rows.shape[0], stored.shape[0]), product, [rows]) if deferring else product()
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        stored = ctx.stored
        rows = grad.reshape(-1, grad.shape[-1])
        dx = rows.new_empty(rows.shape[0], stored.shape[1])
        for strip in strips(stored.shape[1]):
            torch.mm(rows, stored[:, strip].to(grad.dtype), out=dx[:, strip])
        return dx.view(*grad.shape[:-1], -1), None, None


def linear_product(rows: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """rows [n, in] times stored^T, [out, in] in any dtype, plus bias [out]: [n, out] in the dtype of `rows`."""
    if stored.dtype == rows.dtype:
        return nn.functional.linear(rows, stored, bias)
    y = rows.new_empty(rows.shape[0], stored.shape[0])
    for strip in strips(stored.shape[0]):
        weight = stored[strip].to(rows.dtype).t()
        if bias is None:
            torch.mm(rows, weight, out=y[:, strip])
        else:
            torch.addmm(bias[strip], rows, weight, out=y[:, strip])
    return y


def strips(size: int) -> list[slice]:
    """How a weight with so many rows is cut where it is converted at each use: nearly equally, in whole vectors; sizes that are
    not go in one piece, for a ragged last strip of few rows is multiplied by another kernel, with other rounding."""
    if size % 64:
        return [slice(0, size)]
    count = -(-size // STRIP)
    step = -(-size // (64 * count)) * 64
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class Binding:
    """The frozen tensors of one streamed unit (a block, the head): module, name, and how each is bound.

    Built before adapters wrap the modules: it holds the modules themselves, so wrapping does not matter.
    """

    def __init__(self, root: nn.Module, dtypes: Mapping[str, torch.dtype], stored: Mapping[str, torch.dtype]) -> None:
        """dtypes: compute dtype per parameter or buffer of `root`; stored: dtype in the slot, for those that are streamed."""
        self.dtypes = {name: dtypes[name] for name in stored}
        """Compute dtype of everything that is streamed, by local name."""
        self.linear_weights: dict[str, nn.Linear] = {}
        """Local name of the weight of every linear layer, and the layer."""
        self._targets: list[tuple[str, nn.Module, str, torch.dtype]] = []
        self._lazy: dict[str, Any] = {}  # forwards whose `stored` is the weight
        self._empty: list[tuple[dict, str, torch.Tensor | None]] = []
        for name, stored_dtype in stored.items():
            owner_name, _, attribute = name.rpartition(".")
            owner = root.get_submodule(owner_name)
            tensor = getattr(owner, attribute)
            is_linear = type(owner) is nn.Linear and attribute == "weight"
            if is_linear:
                self.linear_weights[name] = owner
            is_lazy = (
                is_linear
                and stored_dtype != dtypes[name]
                and tensor.numel() * stored_dtype.itemsize >= LAZY_MIN_BYTES
            )
            if is_lazy:
                self._lazy[name] = owner.forward = _LazyForward(owner)
            else:
                self._targets.append((name, owner, attribute, dtypes[name]))
                home = owner._parameters if attribute in owner._parameters else owner._buffers
                self._empty.append((home, attribute, home[attribute]))

    def bind(self, views: Mapping[str, torch.Tensor], trained: Collection[str] = ()) -> None:
        """views: local name -> tensor over the slot's bytes, stored dtype. trained: names whose gradients are wanted; they must
        not be converted lazily, see `convert_at_bind`."""
        for name, owner, attribute, dtype in self._targets:
            # Slots are views of one slab and would share its version counter: without `data`, code that touches one
            # parameter (PEFT parametrises experts) spoils what autograd has saved of the others.
            tensor = views[name].data.to(dtype)
            if attribute in owner._parameters:
                owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=name in trained)
            else:
                owner._buffers[attribute] = tensor
        for name, forward in self._lazy.items():
            forward.stored = views[name]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the trained tensors that have one, by local name."""
        found = ((name, owner._parameters.get(attribute)) for name, owner, attribute, _ in self._targets)
        return {name: p.grad for name, p in found if p is not None and p.grad is not None}

    def unbind(self) -> None:
        for home, attribute, placeholder in self._empty:
            home[attribute] = placeholder
        for forward in self._lazy.values():
            forward.stored = None

    def multiply_by(self, forwards: Mapping[str, Any]) -> None:
        """From now on the linear layers with these weights (local names) run these forwards, whose `stored` is the weight as
        it lies in the slot."""
        kept = [i for i, (name, *_) in enumerate(self._targets) if name not in forwards]
        self._targets = [self._targets[i] for i in kept]
        self._empty = [self._empty[i] for i in kept]
        for name, forward in forwards.items():
            owner = self.linear_weights[name]
            self._lazy[name] = owner.forward = forward
            owner._parameters["weight"] = nn.Parameter(owner.weight.as_subclass(_InItsSlot), requires_grad=False)

    def convert_at_bind(self) -> None:
        """From now on every weight is converted when it is bound: for code that reads `weight` itself (DoRA's norm)."""
        for name in self._lazy:
            owner = self.linear_weights[name]
            owner.__dict__.pop("forward", None)
            self._targets.append((name, owner, "weight", owner.weight.dtype))
            self._empty.append((owner._parameters, "weight", owner.weight))
        self._lazy = {}


_WITHOUT_NUMBERS = {
    "__get__", "size", "dim", "numel", "stride", "element_size", "untyped_storage", "is_floating_point", "is_contiguous",
    "detach", "requires_grad_",
}  # fmt: skip


class _InItsSlot(torch.Tensor):
    """The placeholder of a weight that only its layer's forward knows: shape and dtype are there, numbers are not."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ not in _WITHOUT_NUMBERS:
            raise UserError(
                "the model multiplies by a linear layer's weight itself, not through the layer: use zo.perturb weights"
            )
        return super().__torch_function__(function, types, args, kwargs or {})


class _LazyForward:
    """The forward of an nn.Linear whose weight stays in the slot, in its stored dtype."""

    __slots__ = ("_module", "stored")

    def __init__(self, module: nn.Linear) -> None:
        self._module = module
        self.stored: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.stored is None:
            raise RuntimeError("a streamed linear layer was called while its block is away")
        return _CastLinear.apply(x, self.stored, self._module.bias)
