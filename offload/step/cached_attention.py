"""Attention of a few tokens to a long key-value cache, a part of the keys at a time.

A prompt that goes through the model in pieces meets a cache that grows. Transformers' own attention would repeat all keys and
values for every head, and have a mask of the piece by the whole text. Here neither is ever whole: parts are added up as in
[Note: attention of chunks] in `offload/step/chunked_attention.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from finetune.offload.step.chunked_attention import attending_by, attention_to_parts, check_options, part_seen
from finetune.offload.step.mask_rows import NONE, MaskRows, Span, causal_kind, masks_made_by, with_whole_masks


@contextlib.contextmanager
def attention_in_parts(tokens: int) -> Iterator[None]:
    """Inside, attention to caches of more than `tokens` keys goes over so many of them at a time."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        count, length = query.shape[2], key.shape[2]
        is_known = isinstance(mask, MaskRows) or mask is None and count == 1
        if length > tokens:
            check_options(type(module).__name__, options)
        if length <= tokens or not is_known or options.get("dropout"):
            return plain(module, query, key, value, with_whole_masks(mask), **options)
        queries, parts = Span(length - count, length), []
        starts = range(0, queries.start, tokens)
        for keys in (queries, *(Span(start, min(start + tokens, queries.start)) for start in reversed(starts))):
            kind = causal_kind(queries, keys) if mask is None else mask.kind(queries, keys)
            if kind != NONE:
                parts.append((keys, kind))
        scale = options.get("scaling")
        seen = (part_seen(queries, keys, kind, mask, query.dtype) for keys, kind in parts)
        output, _ = attention_to_parts(query, key, value, seen, query.shape[-1] ** -0.5 if scale is None else scale)
        return output.transpose(1, 2).contiguous(), None

    with attending_by(attend), masks_made_by(lambda make, given: _rows_behind_cache(make, given, tokens)):
        yield


@contextlib.contextmanager
def refusing_what_has_no_parts() -> Iterator[None]:
    """Inside, attention is whole, and one that `attention_in_parts` does not go with is refused (UserError)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: nn.Module, *given: Any, **options: Any) -> tuple[torch.Tensor, None]:
        check_options(type(module).__name__, options)
        return plain(module, *given, **options)

    with attending_by(attend):
        yield


def _rows_behind_cache(make: Any, given: dict[str, Any], tokens: int) -> MaskRows | torch.Tensor | None:
    """Of the last tokens of a text whose keys are all there."""
    count, length = given["q_length"], given["kv_length"]
    all_there = int(given.get("kv_offset", 0)) == 0 and int(given.get("q_offset", 0)) + count == length
    return MaskRows(make, given) if count > 1 and length > tokens and all_there else make(**given)
