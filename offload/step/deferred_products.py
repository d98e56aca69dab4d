"""Matrix products of a recomputed block whose values nobody needs: they are not computed.

Backward needs the inputs of a block's last linear layers, not their outputs: those only add up to the block's own output,
which is known. PyTorch's checkpointing stops recomputing there; here the recomputed graph itself runs backward, so these
layers are called, and give tensors without values.

[Note: deferred products]
`Needless` learns at a block's first recomputation which linear layers reach the block's outputs through sums and views, and
nothing else through them, and from then on defers their products. A deferred tensor is computed the moment anything but a
sum, a view, a conversion or a multiplication by a number asks for it, so results never depend on what was learnt; a layer
whose product was asked for is not deferred again. A block that asks after it has overwritten what the product was of runs
once more, with nothing deferred.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

PASSING_NODES = frozenset(
    f"{name}Backward0" for name in ("Add", "View", "UnsafeView", "ReshapeAlias", "Mul", "Alias", "ToCopy")
) | {"ScaledSumBackward"}
"""Nodes of autograd behind which a product may be needless. A guess: who asks without a graph is found out then."""


class Overwritten(RuntimeError):
    """A deferred tensor is wanted, and what it is to be computed from is no longer there."""


class Deferred(torch.Tensor):
    """A contiguous tensor that is computed when it is used, from `operands`, of which the first gives its device."""

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[], torch.Tensor], operands: Sequence[torch.Tensor]
    ) -> Deferred:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=operands[0].device)

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[], torch.Tensor], operands: Sequence[torch.Tensor]
    ) -> None:
        self._compute: Callable[[], torch.Tensor] | None = compute
        self._operands = [(operand, operand._version) for operand in operands]
        self._value: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
        if self._compute is not None:
            if any(operand._version != version for operand, version in self._operands):
                raise Overwritten("a block asks for the output of a linear layer after it has overwritten what it was made of")
            self._value = self._compute()
            self._compute, self._operands = None, []
        return self._value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = _sum_or_view(func, args, kwargs)
        if result is not None:
            operands = [value for value in args if isinstance(value, torch.Tensor)]
            return Deferred(*result, lambda: func(*values(args), **kwargs), operands)
        return func(*values(args), **values(kwargs))


def _sum_or_view(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of the result, where it can stay without values."""
    first = args[0]
    if func is aten._to_copy.default and kwargs.keys() == {"dtype"}:
        return first.shape, kwargs["dtype"]
    if kwargs:
        return None
    if func in (aten.view.default, aten._unsafe_view.default):
        return torch.empty(first.shape, device="meta").view(args[1]).shape, first.dtype
    if func is aten.detach.default:
        return first.shape, first.dtype
    if func is aten.mul.Tensor and isinstance(args[1], (int, float)):
        return first.shape, first.dtype  # floating point, which a number of Python's does not change
    if func is aten.add.Tensor and all(isinstance(value, torch.Tensor) for value in args):
        other = args[1]
        alike = first.shape == other.shape and first.device == other.device
        if alike and first.is_contiguous() and other.is_contiguous():
            return first.shape, torch.promote_types(first.dtype, other.dtype)
    return None


def values(tree: Any) -> Any:
    """`tree` with values in place of what is deferred."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.value() if isinstance(leaf, Deferred) else leaf, tree)


class DeferProducts(TorchDispatchMode):
    """Entered with the first layer whose product is deferred, and until its block has run: of what gets a deferred tensor
    outside of a mode, PyTorch asks whether it is a distributed tensor, for which it imports 500 modules (36 MiB)."""

    entered: DeferProducts | None = None
    """The one that defers products now, for those that are no operation of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: Callable[[], None] | None = None

    @contextlib.contextmanager
    def products_of(self, asked: Callable[[], None] | None) -> Iterator[None]:
        """Inside, matrix products give deferred tensors. asked: called when one of them is computed after all; None: they are
        computed at once."""
        before = DeferProducts.entered, self._asked
        DeferProducts.entered, self._asked = None if asked is None else self, asked
        try:
            yield
        finally:
            DeferProducts.entered, self._asked = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._asked is not None and func in (aten.mm.default, aten.addmm.default) and not kwargs:
            args = values(args)  # of a product of products autograd would keep tensors without values
            rows, columns = args[-2:]
            return self.defer((rows.shape[0], columns.shape[1]), lambda: func(*args), [rows, columns])
        if Deferred in types:
            return Deferred.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)

    def defer(
        self, shape: tuple[int, ...], compute: Callable[[], torch.Tensor], operands: Sequence[torch.Tensor]
    ) -> Deferred:
        asked = self._asked

        def computed() -> torch.Tensor:
            asked()
            with self.products_of(None):
                return compute()

        return Deferred(shape, operands[0].dtype, computed, operands)


class Needless:
    """The linear layers of one block whose products its recomputation defers. See [Note: deferred products]."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._layers: list[nn.Module] | None = None

    def recompute(self, forward: Callable[[], list[Any]]) -> list[Any]:
        """forward: runs the block with a graph, with the same result whenever it is called; gives its outputs, flattened."""
        if self._layers is None:
            return self._learn(forward)
        try:
            with contextlib.ExitStack() as stack:
                enter = functools.cache(lambda: stack.enter_context(DeferProducts()))
                for layer in self._layers:
                    stack.enter_context(self._deferring(layer, enter))
                return forward()
        except Overwritten:
            self._layers = []
            return forward()

    def _learn(self, forward: Callable[[], list[Any]]) -> list[Any]:
        nodes: dict[Any, nn.Module] = {}

        def note(layer: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.grad_fn is not None:
                nodes[output.grad_fn] = layer

        hooks = [layer.register_forward_hook(note) for layer in self._block.modules() if type(layer) is nn.Linear]
        try:
            outputs = forward()
        finally:
            for hook in hooks:
                hook.remove()
        ends = [output.grad_fn for output in outputs if isinstance(output, torch.Tensor)]

        def passes(node: Any) -> bool:
            return node not in nodes and node.name() in PASSING_NODES

        readers = [node for node in _behind(ends, lambda _: True) if not passes(node)]
        read = _behind([node for reader in readers for node, _ in reader.next_functions], passes)
        found = dict.fromkeys(nodes[node] for node in _behind(ends, passes) if node in nodes)
        self._layers = [layer for layer in found if not any(nodes[node] is layer for node in read & nodes.keys())]
        return outputs

    @contextlib.contextmanager
    def _deferring(self, layer: nn.Module, enter: Callable[[], DeferProducts]) -> Iterator[None]:
        plain, own = layer.forward, layer.__dict__.get("forward")

        def asked() -> None:
            if layer in self._layers:
                self._layers.remove(layer)

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            with enter().products_of(asked):
                return plain(*args, **kwargs)

        layer.forward = forward
        try:
            yield
        finally:
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _behind(ends: Sequence[Any], passes: Callable[[Any], bool]) -> set[Any]:
    """Nodes of autograd: `ends`, and what is behind those for which `passes`. None among `ends` are left out."""
    seen: set[Any] = set()
    ahead = list(ends)
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if passes(node):
            ahead += [following for following, _ in node.next_functions]
    return seen
