"""Gradients of parameters that several blocks share: a bank of vectors that all adapters are made of.

[Note: shared parameters] In a loop over a model in memory, such a parameter gets one gradient a micro-batch: the sum over all
its uses, in the order in which backward reaches them, from the last block to the first. Then micro-batches are added. Here
backward visits a block for all micro-batches before the next block, which would add the same numbers in another order, and so
round otherwise. So while a step runs, every use of a shared parameter is a node of its own in the graph, whose gradient is
added to a sum that is kept for each micro-batch. When the step ends, the sums are added in the order of micro-batches.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_OUTLINE = frozenset({"shape", "device", "dtype", "ndim", "requires_grad", "is_meta", "layout", "is_cuda", "is_cpu", "grad"})
_OUTLINE_METHODS = frozenset(
    {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous", "__len__", "requires_grad_"}
)
_MAYBE_SAME = frozenset({"to", "contiguous", "float", "type", "cpu", "cuda"})
"""What gives a tensor itself where there is nothing to do."""


def shared_parameters(blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trained parameters that more than one of `blocks` has."""
    counts = Counter(parameter for block in blocks for parameter in block.parameters() if parameter.requires_grad)
    return [parameter for parameter, count in counts.items() if count > 1]


class SharedGradients:
    """Of `shared_parameters`."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.parameters = shared_parameters(blocks)
        self.lane = 0
        """Whose backward runs."""
        self._sums: dict[tuple[int, int], Tensor] = {}
        """(number of the parameter, lane) -> the sum so far."""
        self._token = torch.empty(0, requires_grad=True)
        numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        homes = {id(module): module for block in blocks for module in block.modules()}.values()
        self._places = [
            (module._parameters, name, parameter, _Shared.of(parameter, self, numbers[id(parameter)]))
            for module in homes
            for name, parameter in module._parameters.items()
            if id(parameter) in numbers
        ]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Inside runs one step; afterwards its gradients are in `.grad`."""
        for home, name, _, shared in self._places:
            home[name] = shared
        try:
            yield
        finally:
            for home, name, parameter, _ in self._places:
                home[name] = parameter
        for number, lane in sorted(self._sums):
            parameter, total = self.parameters[number], self._sums[number, lane]
            parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)
        self._sums.clear()

    def used(self, number: int) -> Tensor:
        """The parameter, for one use of it."""
        parameter = self.parameters[number]
        return _Use.apply(self._token, parameter.detach(), self, number) if torch.is_grad_enabled() else parameter.detach()

    def add(self, number: int, gradient: Tensor) -> None:
        key = number, self.lane
        self._sums[key] = self._sums[key] + gradient if key in self._sums else gradient


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, values: Tensor, shared: SharedGradients, number: int) -> Tensor:
        ctx.shared, ctx.number = shared, number
        return values.new_empty(0).set_(values.untyped_storage(), values.storage_offset(), values.shape, values.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.shared.add(ctx.number, gradient)
        return None, None, None, None


class _Shared(Tensor):
    """In the place of a shared parameter while a step runs."""

    @classmethod
    def of(cls, parameter: nn.Parameter, shared: SharedGradients, number: int) -> _Shared:
        tensor = parameter.detach().as_subclass(cls)
        tensor._of, tensor._number = shared, number
        return tensor.requires_grad_()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, word = kwargs or {}, function.__name__
        if word == "__get__":
            word = function.__self__.__name__
        with torch._C.DisableTorchFunctionSubclass():
            if word in _OUTLINE or word in _OUTLINE_METHODS:
                return function(*args, **kwargs)
            if word in _MAYBE_SAME and isinstance(args[0], cls) and function(*args, **kwargs) is args[0]:
                return args[0]
        args, kwargs = tree_map_only(cls, lambda tensor: tensor._of.used(tensor._number), (args, kwargs))
        return function(*args, **kwargs)
