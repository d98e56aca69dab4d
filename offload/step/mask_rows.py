"""Attention masks of long texts, of which only the rows and columns that compute are ever made.

[Note: masks in parts]
Transformers makes a mask where the model's forward asks for one, whole: B x T x T. It is made of a function of two positions,
so any part of it can be made by itself. While lanes run whose texts are cut, `MaskRows` is what the model gets in place of the
mask and hands on to its blocks, where the attention of chunks asks for the parts it needs, made by Transformers' own code. A
model that looks into its mask can't do that with this one: it is refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only


class Span(NamedTuple):
    """Positions [start, end) of a text."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


ALL, NONE, CAUSAL, SOME = "all", "none", "causal", "some"
"""What of a part is visible: everything, nothing, every position and the ones before it, or what the part itself says."""


class MaskRows:
    """Stands for a mask, bool [B, 1, T, T], True where a position is attended to."""

    def __init__(self, make: Callable[..., torch.Tensor | None], given: dict[str, Any]) -> None:
        """make: Transformers' own function, which takes what is `given`."""
        self._make = make
        self._given = given
        self._kinds: dict[tuple[Span, Span], str] = {}
        self._is_plain: bool | None = None

    def whole(self) -> torch.Tensor | None:
        """As Transformers would have made it. None: causal, and the attention knows."""
        return self._make(**self._given)

    def part(self, queries: Span, keys: Span) -> torch.Tensor:
        """bool [B, 1, queries, keys]"""
        sizes = {"q_length": queries.length, "kv_length": keys.length, "q_offset": queries.start, "kv_offset": keys.start}
        return self._make(**self._given | sizes | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    def kind(self, queries: Span, keys: Span) -> str:
        """What `queries` see of `keys`. Found once."""
        key = queries, keys
        if key not in self._kinds:
            self._kinds[key] = self._find_kind(queries, keys)
        return self._kinds[key]

    def _find_kind(self, queries: Span, keys: Span) -> str:
        window = self._given.get("local_size")
        if window is not None and keys.end <= queries.start - window:
            return NONE
        if keys.start >= queries.end and _implies_causal(self._given["mask_function"]):
            return NONE
        if self._plain:
            return causal_kind(queries, keys)
        part = self.part(queries, keys)
        if bool(part.all()):
            return ALL
        if not bool(part.any()):
            return NONE
        if queries == keys and torch.equal(part, part.new_ones(part.shape).tril_()):
            return CAUSAL
        return SOME

    @property
    def _plain(self) -> bool:
        """Whether it is causal, and nothing else."""
        if self._is_plain is None:
            padding = self._given.get("attention_mask")
            is_causal = self._given["mask_function"] is _transformers().causal_mask_function
            self._is_plain = is_causal and (padding is None or bool(padding.all()))
        return self._is_plain


def causal_kind(queries: Span, keys: Span) -> str:
    """What is visible where every position sees itself and the ones before it. Spans are equal or apart."""
    if queries == keys:
        return CAUSAL if queries.length > 1 else ALL
    return ALL if keys.end <= queries.start else NONE


def _implies_causal(function: Callable) -> bool:
    """Whether a mask function of Transformers never shows a later position. False: that is not known."""
    if function is _transformers().causal_mask_function:
        return True
    if function.__qualname__ == "and_masks.<locals>.and_mask":
        return any(map(_implies_causal, inspect.getclosurevars(function).nonlocals["mask_functions"]))
    return False


class MasksInParts:
    """Inside, masks of texts longer than `tokens` are `MaskRows`. Can be entered again and again."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def __enter__(self) -> None:
        self._plain = _transformers().ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        _transformers().ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = self._make

    def __exit__(self, *_: Any) -> None:
        _transformers().ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = self._plain

    def _make(self, **given: Any) -> MaskRows | torch.Tensor | None:
        starts_at_zero = given.get("q_offset", 0) == 0 and given.get("kv_offset", 0) == 0
        if given["q_length"] > self._tokens and given["kv_length"] == given["q_length"] and starts_at_zero:
            return MaskRows(self._plain, given)
        return self._plain(**given)


@contextlib.contextmanager
def masks_made_by(make: Callable[[Callable, dict[str, Any]], MaskRows | torch.Tensor | None]) -> Iterator[None]:
    """Inside, masks for `sdpa` are made by it: called with Transformers' own function, and what that is given."""
    functions = _transformers().ALL_MASK_ATTENTION_FUNCTIONS
    plain = functions["sdpa"]
    functions["sdpa"] = lambda **given: make(plain, given)
    try:
        yield
    finally:
        functions["sdpa"] = plain


def with_whole_masks(tree: Any) -> Any:
    """`tree` with masks as Transformers makes them."""
    return tree_map_only(MaskRows, MaskRows.whole, tree)


def _transformers() -> Any:
    from transformers import masking_utils

    return masking_utils
