"""The language-model head and its loss, over tiles: logits are never whole.

[Note: loss tiles]
The model's forward runs with its head deferred: it returns the final hidden states and the elementwise operations that
it applies to logits afterwards (scaling, soft-capping). The loss then runs in tiles of `tile_tokens` rows. When all rows of a
micro-batch fit one tile they are all computed, as a plain loop does; otherwise only rows that have a label are.

A head of at most `tile_vocab` rows (of the vocabulary) is one chunk: each tile is plain PyTorch, logits -> fp32 cross
entropy -> backward, bit for bit. A larger head is streamed in chunks of `tile_vocab` rows, once per step, with the maximum
and the sum of exponentials carried along (online softmax, Milakov & Gimelshein 2018, as FlashAttention does for attention): for
each row, with x = f(z), z = W h, label y,
    m, s       running maximum and sum of exp(x - m)
    a          running sum of exp(x - m) f'(z) W      (rescaled with s when m grows)
    dL/dh      = (a / s - f'(z_y) W_y) / num_items
Where the head itself is trained its chunks are visited once more, with m and s known:
    dL/dW      = sum over rows of (exp(x - m) / s - onehot(y)) f'(z) h^T / num_items      (added up in fp32)
Tile sizes follow from the model alone (`default_tiles`), never from a budget, so placement does not change results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from offload.random_state import RandomState, get_random_state, set_random_state

IGNORE_INDEX = -100
LOGITS_TILE_BYTES = 8 * 2**20  # fp32 logits of one tile
TRAINED_TILE_BYTES = 32 * 2**20  # where the head is trained: every tile adds to a gradient of the head's size
HEAD_CHUNK_BYTES = 32 * 2**20  # one chunk of the head, in the dtype that computes


def default_tiles(vocab_size: int, row_bytes: int, trained: bool = False) -> tuple[int, int]:
    """(tile_tokens, tile_vocab) for a head of `vocab_size` rows of `row_bytes` bytes each, in the dtype that computes."""
    tile_vocab = vocab_size
    if vocab_size * row_bytes > HEAD_CHUNK_BYTES:
        chunks = -(-vocab_size * row_bytes // HEAD_CHUNK_BYTES)
        tile_vocab = -(-vocab_size // chunks)
    tile_tokens = max(16, (TRAINED_TILE_BYTES if trained else LOGITS_TILE_BYTES) // (4 * tile_vocab) // 16 * 16)
    return tile_tokens, tile_vocab


class DeferredLogits:
    """Stands for `head(hidden)` in the model's forward; remembers the random state there (an adapter of the head may have
    dropout) and the elementwise operations applied to it."""

    def __init__(
        self, hidden: torch.Tensor, operations: tuple[Callable, ...] = (), random_state: RandomState | None = None
    ) -> None:
        self.hidden = hidden
        self.operations = operations
        self.random_state = get_random_state() if random_state is None else random_state

    def then(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> DeferredLogits:
        return DeferredLogits(self.hidden, (*self.operations, operation), self.random_state)

    def __mul__(self, other):
        return self.then(lambda x: x * other)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self.then(lambda x: x / other)

    def __add__(self, other):
        return self.then(lambda x: x + other)

    __radd__ = __add__

    def __sub__(self, other):
        return self.then(lambda x: x - other)

    def float(self):
        return self.then(lambda x: x.float())

    def to(self, *args, **kwargs):
        return self.then(lambda x: x.to(*args, **kwargs))

    def contiguous(self):
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _ELEMENTWISE:
            raise NotImplementedError(
                f"the model applies {getattr(function, '__name__', function)} to its logits; a tiled loss knows only "
                "elementwise operations there"
            )
        deferred = next(a for a in args if isinstance(a, DeferredLogits))
        return deferred.then(lambda x: function(*(x if a is deferred else a for a in args), **kwargs))


_ELEMENTWISE = {torch.tanh, torch.mul, torch.div, torch.true_divide, torch.add, torch.sub, torch.clamp}


@dataclass(slots=True)
class HeadChunk:
    """Rows [start, start + weight.shape[0]) of the head, while acquired, in the dtype that computes.

    weight: [rows, hidden]; bias: [rows] or None. A head of one chunk is bound to its module.
    """

    start: int
    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, hidden] to [n, rows]."""
        return functional.linear(hidden, self.weight, self.bias)


