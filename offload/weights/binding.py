"""Puts the bytes of a slot under a module's parameters for the length of a visit.

[Note: stored and compute dtype]
Weights stay in slots as they are stored. Where that is not the dtype that the model computes in (packed weights, and fp32 on a
CPU that multiplies bf16 slowly), a linear layer decodes its weight when it multiplies by it. Where the plan has room for its
numbers they stay until the block is let go, and all products of the visit (other lanes, recomputation, backward) are with them.
Where it has none, the weight is decoded at each product, and one at a time exists decoded. Other parameters (norms, biases,
stacked experts) are decoded when they are bound. bf16 and fp16 to fp32 is exact: the result is that of a model loaded in fp32.

A weight is decoded whole, not in strips that would stay in cache: MKL and oneDNN choose kernels and cut sums by the sizes of a
product and the number of threads, so the product of a strip has other bits than that part of the whole product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain

import torch
from torch import nn
from torch.nn import functional

from finetune.memory.errors import UserError
from finetune.offload.step.deferred_products import DeferProducts, values
from finetune.offload.weights.formats import Stored, StoredWeight
from finetune.offload.weights.formats.plain import dense_bytes

LAZY_MIN_BYTES = 65536  # smaller weights are decoded once, at bind


class LinearInSlot:
    """Of an nn.Linear whose weight stays in the slot as it is stored: that weight, and its numbers while it is bound. What
    takes the layer's forward over is derived from it."""

    __slots__ = ("_made", "_room", "module", "stored", "weight")

    def __init__(self, module: nn.Linear) -> None:
        """module: whose bias is added."""
        self.module = module
        self.weight: StoredWeight | None = None
        self.stored: Stored | None = None
        self._room: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    def put(self, stored: Stored | None, room: torch.Tensor | None = None) -> None:
        """stored: what lies in the slot of `weight` now; None: nothing. The same tensors once more hold what they have held.
        room: where the numbers stay until something else is put; None: nowhere."""
        if stored is None or self.stored is None or not _are_same(stored, self.stored):
            self._made = None
        self.stored, self._room = stored, room

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns]"""
        if self.stored is None:
            raise RuntimeError("a streamed linear layer was called while its block is away")
        if self._room is None or self._room.dtype != dtype:
            return self.weight.decode(self.stored, dtype)
        if self._made is None:
            self._made = self.weight.decode(self.stored, dtype, self._room)
        return self._made


def _are_same(first: Stored, second: Stored) -> bool:
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return first is second
    return first.keys() == second.keys() and all(first[part] is second[part] for part in first)


class _StoredLinear(torch.autograd.Function):
    """y = x W^T + b, [rows, columns], with W as it is stored. W is frozen: it gets no gradient.

    The stored weight is a view of the visit's slot and outlives the graph by the engine's order, so nothing is saved.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: LinearInSlot, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        rows = values(x).reshape(-1, x.shape[-1])
        deferring = DeferProducts.entered
        product = partial(_product, rows, layer, bias)
        return deferring.defer((rows.shape[0], layer.weight.shape[0]), product, [rows]) if deferring else product()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return (grad @ ctx.layer.numbers(grad.dtype)).view(ctx.shape), None, None


def _product(rows: torch.Tensor, layer: LinearInSlot, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(rows, layer.numbers(rows.dtype), bias)


class _LazyForward(LinearInSlot):
    """The layer's own forward."""

    __slots__ = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = _StoredLinear.apply(x, self, self.module.bias)
        # As PyTorch's own linear does it: adapters add to it in place, which a view would refuse.
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])


