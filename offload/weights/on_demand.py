"""Weights that are read when code asks for their numbers: for what is made of a model before anything is streamed.

Adapters are put around a model whose parameters are placeholders. Code that only asks for shapes and dtypes never notices.
Code that computes from a weight (a norm, a decomposition, a copy) gets its numbers here, read and decoded for that one
operation, and they are freed with what holds them. So one matrix at a time is in memory, whoever asks for how many of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from finetune.memory.errors import UserError
from finetune.offload.weights.formats import PlainTensor, StoredWeight
from finetune.offload.weights.parts import ModelParts
from finetune.offload.weights.skeleton import is_placeholder

_OUTLINE = frozenset({
    "shape", "device", "dtype", "layout", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf", "is_meta", "is_sparse",
    "is_quantized", "is_cpu", "is_cuda", "is_xpu", "is_mps", "itemsize", "nbytes", "output_nr", "_version", "name",
    "_backward_hooks", "retains_grad",
})  # fmt: skip
"""Properties that are known without numbers."""
_OUTLINE_METHODS = frozenset({
    "size", "dim", "numel", "nelement", "stride", "element_size", "ndimension", "is_floating_point", "is_complex", "get_device",
    "is_contiguous", "__len__", "storage_offset", "__hash__", "__repr__",
})  # fmt: skip
_SAME = frozenset({"data", "detach", "requires_grad_", "alias"})
"""What gives the same weight once more, which is still not read."""


class OnDemand(torch.Tensor):
    """A placeholder that is read by whatever computes with it."""

    numbers: Callable[[], torch.Tensor]
    """Reads it."""
    parameter_name: str
    """Fully qualified."""
    may_change: bool
    """Whether new values are let go, rather than refused."""

    @classmethod
    def of(cls, placeholder: torch.Tensor, name: str, numbers: Callable[[], torch.Tensor], may_change: bool) -> OnDemand:
        tensor = placeholder.detach().as_subclass(cls)
        tensor.numbers, tensor.parameter_name, tensor.may_change = numbers, name, may_change
        return tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, word = kwargs or {}, function.__name__
        if word in ("__get__", "__set__"):
            attribute = function.__self__.__name__
            if word == "__set__" and attribute == "data" and isinstance(args[0], cls):
                if args[0].may_change:
                    return None
                raise _changed(args[0])
            known = attribute in _OUTLINE or word == "__set__"
            word = attribute
        else:
            known = word in _OUTLINE_METHODS
        if known:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if word in _SAME:
            with torch._C.DisableTorchFunctionSubclass():
                return _like(args[0], function(*args, **kwargs))
        if word == "__deepcopy__":
            return nn.Parameter(args[0].numbers().clone(), requires_grad=args[0].requires_grad)
        if isinstance(args[0], cls) and (word.endswith("_") and not word.startswith("__") or word.startswith("__i")):
            raise _changed(args[0])
        args, kwargs = tree_map_only(cls, lambda weight: weight.numbers(), (args, kwargs))
        return function(*args, **kwargs)


def _like(weight: OnDemand, placeholder: torch.Tensor) -> OnDemand:
    other = OnDemand.of(placeholder, weight.parameter_name, weight.numbers, weight.may_change)
    return other.requires_grad_(placeholder.requires_grad)


def _changed(weight: OnDemand) -> UserError:
    return UserError(
        f"this adapter changes the base's own {weight.parameter_name} when it is made, and the base is read from its files in "
        "every step: it can't be streamed"
    )


@contextlib.contextmanager
def weights_on_demand(
    parts: ModelParts, check: Callable[[int], None] = lambda num_numbers: None, may_change: bool = False
) -> Iterator[None]:
    """Inside, the parameters of `parts.model` that are placeholders are read by code that computes with them. check: called
    with how many numbers a weight has, before it is read. may_change: whether code may set new values, which go nowhere, for
    whoever lets it knows them; else that is refused."""
    held: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for name, parameter in list(parts.model.named_parameters(remove_duplicate=False)):
        if name not in parts.sources or not is_placeholder(parameter) or type(parameter.data) is not torch.Tensor:
            continue
        home = parts.model.get_submodule(name.rpartition(".")[0])._parameters
        numbers = partial(_numbers, parts.sources[name], parameter.dtype, check)
        held.append((home, name.rpartition(".")[2], parameter))
        home[held[-1][1]] = nn.Parameter(OnDemand.of(parameter, name, numbers, may_change), requires_grad=False)
    try:
        yield
    finally:
        for home, attribute, parameter in held:
            home[attribute] = parameter


def _numbers(weight: StoredWeight, dtype: torch.dtype, check: Callable[[int], None]) -> torch.Tensor:
    check(prod(weight.shape))
    return weight.decode(weight.load(_read), dtype)


def _read(stored: PlainTensor) -> torch.Tensor:
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    for extent in stored.extents:
        with open(extent.path, "rb") as file:
            file.seek(extent.file_offset)
            if file.readinto(buffer[extent.target_offset : extent.target_offset + extent.num_bytes]) != extent.num_bytes:
                raise UserError(f"{extent.path} ends before the weights that its header names: bring it from its source again")
    return tensor