class TokenScores(NamedTuple):
    """Of every position, [B, T]; 0 and False where the (shifted) label is -100.

    losses: fp32, the cross entropy of the label. likeliest: bool, whether no token is likelier than it.
    """

    losses: torch.Tensor
    likeliest: torch.Tensor


class TiledHead:
    """Loss, scores of tokens and logits of a deferred head.

    module: the head (nn.Linear, or PEFT's wrapper of one). chunks: gives the head's chunks: between `acquire(i)` and
    `release(i)`, `enter(variant)` returns chunk i of that variant of the weights, bound to the module itself when there is
    only one chunk. `chunks.trained` says whether the head's own gradients are wanted: `add_gradients(i, ...)` takes those of
    chunk i, while it is acquired; those of a head of one chunk are left in `.grad`.
    """

    def __init__(self, module: nn.Module, chunks: Any, num_chunks: int, tile_tokens: int) -> None:
        self._forward = module.forward
        self._chunks = chunks
        self._num_chunks = num_chunks
        self._tile_tokens = tile_tokens
        module.forward = DeferredLogits

    def loss_and_backward(
        self, logits: Sequence[DeferredLogits], labels: Sequence[torch.Tensor], num_items: int
    ) -> torch.Tensor:
        """Sum over all lanes of the token cross entropies, divided by `num_items`; fp32 [].

        labels: int64 [B, T] per lane, as the model's own loss takes them (shifted here, -100 is ignored). Backward runs
        through the head and through what the model computed between its last block and the head.
        """
        rows = [_Rows(lane, y, self._tile_tokens) for lane, y in zip(logits, labels, strict=True)]
        if self._num_chunks == 1:
            self._chunks.acquire(0)
            self._chunks.enter(0)
            for lane in rows:
                lane.plain_loss(self._forward, num_items)
            self._chunks.release(0)
        else:
            for index in range(self._num_chunks):
                self._chunks.acquire(index)
                chunk = self._chunks.enter(0)
                for lane in rows:
                    lane.add_chunk(chunk)
                self._chunks.release(index)
            for lane in rows:
                lane.finish_chunks(num_items)
            if self._chunks.trained:
                self._train_chunks(rows, num_items)
        total = torch.zeros((), dtype=torch.float32)
        for lane in rows:
            total = total + lane.loss.to("cpu")
            lane.backward()
        return total

    def _train_chunks(self, rows: Sequence[_Rows], num_items: int) -> None:
        for index in reversed(range(self._num_chunks)):  # the last one is still near
            self._chunks.acquire(index)
            chunk = self._chunks.enter(0)
            weight = torch.zeros(chunk.weight.shape, device=chunk.weight.device)
            bias = None if chunk.bias is None else torch.zeros(chunk.bias.shape, device=chunk.bias.device)
            for lane in rows:
                lane.add_weight_gradient(chunk, num_items, weight, bias)
            self._chunks.add_gradients(index, weight, bias)
            self._chunks.release(index)

    def losses(
        self, logits: Sequence[DeferredLogits], labels: Sequence[torch.Tensor], num_items: int, variants: int
    ) -> torch.Tensor:
        """What `loss_and_backward` returns, for every variant of the weights, without gradients; fp32 [variants].

        logits: of all lanes of variant 0, of variant 1, ... labels: per lane of one variant.
        """
        with torch.no_grad():
            rows = [
                _Rows(lane, labels[i % len(labels)], self._tile_tokens, backward=False) for i, lane in enumerate(logits)
            ]
            by_variant = [rows[i * len(labels) : (i + 1) * len(labels)] for i in range(variants)]
            for index in range(self._num_chunks):
                self._chunks.acquire(index)
                for variant, lanes in enumerate(by_variant):
                    chunk = self._chunks.enter(variant)
                    for lane in lanes:
                        if self._num_chunks == 1:
                            lane.plain_loss(self._forward, num_items)
                        else:
                            lane.add_chunk(chunk)
                self._chunks.release(index)
            totals = []
            for lanes in by_variant:
                total = torch.zeros((), dtype=torch.float32)
                for lane in lanes:
                    if self._num_chunks > 1:
                        lane.finish_loss(num_items)
                    total = total + lane.loss.to("cpu")
                totals.append(total)
        return torch.stack(totals)

    def token_scores(
        self, logits: Sequence[DeferredLogits], labels: Sequence[torch.Tensor], variants: Sequence[int] = ()
    ) -> list[TokenScores]:
        """What each lane's model says of every label. No gradients.

        labels: as in `losses`, per lane. variants: which version of the weights each lane met, ascending; empty: all the
        only one.
        """
        with torch.no_grad():
            rows = [_Rows(lane, y, self._tile_tokens, backward=False) for lane, y in zip(logits, labels, strict=True)]
            for i, chunk in self._every_chunk(len(rows), variants):
                rows[i].add_chunk(chunk, self._forward if self._num_chunks == 1 else None)
            return [lane.token_scores() for lane in rows]

    def last_logits(self, logits: Sequence[DeferredLogits], variants: Sequence[int] = ()) -> list[torch.Tensor]:
        """Logits of the last position of every row, fp32 [B, V] per lane. variants: as in `token_scores`."""
        parts: list[list[torch.Tensor]] = [[] for _ in logits]
        with torch.no_grad():
            for i, chunk in self._every_chunk(len(logits), variants):
                hidden = logits[i].hidden[:, -1]
                part = self._forward(hidden) if self._num_chunks == 1 else chunk.logits(hidden)
                parts[i].append(_apply(logits[i].operations, part).float())
        return [torch.cat(part, dim=-1) for part in parts]

    def _every_chunk(self, lanes: int, variants: Sequence[int]) -> Iterator[tuple[int, HeadChunk]]:
        """(lane, chunk) for every chunk and lane, each with its version of the weights; chunks are fetched once."""
        for index in range(self._num_chunks):
            self._chunks.acquire(index)
            for i in range(lanes):
                yield i, self._chunks.enter(variants[i] if variants else 0)
            self._chunks.release(index)