class Binding:
    """The frozen tensors of one streamed unit (a block, the head): module, name, and how each is bound.

    Built before adapters wrap the modules: it holds the modules themselves, so wrapping does not matter.
    """

    def __init__(self, root: nn.Module, dtypes: Mapping[str, torch.dtype], weights: Mapping[str, StoredWeight]) -> None:
        """dtypes: compute dtype per parameter or buffer of `root`; weights: how those are stored that are streamed."""
        self.dtypes = {name: dtypes[name] for name in weights}
        """Compute dtype of everything that is streamed, by local name."""
        self.linear_weights: dict[str, nn.Linear] = {}
        """Local name of the weight of every linear layer, and the layer."""
        self._weights = dict(weights)
        self._targets: list[tuple[str, nn.Module, str, torch.dtype]] = []
        self._lazy: dict[str, LinearInSlot] = {}
        self._empty: list[tuple[dict, str, torch.Tensor | None]] = []
        for name, weight in weights.items():
            owner_name, _, attribute = name.rpartition(".")
            owner = root.get_submodule(owner_name)
            is_linear = type(owner) is nn.Linear and attribute == "weight"
            if is_linear:
                self.linear_weights[name] = owner
            if is_linear and not weight.is_stored_as(dtypes[name]) and weight.num_bytes >= LAZY_MIN_BYTES:
                self._lazy[name] = owner.forward = _LazyForward(owner)
                owner.forward.weight = weight
            else:
                self._targets.append((name, owner, attribute, dtypes[name]))
                home = owner._parameters if attribute in owner._parameters else owner._buffers
                self._empty.append((home, attribute, home[attribute]))
        sizes = {name: dense_bytes(weights[name].shape, dtypes[name]) for name in self._lazy}
        self.lazy_bytes: dict[str, int] = dict(sorted(sizes.items(), key=lambda item: -item[1]))
        """Of the weights that are decoded when they are multiplied by, once decoded: the largest first, by local name."""

    @property
    def decoded_bytes(self) -> int:
        """Of what stands decoded while this is bound: all that is decoded when it is bound, and one linear layer's weight."""
        def dense(name: str) -> int:
            return dense_bytes(self._weights[name].shape, self.dtypes[name])

        bound = (dense(name) for name, _, _, dtype in self._targets if not self._weights[name].is_stored_as(dtype))
        return sum(bound) + max(self.lazy_bytes.values(), default=0)

    def read_as(self, weights: Mapping[str, StoredWeight]) -> None:
        """From now on slots have these weights, under the same names, which may be in other formats: of linear layers whose
        weights are packed now, they are decoded when they are multiplied by."""
        packed = {
            name: _LazyForward(owner)
            for name, owner in self.linear_weights.items()
            if name not in self._lazy and not weights[name].is_stored_as(self.dtypes[name])
            and self._weights[name].is_stored_as(self.dtypes[name]) and weights[name].num_bytes >= LAZY_MIN_BYTES
        }  # fmt: skip
        self._weights = dict(weights)
        kept = [i for i, (name, *_) in enumerate(self._targets) if name not in packed]
        self._targets, self._empty = [self._targets[i] for i in kept], [self._empty[i] for i in kept]
        for name, forward in packed.items():
            self._lazy[name] = self.linear_weights[name].forward = forward
            self.lazy_bytes[name] = dense_bytes(weights[name].shape, self.dtypes[name])
        self.lazy_bytes = dict(sorted(self.lazy_bytes.items(), key=lambda item: -item[1]))
        for name, forward in self._lazy.items():
            forward.weight = weights[name]

    def bind(
        self,
        views: Mapping[str, torch.Tensor],
        trained: Collection[str] = (),
        rooms: Sequence[torch.Tensor | None] = (),
        only: Collection[str] | None = None,
    ) -> None:
        """views: the slot's stored tensors, by the names of its layout. trained: weights whose gradients are wanted; they must
        not be decoded lazily, see `convert_at_bind`. rooms: uint8, where the weights of `lazy_bytes`, in that order, may stay
        decoded; None, or none left: of that weight nothing stays. only: the names that are bound; None: all."""
        for name, owner, attribute, dtype in self._targets:
            if only is not None and name not in only:
                continue
            weight = self._weights[name]
            # Slots are views of one slab and would share its version counter: without `data`, code that touches one
            # parameter (PEFT parametrises experts) spoils what autograd has saved of the others.
            tensor = weight.decode(weight.take(views, name), dtype).data
            if attribute in owner._parameters:
                owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=name in trained)
            else:
                owner._buffers[attribute] = tensor
        found = dict(zip(self.lazy_bytes, rooms, strict=False))
        for name, forward in self._lazy.items():
            if only is not None and name not in only:
                continue
            room = found.get(name)
            if room is not None:
                room = room[: self.lazy_bytes[name]].view(self.dtypes[name]).view(self._weights[name].shape)
            forward.put(self._weights[name].take(views, name), room)

    def names(self, is_meant: Callable[[nn.Module, str], bool]) -> frozenset[str]:
        """Of those streamed tensors that are meant, given the module that has it and its name there."""
        lazy = ((name, self.linear_weights[name], "weight") for name in self._lazy)
        bound = ((name, owner, attribute) for name, owner, attribute, _ in self._targets)
        return frozenset(name for name, owner, attribute in chain(bound, lazy) if is_meant(owner, attribute))

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the trained tensors that have one, by local name."""
        found = ((name, owner._parameters.get(attribute)) for name, owner, attribute, _ in self._targets)
        return {name: p.grad for name, p in found if p is not None and p.grad is not None}

    def unbind(self) -> None:
        for home, attribute, placeholder in self._empty:
            home[attribute] = placeholder
        for forward in self._lazy.values():
            forward.put(None)

    def multiply_by(self, forwards: Mapping[str, LinearInSlot]) -> None:
        """From now on the linear layers with these weights (local names) run these forwards."""
        kept = [i for i, (name, *_) in enumerate(self._targets) if name not in forwards]
        self._targets = [self._targets[i] for i in kept]
        self._empty = [self._empty[i] for i in kept]
        for name, forward in forwards.items():
            owner = self.linear_weights[name]
            forward.weight = self._weights[name]
            self._lazy[name] = owner.forward = forward
            owner._parameters["weight"] = nn.Parameter(owner.weight.as_subclass(_InItsSlot), requires_grad=False)

    def convert_at_bind(self, modules: Collection[nn.Module] | None = None) -> None:
        """From now on the weights of these linear layers, or of all, are decoded when they are bound: for code that reads
        `weight` itself (DoRA's norm)."""
        for name in [name for name in self._lazy if modules is None or self.linear_weights[name] in modules]:
            owner = self.linear_weights[name]
            owner.__dict__.pop("forward", None)
            self._targets.append((name, owner, "weight", owner.weight.dtype))
            self._empty.append((owner._parameters, "weight", owner.weight))
            del self._lazy[name], self.lazy_bytes[name]


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
