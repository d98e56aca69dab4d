"""Modules outside of blocks that treat every token by itself, such as the norm before the head, in chunks of a text.

A norm in 16 bits converts a whole text to fp32 and keeps that for backward: many times the text's hidden states. In chunks it
keeps its input alone, and backward runs each chunk again (tiled computation: Bekman et al. 2025, ALST, arXiv:2506.13996).
A module that turns out to mix tokens runs whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from finetune.memory.tensor_file import in_file
from finetune.offload.step.random_state import get_random_state, set_random_state
from finetune.offload.step.sequence_chunks import WideSums

TRIED_TOKENS = 16  # by which it is found out whether a module treats every token by itself

Forward = Callable[[torch.Tensor], torch.Tensor]


class TiledModules:
    """Takes over the forwards of modules, until `close`."""

    def __init__(self, modules: Iterable[nn.Module], tokens: int) -> None:
        """tokens: of a chunk. Of `modules`, those without parts of their own are taken."""
        self._tokens = tokens
        self._apart: dict[nn.Module, bool] = {}
        """Whether a module treats every token by itself."""
        self._taken = [module for module in modules if not list(module.children()) and "forward" not in vars(module)]
        for module in self._taken:
            module.forward = partial(self._forward, module, module.forward)

    def close(self) -> None:
        """Gives the modules their own forwards back."""
        for module in self._taken:
            vars(module).pop("forward", None)

    def _forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(value, torch.Tensor) or value.ndim != 3 or not value.is_floating_point():
            return forward(*args, **kwargs)
        trains_alone = torch.is_grad_enabled() and not value.requires_grad and any(p.requires_grad for p in module.parameters())
        if value.shape[1] <= self._tokens or value.is_meta or trains_alone:
            return forward(value)
        if module not in self._apart:
            self._apart[module] = _treats_tokens_apart(forward, value)
        return _InChunks.apply(value, module, forward, self._tokens) if self._apart[module] else forward(value)


def _treats_tokens_apart(forward: Forward, value: torch.Tensor) -> bool:
    state = get_random_state()
    with torch.no_grad():
        plain = value[:, :TRIED_TOKENS].clone()
        middle = plain.shape[1] // 2
        found = [forward(plain.clone())]
        for changed in (slice(0, middle), slice(middle, None)):
            other = plain.clone()
            other[:, changed] = plain.flip(-1)[:, changed]
            found.append(forward(other))
        alone = forward(plain[:, middle:].clone())
    set_random_state(state)
    if not isinstance(found[0], torch.Tensor) or found[0].shape[:2] != plain.shape[:2]:
        return False
    unchanged, first_changed, last_changed = found
    rest = unchanged[:, middle:]
    return rest.equal(first_changed[:, middle:]) and unchanged[:, :middle].equal(last_changed[:, :middle]) and rest.equal(alone)


class _InChunks(torch.autograd.Function):
    """forward(value) [B, T, any], of which only `value` [B, T, width] is kept. Gradients of parameters are added to `.grad`."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, module: nn.Module, forward: Forward, tokens: int) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.module, ctx.forward, ctx.tokens = module, forward, tokens
        output = None
        for start in range(0, value.shape[1], tokens):
            with in_file(False):
                found = forward(value[:, start : start + tokens])
            if output is None:
                output = found.new_empty(*value.shape[:2], *found.shape[2:])
            output[:, start : start + tokens] = found
        return output

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (value,) = ctx.saved_tensors
        value_grad, sums = torch.empty_like(value), WideSums(ctx.module)
        for start in range(0, value.shape[1], ctx.tokens):
            span = slice(start, start + ctx.tokens)
            with in_file(False):
                with torch.enable_grad():
                    part = value[:, span].detach().requires_grad_()
                    found = ctx.forward(part)
                torch.autograd.backward(found, grad[:, span])
            value_grad[:, span] = part.grad
            sums.take()
        sums.give_back()
        return value_grad, None, None, None
