"""Visits of long texts in chunks of tokens: what a block computes is in memory for one chunk at a time.

[Note: chunks of a text]
Everything in a decoder's block but its attention treats every token by itself. So the block's own code runs on one chunk of
tokens after the other, and only attention looks further (Luo et al. 2025, StreamBP, arXiv:2506.03077): it meets the keys
and values of earlier chunks, which stay for the visit ([Note: attention of chunks] in `offload/step/chunked_attention.py`).
Backward first finds the keys and values of all chunks, for which a chunk need not run further than to its attention. Then
it takes the chunks from the last to the first: recomputes one with a graph and runs that backward. All gradients that a
chunk's keys and values get come from itself and later chunks, so they are complete then. Gradients of parameters add up
over the chunks.

A block that mixes tokens otherwise (convolutions, recurrences) or numbers them itself would give other numbers without a
word. So at the first visit of each kind of block, its attention is replaced by one of every token to itself. Some of the
tokens are replaced by others: queries, keys, values and output of the rest may not change by a bit. And some are left out
from the beginning: those of the rest may not change but for rounding.

Dropout draws other numbers than in a whole visit: each chunk begins with a seed of its own.

What is as long as a text and comes out of a visit, its output and the gradients of its arguments, can lie in a file
([Note: tensors in a file] in `memory/tensor_file.py`). It is written, and read, a chunk after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from finetune.memory.tensor_file import fetch_soon, in_file, let_go
from finetune.offload.step.chunked_attention import ChunkAttention, KeysKnown, attending_by, own_values, refusal
from finetune.offload.step.mask_rows import MasksInParts, Span
from finetune.offload.step.random_state import get_random_state, set_random_state

TRIED_TOKENS = 16  # by which it is found out whether a block treats every token by itself
APART_ERROR = 0.03  # of the norm, in 16 bits: products of fewer tokens round otherwise; other positions change half of it
APART_ERROR_32 = 1e-4  # in 32 bits and more

META_CHUNKS = 2  # that run on meta: the second one when there is room for the first one's results

Forward = Callable[[tuple, dict[str, Any]], Any]
"""A block: forward(args, kwargs)."""


class SequenceChunks:
    """How visits of texts longer than `tokens` are cut."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.masks = MasksInParts(tokens)
        """In which the model's own code runs."""
        self._tried: set[type] = set()

    def cuts(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call of a block is cut. Passes that fill a key-value cache are not."""
        hidden = _hidden(args, kwargs)
        keeps = any(hasattr(leaf, "get_seq_length") for leaf in tree_leaves((args, kwargs)))
        return hidden is not None and hidden.ndim == 3 and hidden.shape[1] > self.tokens and not keeps

    def forward(self, block: nn.Module, forward: Forward, args: tuple, kwargs: dict[str, Any], kept: bool = False) -> Any:
        """The block's output, without a graph. kept: whether it will be wanted again, by backward."""
        visit = _Visit(block, forward, args, kwargs, self.tokens)
        with torch.no_grad(), visit.running():
            if type(block) not in self._tried and not visit.hidden.is_meta:
                with _without_dropout(block):
                    visit.try_tokens_apart()
                self._tried.add(type(block))
            for index in visit.indices:
                visit.write_output(index, visit.run(index), kept)
        return visit.output()

    def backward(
        self,
        block: nn.Module,
        forward: Forward,
        inputs: tuple[tuple, dict[str, Any]],
        grads: dict[int, torch.Tensor],
        recompute: Callable[[Callable[[], list[Any]]], list[Any]] = lambda run: run(),
    ) -> None:
        """Leaves the gradients of `inputs`, arguments of the block that want some, in `.grad`.

        grads: of outputs, flattened, by number. recompute: calls what it is given, with a graph.
        """
        visit, sums = _Visit(block, forward, *inputs, self.tokens), WideSums(block)
        with visit.running():
            visit.begin_backward()
            for index in reversed(visit.indices):
                visit.run_backward(index, grads, recompute)
                sums.take()
        sums.give_back()


class _Visit:
    """One call of a block, chunk by chunk."""

    def __init__(self, block: nn.Module, forward: Forward, args: tuple, kwargs: dict[str, Any], tokens: int) -> None:
        self._name, self._forward = type(block).__name__, forward
        self.hidden = _hidden(args, kwargs)
        self._length = self.hidden.shape[1]
        self._flat, self._spec = tree_flatten((args, kwargs))
        self._dims = [self._dim(value, self._length) for value in self._flat]
        self._spans = [Span(start, min(start + tokens, self._length)) for start in range(0, self._length, tokens)]
        self.attention = ChunkAttention(self._spans, self._name)
        self._outputs: list[Any] = []
        self._output_spec: TreeSpec | None = None
        self._seed = int(torch.randint(2**62, ()))

    @property
    def indices(self) -> Sequence[int]:
        """Of the chunks. On meta, where only sizes count, all are like the first ones."""
        return range(len(self._spans))[: META_CHUNKS if self.hidden.is_meta else None]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around all chunks."""
        state = get_random_state()
        with self.attention.installed():
            try:
                yield
            except (AttributeError, TypeError) as error:
                raise refusal(self._name, f"its code does not run so: {error}") from error
        set_random_state(state)

    def run(self, index: int) -> list[Any]:
        """Outputs of a chunk, flattened."""
        return self._run(self._sliced(index), index)

    def _run(self, flat: list[Any], index: int) -> list[Any]:
        self._begin(index)
        args, kwargs = tree_unflatten(flat, self._spec)
        output, self._output_spec = tree_flatten(self._forward(args, kwargs))
        if self.attention.calls != 1:
            times = self.attention.calls
            raise refusal(self._name, f"it calls the sdpa attention of Transformers {times} times, where it should once")
        return output

    def _begin(self, index: int) -> None:
        torch.manual_seed(self._seed + index)
        self.attention.span, self.attention.calls = self._spans[index], 0

    def _sliced(self, index: int) -> list[Any]:
        return [self._part(value, dim, index) for value, dim in zip(self._flat, self._dims, strict=True)]

    def _part(self, value: Any, dim: int | None, index: int) -> Any:
        span = self._spans[index]
        return value if dim is None else value.narrow(dim, span.start, span.length)

    def write_output(self, index: int, output: list[Any], kept: bool) -> None:
        if not self._outputs:
            with in_file():
                self._outputs = [self._room(value, index) for value in output]
        for room, value in zip(self._outputs, output, strict=True):
            if isinstance(value, torch.Tensor):
                part = self._part(room, self._output_dim(room, self._length), index)
                part.copy_(value)
                if kept:
                    let_go(part)

    def output(self) -> Any:
        return tree_unflatten(self._outputs, self._output_spec)

    def _room(self, value: Any, index: int) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dim = self._output_dim(value, self._spans[index].length)
        return value.new_empty([*value.shape[:dim], self._length, *value.shape[dim + 1 :]])

    def begin_backward(self) -> None:
        """Makes room for gradients, and finds keys and values of all chunks."""
        for value, dim in zip(self._flat, self._dims, strict=True):
            if dim is not None and value.requires_grad:
                with in_file():
                    value.grad = torch.empty_like(value)
        self.attention.only_keys = True
        with torch.no_grad():
            for index in self.indices:
                with contextlib.suppress(KeysKnown):
                    self._run(self._sliced(index), index)
        self.attention.only_keys = False
        self.attention.begin_gradients()

    def run_backward(
        self, index: int, grads: dict[int, torch.Tensor], recompute: Callable[[Callable[[], list[Any]]], list[Any]]
    ) -> None:
        leaves = self._sliced(index)
        if index:  # backward goes against the order in which files are read ahead
            for value in (*self._sliced(index - 1), *(self._given(grad, index - 1) for grad in grads.values())):
                if isinstance(value, torch.Tensor):
                    fetch_soon(value)
        for place, (value, dim) in enumerate(zip(self._flat, self._dims, strict=True)):
            if dim is not None and value.requires_grad:
                leaves[place] = leaves[place].detach().requires_grad_()
        with torch.enable_grad():
            flat = recompute(lambda: self._run(leaves, index))
        wanted = [i for i in grads if isinstance(flat[i], torch.Tensor) and flat[i].requires_grad]
        edges = [get_gradient_edge(flat[i]) for i in wanted]
        given = [self._given(grads[i], index) for i in wanted]
        del flat
        if edges:
            torch.autograd.backward(edges, given)
        for value, dim, leaf in zip(self._flat, self._dims, leaves, strict=True):
            if dim is not None and value.requires_grad:
                part = self._part(value.grad, dim, index)
                part.zero_() if leaf.grad is None else part.copy_(leaf.grad)

    def _given(self, grad: torch.Tensor, index: int) -> torch.Tensor:
        """A chunk of the gradient of an output."""
        return self._part(grad, self._output_dim(grad, self._length), index)

    def _dim(self, value: Any, length: int) -> int | None:
        """Along which an argument is cut; None: it is the same for all tokens."""
        if not isinstance(value, torch.Tensor) or length not in value.shape:
            return None
        if value.ndim > 1 and value.shape[1] == length:
            return 1
        if value.ndim == 1:
            return 0
        raise refusal(self._name, f"it is given a tensor of shape {list(value.shape)}")

    def _output_dim(self, value: torch.Tensor, length: int) -> int:
        if value.ndim > 1 and value.shape[1] == length:
            return 1
        if self.hidden.shape[0] == 1 and value.shape[:1] == (length,):
            return 0
        raise refusal(self._name, f"of {length} tokens, it gives a tensor of shape {list(value.shape)}")

    def try_tokens_apart(self) -> None:
        """Raises UserError for a block that does not treat every token by itself. See [Note: chunks of a text]."""
        length = min(TRIED_TOKENS, self._length)
        middle = length // 2
        plain = self._of_tokens(slice(0, length))
        place = next(i for i, value in enumerate(plain) if isinstance(value, torch.Tensor))
        found = self._seen(plain)
        for changed, others in ((slice(0, middle), slice(middle, None)), (slice(middle, None), slice(0, middle))):
            flat = list(plain)
            flat[place] = plain[place].clone()
            flat[place][:, changed] = plain[place].flip(-1)[:, changed]
            if not all(torch.equal(a[:, others], b[:, others]) for a, b in zip(found, self._seen(flat), strict=True)):
                raise refusal(self._name, "it mixes tokens outside of its attention")
        alone = self._seen(self._of_tokens(slice(middle, length)))
        error = APART_ERROR if self.hidden.dtype.itemsize < 4 else APART_ERROR_32
        if any((a[:, middle:] - b).norm() > error * b.norm() for a, b in zip(found, alone, strict=True)):
            raise refusal(self._name, "what it computes of a token depends on how many stand before it in a chunk")

    def _of_tokens(self, span: slice) -> list[Any]:
        """Arguments for these tokens alone, flattened."""
        pairs = zip(self._flat, self._dims, strict=True)
        return [value if dim is None else value[(slice(None),) * dim + (span,)] for value, dim in pairs]

    def _seen(self, flat: list[Any]) -> list[torch.Tensor]:
        """Query, key, value and output, where tokens attend to themselves alone: fp32 or wider [B, tokens, ...]."""
        seen: list[torch.Tensor] = []

        def attend(module: nn.Module, *given: Any, **options: Any) -> tuple[torch.Tensor, None]:
            seen.extend(x.transpose(1, 2) for x in given[:3])
            return own_values(module, *given, **options)

        args, kwargs = tree_unflatten(flat, self._spec)
        with attending_by(attend):
            output = self._forward(args, kwargs)
        seen.append(next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)))
        return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in seen]


class WideSums:
    """Gradients of a module's parameters in 16 bits, summed in fp32 over the chunks of a visit: each sum would round,
    and there are many chunks."""

    def __init__(self, block: nn.Module) -> None:
        self._parameters = [p for p in block.parameters() if p.requires_grad and p.dtype.itemsize < 4]
        self._before = [p.grad for p in self._parameters]
        self._sums: list[torch.Tensor | None] = [None] * len(self._parameters)
        for parameter in self._parameters:
            parameter.grad = None

    def take(self) -> None:
        """Of the chunk whose backward has run."""
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                grad, parameter.grad = parameter.grad, None
                self._sums[i] = grad.float() if self._sums[i] is None else self._sums[i].add_(grad)

    def give_back(self) -> None:
        """To `.grad`, with what was there before."""
        for i, (parameter, before) in enumerate(zip(self._parameters, self._before, strict=True)):
            total, self._sums[i] = self._sums[i], None
            if total is not None:
                total = total.to(parameter.dtype)
                parameter.grad = total if before is None else before.add_(total)
            else:
                parameter.grad = before


@contextlib.contextmanager
def _without_dropout(block: nn.Module) -> Iterator[None]:
    # DoRA's layers would keep matrices of the weight's size.
    modules = [module for module in block.modules() if module.training and not hasattr(module, "_cache_clear")]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """[B, T, width]: a block's first argument."""
    return next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), None)
