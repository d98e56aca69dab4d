"""Attention of one chunk of a text to all that comes before it, for visits that are cut along the text.

[Note: attention of chunks]
A chunk's queries meet the keys and values of earlier chunks, which stay for the visit, a chunk at a time, and those of its own.
PyTorch's flash kernel gives the attention to each part and the logarithm of the sum of its exponentials. By these the parts are
added up, in fp32, to attention over all of them (Liu et al. 2023, Ring Attention, arXiv:2310.01889; Dao 2023, FlashAttention-2,
arXiv:2307.08691). The same kernel's backward, given the sum over all parts, gives the gradients of each part. Those of keys and
values of earlier chunks are added up, in fp32 or wider, until backward comes to that chunk. No scores are whole, and masks are
made a part at a time, where a part is neither all visible nor causal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from finetune.memory.errors import UserError
from finetune.offload.step.mask_rows import ALL, CAUSAL, NONE, SOME, MaskRows, Span, causal_kind

KEY = "engine.sequence_chunk"
aten = torch.ops.aten


class KeysKnown(Exception):
    """Raised in a block's attention where only its keys and values are wanted."""


class _Part(NamedTuple):
    """Keys that a chunk sees something of."""

    keys: Span
    kind: str  # what of them
    added: torch.Tensor | None = None  # where that is SOME: [B, 1, queries, keys], 0 where visible, else minus infinity
    blind: torch.Tensor | None = None  # bool [B, 1, queries]: rows that see nothing

    @classmethod
    def seen_in_part(cls, keys: Span, visible: torch.Tensor, dtype: torch.dtype) -> _Part:
        """visible: bool [B, 1, queries, keys]"""
        added = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
        return cls(keys, SOME, added, ~visible.any(-1))