def _apply(operations: Sequence[Callable], x: torch.Tensor) -> torch.Tensor:
    for operation in operations:
        x = operation(x)
    return x


class _Rows:
    """The rows of one lane that the loss needs, their tiles, and the running sums of [Note: loss tiles]."""

    def __init__(self, logits: DeferredLogits, labels: torch.Tensor, tile_tokens: int, backward: bool = True) -> None:
        self._outer = logits.hidden
        self._operations = logits.operations
        self._random_state = logits.random_state
        hidden = logits.hidden.detach()
        self._shape = hidden.shape
        flat = hidden.reshape(-1, hidden.shape[-1])
        shifted = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].reshape(-1).to(flat.device)
        self._picked: torch.Tensor | None = None
        if flat.shape[0] > tile_tokens:
            self._picked = (shifted != IGNORE_INDEX).nonzero().squeeze(1)
            flat, shifted = flat[self._picked], shifted[self._picked]
        self._hidden, self._labels = flat, shifted
        self._tiles = [slice(i, i + tile_tokens) for i in range(0, flat.shape[0], tile_tokens)]
        self._grad = torch.zeros_like(flat) if backward and self._picked is not None else None
        self._backward = backward
        self.loss = torch.zeros((), dtype=torch.float32, device=flat.device)
        self._sums: list[torch.Tensor] | None = None

    def plain_loss(self, forward: Callable, num_items: int) -> None:
        if self._backward and self._grad is None:
            self._grad = torch.empty_like(self._hidden)
        set_random_state(self._random_state)
        for tile in self._tiles:
            hidden = self._hidden[tile].detach().requires_grad_(self._outer.requires_grad)
            with torch.set_grad_enabled(self._backward):
                logits = _apply(self._operations, forward(hidden)).float()
                loss = (
                    functional.cross_entropy(logits, self._labels[tile], ignore_index=IGNORE_INDEX, reduction="sum")
                    / num_items
                )
            del logits
            if loss.requires_grad:
                loss.backward()
            if hidden.grad is not None:
                self._grad[tile] = hidden.grad
            self.loss = self.loss + loss.detach()

    def add_chunk(self, chunk: HeadChunk, forward: Callable | None = None) -> None:
        """Adds the chunk's part of the softmax sums, and of the gradient when this lane needs one."""
        count = self._hidden.shape[0]
        if self._sums is None:
            device = self._hidden.device
            self._maximum = torch.full((count,), float("-inf"), device=device)
            self._sum = torch.zeros(count, device=device)
            self._label_logit = torch.zeros(count, device=device)
            self._sums = []
            if self._backward:
                self._weighted = torch.zeros(count, self._hidden.shape[1], device=device)
                self._label_row = torch.zeros_like(self._hidden)
        end = chunk.start + chunk.weight.shape[0]
        for tile in self._tiles:
            hidden, labels = self._hidden[tile], self._labels[tile]
            weight = chunk.weight
            z = chunk.logits(hidden) if forward is None else forward(hidden)
            slope = None
            if self._operations and self._backward:
                z.requires_grad_()
                with torch.enable_grad():
                    x = _apply(self._operations, z)
                (slope,) = torch.autograd.grad(x, z, torch.ones_like(x))
                x = x.detach().float()
            else:
                x = _apply(self._operations, z).float()
            del z
            inside = (labels >= chunk.start) & (labels < end)
            at = inside.nonzero().squeeze(1)
            column = labels[at] - chunk.start
            self._label_logit[tile][at] = x[at, column]
            maximum = torch.maximum(self._maximum[tile], x.amax(dim=1))
            rescale = torch.exp(self._maximum[tile] - maximum)
            p = x.sub_(maximum[:, None]).exp_() if not self._operations else torch.exp(x - maximum[:, None])
            self._sum[tile] = self._sum[tile] * rescale + p.sum(dim=1)
            self._maximum[tile] = maximum
            if self._backward:
                if slope is not None:
                    p = p * slope
                self._weighted[tile] *= rescale[:, None]
                self._weighted[tile] += p.to(hidden.dtype) @ weight
                row = weight[column]
                self._label_row[tile][at] = row if slope is None else row * slope[at, column][:, None]

    def add_weight_gradient(
        self, chunk: HeadChunk, num_items: int, weight_grad: torch.Tensor, bias_grad: torch.Tensor | None
    ) -> None:
        """Adds dL/dW of the chunk, fp32 [rows of the chunk, hidden], and dL/db; after `finish_chunks`."""
        log_sum = self._log_sum()
        end = chunk.start + chunk.weight.shape[0]
        for tile in self._tiles:
            hidden, labels = self._hidden[tile], self._labels[tile]
            z = chunk.logits(hidden)
            slope = None
            if self._operations:
                z.requires_grad_()
                with torch.enable_grad():
                    x = _apply(self._operations, z)
                (slope,) = torch.autograd.grad(x, z, torch.ones_like(x))
                x = x.detach().float()
            else:
                x = z.float()
            p = x.sub_(log_sum[tile][:, None]).exp_() if not self._operations else torch.exp(x - log_sum[tile][:, None])
            at = ((labels >= chunk.start) & (labels < end)).nonzero().squeeze(1)
            p[at, labels[at] - chunk.start] -= 1.0
            p[labels == IGNORE_INDEX] = 0.0
            p.div_(num_items)
            if slope is not None:
                p *= slope
            if bias_grad is not None:
                bias_grad += p.sum(dim=0)
            weight_grad += p.to(hidden.dtype).t() @ hidden

    def finish_loss(self, num_items: int) -> None:
        losses = self._log_sum() - self._label_logit
        self.loss = losses[self._labels != IGNORE_INDEX].sum() / num_items

    def finish_chunks(self, num_items: int) -> None:
        self.finish_loss(num_items)
        valid = self._labels != IGNORE_INDEX
        grad = self._weighted.div_(self._sum[:, None]).sub_(self._label_row).div_(num_items)
        grad[~valid] = 0
        self._grad = grad.to(self._hidden.dtype)
        del self._weighted, self._label_row

    def backward(self) -> None:
        if not self._outer.requires_grad:
            return
        grad = self._grad
        if self._picked is not None:
            grad = grad.new_zeros(self._shape.numel() // self._shape[-1], self._shape[-1]).index_copy_(
                0, self._picked, grad
            )
        self._outer.backward(grad.view(self._shape))
        self._grad = None

    def token_scores(self) -> TokenScores:
        valid = self._labels != IGNORE_INDEX
        losses = torch.where(valid, self._log_sum() - self._label_logit, 0.0)
        likeliest = valid & (self._label_logit >= self._maximum)
        return TokenScores(self._in_place(losses), self._in_place(likeliest))

    def _in_place(self, values: torch.Tensor) -> torch.Tensor:
        """[rows that were computed] to [B, T]; 0 at the others."""
        if self._picked is not None:
            values = values.new_zeros(self._shape[:-1].numel()).index_copy_(0, self._picked, values)
        return values.view(self._shape[:-1])

    def _log_sum(self) -> torch.Tensor:
        return self._sum.log() + self._maximum
