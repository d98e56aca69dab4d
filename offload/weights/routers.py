"""Routers that are asked before their turn: which experts the next block will likely choose.

[Note: routers asked ahead]
Hidden states change little from block to block. So the router of the next block, given the input of this block's router, names
most of the experts that it will choose (Eliseev and Mazur 2023; Hwang et al. 2024, Pre-gated MoE; He et al. 2024, ExpertFlow).
Its weights are in the next block's slot, which is read ahead. They are bound for the length of the question.

No model is known by name here. Transformers' experts are given the indices of who is chosen; the module that has returned these
is the router. It is found at the first visit of its block. What else it is given, and is the block's own (a correction of
scores), is taken from the block that is asked about. Where no module returns indices, or the next block is not there yet,
nothing is guessed. Only passes that cannot be changed by it are interrupted: without gradients, and not in training mode, in
which routers draw random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.offload.residency.tiers import Tier
from finetune.offload.step.lanes import run_capturing
from finetune.offload.weights.binding import Binding
from finetune.offload.weights.experts import ExpertStack

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Router:
    """What chooses the experts of a block."""

    module: nn.Module
    own: dict[int | str, tuple[nn.Module, str]]
    """Arguments that are tensors of the block itself: position or keyword, and which module has it under which name."""
    names: frozenset[str]
    """Of streamed tensors that it computes with, local to the block."""
    most_tokens: int
    """Of a lane, for which it is asked: more would choose nearly all experts."""


class Routers:
    """The routers of a model's blocks."""

    def __init__(
        self, blocks: Sequence[nn.Module], bindings: Sequence[Binding], experts: Mapping[int, ExpertStack], trunks: Tier
    ) -> None:
        """experts: of each block that has some, one of its stacks. trunks: the slots of the blocks, without their experts."""
        self._blocks, self._bindings, self._trunks = blocks, bindings, trunks
        self._found: dict[int, _Router] = {}
        self._inputs: dict[int, Arguments] = {}
        """Of the router of a block that computes now."""
        self._hooks: dict[int, list[Any]] = {}
        self._returned: list[tuple[nn.Module, Arguments, Any]] = []
        self._is_asking = False
        for block, stack in experts.items():
            self._look_for(block, stack)

    def close(self) -> None:
        for block in list(self._hooks):
            self._remove_hooks(block)

    def take_input(self, block: int) -> Arguments | None:
        """Of the router of the block that computes now, for the lane that runs: few tokens. None: nothing may be guessed."""
        return self._inputs.pop(block, None)

    def ask(self, block: int, inputs: Arguments, following: int) -> list[list[int]]:
        """For every token of `inputs`, which the router of `block` was given, the experts of block `following`, the likeliest
        first. Empty where there is nothing to go by."""
        router = self._found.get(following)
        if router is None or type(router.module) is not type(self._found[block].module):
            return []
        with self._trunks.borrow(following) as views:
            if views is None:
                return []
            binding = self._bindings[following]
            binding.bind(views, only=router.names)
            self._is_asking = True
            try:
                return _by_score(router, inputs)
            finally:
                self._is_asking = False
                binding.unbind()

    def _look_for(self, block: int, stack: ExpertStack) -> None:
        experts, count = stack.module, stack.weight.shape[0]
        inside = {*experts.modules()}
        for module in self._blocks[block].modules():
            if module not in inside:
                self._hook(block, module.register_forward_hook, self._has_returned)

        def are_called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_open():
                self._remove_hooks(block)
                self._find(block, count, (*args, *kwargs.values()))
                self._returned.clear()

        self._hook(block, experts.register_forward_pre_hook, are_called)

    def _hook(self, block: int, register: Callable[..., Any], hook: Callable[..., None]) -> None:
        self._hooks.setdefault(block, []).append(register(hook, with_kwargs=True))

    def _remove_hooks(self, block: int) -> None:
        for handle in self._hooks.pop(block, ()):
            handle.remove()

    def _is_open(self) -> bool:
        """Whether what runs is a pass that may be interrupted."""
        return not torch.is_grad_enabled() and not self._is_asking

    def _has_returned(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._is_open() and any(map(_is_index, _tensors(output))):
            self._returned.append((module, (args, kwargs), output))

    def _find(self, block: int, experts: int, given: Iterable[Any]) -> None:
        """experts: how many the block has. given: to these."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in given if _is_index(tensor)}
        found = [
            (module, arguments, tensor)
            for module, arguments, output in self._returned
            for tensor in _tensors(output)
            if _is_index(tensor) and tensor.untyped_storage().data_ptr() in storages
        ]
        if not found:
            return
        module, (args, kwargs), chosen = found[-1]  # what wraps a router returns last
        owners = {
            id(tensor): (owner, name)
            for owner in self._blocks[block].modules()
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
            if tensor is not None
        }
        own = {key: owners[id(value)] for key, value in (*enumerate(args), *kwargs.items()) if id(value) in owners}
        homes = {(owner, name) for owner, name in own.values()}
        modules = {*module.modules()}
        names = self._bindings[block].names(lambda owner, name: owner in modules or (owner, name) in homes)
        self._found[block] = _Router(module, own, names, max(1, experts // chosen.shape[-1]))
        self._keep(block, args, kwargs)

        def is_called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_open():
                self._keep(block, args, kwargs)

        self._hook(block, module.register_forward_pre_hook, is_called)

    def _keep(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        router = self._found[block]
        states = _tensors((*args, *kwargs.values()))
        if not router.module.training and states and states[0].numel() <= router.most_tokens * states[0].shape[-1]:
            self._inputs[block] = args, kwargs


def _by_score(router: _Router, inputs: Arguments) -> list[list[int]]:
    args, kwargs = list(inputs[0]), dict(inputs[1])
    for key, (owner, name) in router.own.items():
        if isinstance(key, int):
            args[key] = getattr(owner, name)
        else:
            kwargs[key] = getattr(owner, name)
    output, _ = run_capturing(router.module, tuple(args), kwargs, ())
    indices = next(tensor for tensor in _tensors(output) if _is_index(tensor))
    scores = next((t for t in _tensors(output) if t.is_floating_point() and t.shape == indices.shape), None)
    if scores is not None:
        indices = indices.gather(-1, scores.argsort(dim=-1, descending=True, stable=True))
    return indices.reshape(-1, indices.shape[-1]).tolist()


def _tensors(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple | list) else (output,)
    return [value for value in values if isinstance(value, Tensor)]


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and value.ndim > 0