class ChunkAttention:
    """The attention of one visit of a block. `installed`, it is what the block calls; `span` is the chunk that runs.

    keys, values: [B, heads, T, width]; their gradients as fp32 or wider.
    """

    def __init__(self, spans: Sequence[Span], block: str) -> None:
        """spans: all chunks of the text. block: whose attention it is, for messages."""
        self._spans = spans
        self._block = block
        self.span = spans[0]
        self.calls = 0
        """Of the attention, since this was set to 0."""
        self.only_keys = False
        """Whether the chunk ends where its keys and values are known."""
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._key_grads: torch.Tensor | None = None
        self._value_grads: torch.Tensor | None = None

    def installed(self) -> contextlib.AbstractContextManager:
        return attending_by(self._call)

    def _call(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: MaskRows | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """In place of Transformers' `sdpa_attention_forward`, and called as that is. query [B, heads, chunk, width]."""
        is_causal = options.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        self._check(query, key, attention_mask, is_causal, options)
        self.calls += 1
        self.put(key.detach(), value.detach())
        if self.only_keys:
            raise KeysKnown
        output = self.attend(query, key, value, attention_mask, options.get("scaling"))
        return output.transpose(1, 2).contiguous(), None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: MaskRows | None, scale: float | None
    ) -> torch.Tensor:
        """[B, heads, chunk, width], where key and value have been put."""
        return _Attend.apply(query, key, value, self, mask, query.shape[-1] ** -0.5 if scale is None else scale)

    def _check(
        self, query: torch.Tensor, key: torch.Tensor, mask: MaskRows | None, is_causal: bool, options: dict[str, Any]
    ) -> None:
        if query.shape[2] != self.span.length or key.shape[2] != self.span.length:
            raise refusal(self._block, "its attention is not between the tokens of one text")
        if options.get("dropout"):
            raise refusal(self._block, "it has attention dropout: set attention_dropout to 0 in the model's config.json")
        check_options(self._block, options)
        if mask is None:
            if not is_causal:
                raise refusal(self._block, "its tokens attend to later ones")
        elif not isinstance(mask, MaskRows):
            raise refusal(self._block, "it makes a mask of its own for its attention")
        elif not query.is_meta and any(mask.kind(self.span, later) != NONE for later in self._after()):
            raise refusal(self._block, "its tokens attend to later ones")

    def _after(self) -> Sequence[Span]:
        return self._spans[self._spans.index(self.span) + 1 :]

    def put(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Of the chunk that runs."""
        if self._keys is None:
            length = self._spans[-1].end
            self._keys, self._values = (x.new_empty(*x.shape[:2], length, x.shape[3]) for x in (key, value))
        for kept, new in ((self._keys, key), (self._values, value)):
            _of(kept, self.span).copy_(new)

    def parts(self, mask: MaskRows | None, like: torch.Tensor) -> Iterator[_Part]:
        """What the chunk sees. like: has the dtype of a mask's numbers."""
        if like.is_meta:
            yield from self._sizes_of_parts(mask, like)
            return
        until = self._spans.index(self.span)
        for keys in (self.span, *reversed(self._spans[:until])):
            kind = causal_kind(self.span, keys) if mask is None else mask.kind(self.span, keys)
            if kind != NONE:
                yield part_seen(self.span, keys, kind, mask, like.dtype)

    def _sizes_of_parts(self, mask: MaskRows | None, like: torch.Tensor) -> Iterator[_Part]:
        """The same on meta, where nothing is known but sizes: two parts, as many as are in memory at once."""
        sizes = like.shape[0], 1, self.span.length, self.span.length
        for kind in (CAUSAL, ALL):
            if mask is None:
                yield _Part(self.span, kind)
            else:
                yield _Part.seen_in_part(self.span, torch.empty(sizes, dtype=torch.bool, device="meta"), like.dtype)

    @property
    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the text, as far as they are known."""
        return self._keys, self._values

    def expanded(self, keys: Span, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a part, one for each of the query's heads."""
        return tuple(_expanded(_of(kept, keys), heads) for kept in (self._keys, self._values))

    def begin_gradients(self) -> None:
        """Keys and values are all there."""
        self._key_grads, self._value_grads = (
            torch.zeros(kept.shape, dtype=_sum_dtype(kept.dtype), device=kept.device) for kept in (self._keys, self._values)
        )

    def add_gradients(self, keys: Span, key: torch.Tensor, value: torch.Tensor) -> None:
        """Of a part; one for each of the query's heads."""
        for sums, new in ((self._key_grads, key), (self._value_grads, value)):
            part = _of(sums, keys)
            part += new.unflatten(1, (part.shape[1], -1)).sum(2, dtype=sums.dtype)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the chunk's own keys and values, once all that sees them has run backward."""
        sums = ((self._key_grads, self._keys), (self._value_grads, self._values))
        return tuple(_of(grads, self.span).to(kept.dtype) for grads, kept in sums)


@contextlib.contextmanager
def attending_by(function: Callable) -> Iterator[None]:
    """Inside, what Transformers' models call for their attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


def own_values(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attention of every token to itself alone."""
    return _expanded(value, query.shape[1]).transpose(1, 2).contiguous(), None


def part_seen(queries: Span, keys: Span, kind: str, mask: MaskRows | None, dtype: torch.dtype) -> _Part:
    """What `queries` see of `keys`, which is something. dtype: of a mask's numbers."""
    return _Part.seen_in_part(keys, mask.part(queries, keys), dtype) if kind == SOME else _Part(keys, kind)


def attention_to_parts(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: Iterable[_Part], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, heads, queries, width] in the query's dtype; the logarithm of the sum of exponentials, fp32 or wider.

    keys, values: [B, key heads, T, width], of which `parts` name some.
    """
    total = output = None
    for part in parts:
        key, value = (_expanded(_of(kept, part.keys), query.shape[1]) for kept in (keys, values))
        found, weight = _flash(query, key, value, part, scale)
        output, total = (found, weight) if total is None else _sum(output, total, found, weight)
    if total is None:  # padding that sees nothing
        output = query.new_zeros(*query.shape[:-1], values.shape[-1])
        total = torch.full(query.shape[:-1], float("-inf"), dtype=_sum_dtype(query.dtype), device=query.device)
    return output.to(query.dtype), total


class _Attend(torch.autograd.Function):
    """Attention of the chunk that runs, [B, heads, chunk, width]."""

    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visit: ChunkAttention, mask: MaskRows | None,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """key, value: the chunk's own, which `visit` has, too."""
        output, total = attention_to_parts(query, *visit.kept, visit.parts(mask, query), scale)
        ctx.save_for_backward(query, output, total)
        ctx.visit, ctx.mask, ctx.scale = visit, mask, scale
        return output

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        query, output, total = ctx.saved_tensors
        sums = output, total.masked_fill(total.isneginf(), 0.0)
        visit, query_grad = ctx.visit, torch.zeros_like(query, dtype=_sum_dtype(query.dtype))
        for part in visit.parts(ctx.mask, query):
            given = query, *visit.expanded(part.keys, query.shape[1])
            query_part, key_part, value_part = _flash_backward(grad, given, sums, part, ctx.scale)
            query_grad += query_part
            visit.add_gradients(part.keys, key_part, value_part)
        return query_grad.to(query.dtype), *visit.gradients(), None, None, None


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: _Part, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, heads, queries, width of values]; the logarithm of the sum of exponentials, fp32 [B, heads, queries]."""
    width = max(query.shape[-1], value.shape[-1])
    given = [_padded(x, width) for x in (query, key, value)]
    output, total = aten._scaled_dot_product_flash_attention_for_cpu(
        *given, 0.0, part.kind == CAUSAL, attn_mask=part.added, scale=scale
    )
    if part.blind is not None:  # of these the kernel says 0, and that the sum is 1
        total = total.masked_fill(part.blind, float("-inf"))
    return output[..., : value.shape[-1]], total


def _flash_backward(
    grad: torch.Tensor, given: tuple[torch.Tensor, ...], sums: tuple[torch.Tensor, torch.Tensor], part: _Part, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `given`: query, key and value. sums: output and logarithm of the sum of exponentials, over all parts."""
    output, total = sums
    widths = [x.shape[-1] for x in given]
    grad, output, *padded = (_padded(x, max(widths)) for x in (grad, output, *given))
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *padded, output, total, 0.0, part.kind == CAUSAL, attn_mask=part.added, scale=scale
    )
    return tuple(x[..., :width] for x, width in zip(found, widths, strict=True))


def _sum(
    output: torch.Tensor, total: torch.Tensor, found: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two parts. Either may have rows that see nothing: their total is minus infinity."""
    both = torch.logaddexp(total, weight)
    first, second = ((x - both).exp_().masked_fill_(x.isneginf(), 0.0)[..., None] for x in (total, weight))
    return (output * first).addcmul_(found.to(first.dtype), second), both


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _padded(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """With zeros, which change no product."""
    return tensor if tensor.shape[-1] == width else functional.pad(tensor, (0, width - tensor.shape[-1]))


def _of(kept: torch.Tensor, span: Span) -> torch.Tensor:
    return kept[:, :, span.start : span.end]


def _expanded(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    batch, groups, length, width = tensor.shape
    if groups == heads:
        return tensor
    return tensor[:, :, None].expand(batch, groups, heads // groups, length, width).reshape(batch, heads, length, width)


def check_sdpa(model: nn.Module) -> None:
    """Raises UserError for a model of another attention: parts of its keys have no sums that are known."""
    attention = model.config.get_text_config()._attn_implementation
    if attention != "sdpa":
        raise refusal(type(model).__name__, f"its attention is {attention}, and only Transformers' sdpa is known to go")


def check_options(block: str, options: dict[str, Any]) -> None:
    """Raises UserError for what attention is asked for and has no sums over parts of the keys."""
    for name in ("softcap", "position_bias"):
        if options.get(name) is not None:
            raise refusal(block, f"its attention has a {name}")


def refusal(block: str, why: str) -> UserError:
    return UserError(f"{KEY}: {block} can't be run in chunks of a text, because {why}: leave {KEY} out")
