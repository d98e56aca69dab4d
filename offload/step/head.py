"""The language-model head and its loss, over tiles: logits are never whole.

[Note: loss tiles]
The model's forward runs with its head deferred, its own loss included: `DeferredLogits` stand for the logits and remember
the final hidden states, the elementwise operations that the model applies to logits (scaling, soft-capping) and which rows it
takes; the cross entropy of them is a `DeferredLoss`, which remembers what is added to it (losses of a router) and by what it is
multiplied. So which position predicts which label is what the model's own code says. The loss then runs in fp32, in tiles of
`tile_tokens` rows. When all rows of a micro-batch fit one tile they are all computed, as a plain loop does; otherwise only rows
that have a label are.

The loss of a step is what the model would make of the whole step where its loss is a mean over labels: that of a micro-batch
counts as its share of the step's labels.

A head of at most `tile_vocab` rows (of the vocabulary) is one chunk: each tile is plain PyTorch, logits -> fp32 cross
entropy -> backward, bit for bit. A larger head is streamed in chunks of `tile_vocab` rows, once per step, with the maximum
and the sum of exponentials carried along (online softmax, Milakov & Gimelshein 2018, as FlashAttention does for attention): for
each row, with x = f(z), z = W h, label y,
    m, s       running maximum and sum of exp(x - m)
    a          running sum of exp(x - m) f'(z) W      (rescaled with s when m grows)
    dL/dh      = (a / s - f'(z_y) W_y) / divisor
Where the head itself is trained its chunks are visited once more, with m and s known:
    dL/dW      = sum over rows of (exp(x - m) / s - onehot(y)) f'(z) h^T / divisor      (added up in fp32)
Tile sizes follow from the model alone (`default_tiles`), never from a budget, so placement does not change results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from memory.errors import UserError
from offload.step.random_state import RandomState, get_random_state, set_random_state

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
    dropout) and the elementwise operations applied to it.

    hidden: [..., hidden]; what it stands for: [..., vocab_size]. An operation takes logits and the columns of the vocabulary
    that they are of. What would need whole logits raises UserError.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        vocab_size: int,
        operations: tuple[Operation, ...] = (),
        random_state: RandomState | None = None,
    ) -> None:
        self.hidden = hidden
        self.vocab_size = vocab_size
        self.operations = operations
        self.random_state = get_random_state() if random_state is None else random_state

    def then(self, operation: Operation) -> DeferredLogits:
        return DeferredLogits(self.hidden, self.vocab_size, (*self.operations, operation), self.random_state)

    def rows(self, hidden: torch.Tensor) -> DeferredLogits:
        """The same of other hidden states, which are some of these or in another order."""
        return DeferredLogits(hidden, self.vocab_size, self.operations, self.random_state)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        if any(isinstance(value, torch.Tensor) and value.numel() > 1 for value in options.values()):
            raise _needs_whole_logits("a tensor by keyword")

    def _operand(self, other: Any) -> Callable[[slice], Any]:
        """What stands beside the logits, for some columns: a number, or a tensor of one value or one for each column."""
        if not isinstance(other, torch.Tensor) or other.numel() == 1:
            return lambda columns: other
        if other.numel() != self.vocab_size or other.shape[-1] != self.vocab_size:
            raise _needs_whole_logits(f"a tensor of shape {list(other.shape)}")
        return lambda columns: other[..., columns]

    def float(self):
        return self.then(_float)

    def contiguous(self):
        return self

    def _method(self, name: str, *args: Any, **kwargs: Any) -> DeferredLogits:
        """The method of a tensor with this name; in place where it is."""
        in_place = name.endswith("_") and not name.startswith("_")
        method, operands = getattr(torch.Tensor, name.removesuffix("_") if in_place else name), map(self._operand, args)
        operands, dtype = list(operands), self.dtype
        self._check_options(kwargs)
        then = self.then(lambda x, columns: method(x, *(operand(columns) for operand in operands), **kwargs))
        if not in_place:
            return then
        self.operations = then.then(lambda x, columns: x.to(dtype)).operations
        return self

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.hidden.shape[:-1], self.vocab_size])

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return _apply(self.operations, self.hidden.new_zeros(1, 1), slice(0, 1)).dtype

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape):
        *rows, columns = shape[0] if len(shape) == 1 else shape
        if columns not in (-1, self.vocab_size) or (columns == -1 and -1 in rows):
            raise _needs_whole_logits(f"view{tuple(shape)}")
        return self.rows(self.hidden.reshape(*rows, self.hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        used = sum(
            0 if i is None or i is Ellipsis else i.ndim if getattr(i, "dtype", None) == torch.bool else 1 for i in index
        )
        last = index[-1]
        if (used == self.ndim or any(i is Ellipsis for i in index)) and not (
            last is Ellipsis or isinstance(last, slice) and last == slice(None)
        ):
            raise _needs_whole_logits("a choice of tokens of the vocabulary")
        return self.rows(self.hidden[index])

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.removesuffix("_") not in ELEMENTWISE:
            raise _needs_whole_logits(name)
        return partial(self._method, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", str(function))
        if function is functional.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        deferred = [a for a in args if isinstance(a, DeferredLogits)]
        # In place it would change a tensor that stands first, for what has no value yet.
        if name.removeprefix("__").removesuffix("__") not in ELEMENTWISE or len(deferred) != 1 or "out" in kwargs:
            raise _needs_whole_logits(name)
        deferred[0]._check_options(kwargs)
        operands = [a if a is deferred[0] else deferred[0]._operand(a) for a in args]
        return deferred[0].then(
            lambda x, columns: function(*(x if a is deferred[0] else a(columns) for a in operands), **kwargs)
        )


def _operator(name: str) -> Callable[..., DeferredLogits]:
    return lambda self, *args: self._method(name, *args)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "pow"):
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))


Operation = Callable[[torch.Tensor, slice], torch.Tensor]
ELEMENTWISE = frozenset(
    ("add", "radd", "sub", "rsub", "subtract", "mul", "rmul", "multiply", "div", "truediv", "rtruediv", "true_divide",
     "divide", "neg", "negative", "pow", "clamp", "clip", "tanh", "sigmoid", "to", "type", "double", "half", "bfloat16")
)  # fmt: skip
"""Names of what may be applied to logits, as a method, an operator or a function of torch."""


def _float(x: torch.Tensor, columns: slice) -> torch.Tensor:
    return x.float()


def _needs_whole_logits(operation: str) -> UserError:
    return UserError(
        f"the model applies {operation} to its logits, or to a loss of them; a tiled loss, whose logits are never whole, knows "
        "only elementwise operations, a choice of rows, and cross entropy: this model's own loss can't be streamed"
    )


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """A mean (or sum) of cross entropies that the model's own loss asked for, times `weight`.

    logits: [n, vocabulary], deferred. labels: int64 [n], -100 where there is none.
    """

    logits: DeferredLogits
    labels: torch.Tensor
    is_mean: bool = True
    weight: float = 1.0

    @property
    def num_items(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


class DeferredLoss:
    """Stands for the loss in the model's forward: a sum of cross entropies and of tensors that the model adds to them."""

    def __init__(self, terms: tuple[CrossEntropy, ...], added: torch.Tensor | float = 0.0) -> None:
        self.terms = terms
        self.added = added

    @property
    def num_items(self) -> int:
        """Labels that the (first) cross entropy is a mean of."""
        return self.terms[0].num_items

    @property
    def device(self) -> torch.device:
        return self.terms[0].labels.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __add__(self, other):
        if isinstance(other, DeferredLoss):
            return DeferredLoss(self.terms + other.terms, self.added + other.added)
        return DeferredLoss(self.terms, self.added + other)

    __radd__ = __add__

    def __mul__(self, other):
        if isinstance(other, torch.Tensor) and other.requires_grad or isinstance(other, DeferredLoss):
            raise _needs_whole_logits("a product of losses")
        terms = tuple(replace(term, weight=term.weight * float(other)) for term in self.terms)
        return DeferredLoss(terms, self.added * other)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self * (1.0 / float(other))

    def to(self, *args, **kwargs):
        return self

    def mean(self):
        return self

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise _needs_whole_logits(name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.add, torch.Tensor.add) and not kwargs:  # of a tensor that stands first
            return args[1] + args[0]
        raise _needs_whole_logits(getattr(function, "__name__", str(function)))


def _cross_entropy(
    input: DeferredLogits, target: torch.Tensor, weight=None, size_average=None, ignore_index: int = IGNORE_INDEX,
    reduce=None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> DeferredLoss:  # fmt: skip
    """In place of `torch.nn.functional.cross_entropy`, whose signature this is."""
    if weight is not None or label_smoothing or reduction not in ("mean", "sum") or input.ndim != 2 or target.ndim != 1:
        asked = f"weight {weight is not None}, label_smoothing {label_smoothing}, reduction {reduction}"
        raise _needs_whole_logits(f"cross entropy with {asked} over {input.ndim} dimensions")
    labels = target.to(input.device)
    if ignore_index != IGNORE_INDEX:
        labels = labels.masked_fill(labels == ignore_index, IGNORE_INDEX)
    if input.operations and input.operations[-1] is _float:  # which a tiled loss does in any case
        input = DeferredLogits(input.hidden, input.vocab_size, input.operations[:-1], input.random_state)
    return DeferredLoss((CrossEntropy(input, labels, reduction == "mean"),))


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
    """Of every position, [n]; 0 and False where the label is -100.

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
        module.forward = partial(DeferredLogits, vocab_size=module.weight.shape[0])

    def loss_and_backward(self, losses: Sequence[DeferredLoss]) -> torch.Tensor:
        """The loss of the step, fp32 []: of all lanes' own losses, each times its share of the step's labels.

        Backward runs through the head and through what the model computed between its last block and the head, and
        through what it added to its loss.
        """
        lanes = _lanes(losses, self._tile_tokens)
        rows = [one for lane in lanes for one in lane.rows]
        if self._num_chunks == 1:
            self._chunks.acquire(0)
            self._chunks.enter(0)
            for one in rows:
                one.plain_loss(self._forward)
            self._chunks.release(0)
        else:
            for index in range(self._num_chunks):
                self._chunks.acquire(index)
                chunk = self._chunks.enter(0)
                for one in rows:
                    one.add_chunk(chunk)
                self._chunks.release(index)
            for one in rows:
                one.finish_chunks()
            if self._chunks.trained:
                self._train_chunks(rows)
        total = torch.zeros((), dtype=torch.float32)
        for lane in lanes:
            total = total + lane.loss
            lane.backward()
        return total

    def _train_chunks(self, rows: Sequence[_Rows]) -> None:
        for index in reversed(range(self._num_chunks)):  # the last one is still near
            self._chunks.acquire(index)
            chunk = self._chunks.enter(0)
            weight = torch.zeros(chunk.weight.shape, device=chunk.weight.device)
            bias = None if chunk.bias is None else torch.zeros(chunk.bias.shape, device=chunk.bias.device)
            for lane in rows:
                lane.add_weight_gradient(chunk, weight, bias)
            self._chunks.add_gradients(index, weight, bias)
            self._chunks.release(index)

    def losses(self, losses: Sequence[DeferredLoss], variants: int) -> torch.Tensor:
        """What `loss_and_backward` returns, for every variant of the weights, without gradients; fp32 [variants].

        losses: of all lanes of variant 0, of variant 1, ...
        """
        count = len(losses) // variants
        with torch.no_grad():
            by_variant = [
                _lanes(losses[i * count : (i + 1) * count], self._tile_tokens, backward=False) for i in range(variants)
            ]
            for index in range(self._num_chunks):
                self._chunks.acquire(index)
                for variant, lanes in enumerate(by_variant):
                    chunk = self._chunks.enter(variant)
                    for one in (one for lane in lanes for one in lane.rows):
                        if self._num_chunks == 1:
                            one.plain_loss(self._forward)
                        else:
                            one.add_chunk(chunk)
                self._chunks.release(index)
            totals = []
            for lanes in by_variant:
                total = torch.zeros((), dtype=torch.float32)
                for lane in lanes:
                    for one in lane.rows if self._num_chunks > 1 else ():
                        one.finish_loss()
                    total = total + lane.loss
                totals.append(total)
        return torch.stack(totals)

    def token_scores(
        self, logits: Sequence[DeferredLogits], labels: Sequence[torch.Tensor], variants: Sequence[int] = ()
    ) -> list[TokenScores]:
        """What each lane's model says of every label. No gradients.

        logits: [n, V] a lane. labels: int64 [n] a lane, of these very rows; -100: nothing is asked. variants: which version
        of the weights each lane met, ascending; empty: all the only one.
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
                columns = slice(chunk.start, chunk.start + chunk.weight.shape[0])
                parts[i].append(_apply(logits[i].operations, part, columns).float())
        return [torch.cat(part, dim=-1) for part in parts]

    def _every_chunk(self, lanes: int, variants: Sequence[int]) -> Iterator[tuple[int, HeadChunk]]:
        """(lane, chunk) for every chunk and lane, each with its version of the weights; chunks are fetched once."""
        for index in range(self._num_chunks):
            self._chunks.acquire(index)
            for i in range(lanes):
                yield i, self._chunks.enter(variants[i] if variants else 0)
            self._chunks.release(index)


def _apply(operations: Sequence[Operation], x: torch.Tensor, columns: slice) -> torch.Tensor:
    for operation in operations:
        x = operation(x, columns).view(x.shape)  # what stands beside may have the dimensions of whole logits
    return x


def _lanes(losses: Sequence[DeferredLoss], tile_tokens: int, backward: bool = True) -> list[_LaneLoss]:
    """Of one step."""
    step_items = max(1, sum(loss.num_items for loss in losses))
    return [_LaneLoss(loss, step_items, tile_tokens, backward) for loss in losses]


class _LaneLoss:
    """One lane's own loss, times its share of the `step_items` labels of the step."""

    def __init__(self, loss: DeferredLoss, step_items: int, tile_tokens: int, backward: bool) -> None:
        items = loss.num_items
        self.rows = []
        for term in loss.terms:
            mean_of = term.num_items if term.is_mean else 1
            if term.weight:  # the divisor of one mean with a weight of 1 is step_items, exactly
                divisor = step_items * max(1, mean_of) / (max(1, items) * term.weight)
                self.rows.append(_Rows(term.logits, term.labels, tile_tokens, divisor, backward))
        self._added = loss.added * (items / step_items)

    @property
    def loss(self) -> torch.Tensor:
        """fp32 [], on the CPU."""
        parts = [one.loss.to("cpu") for one in self.rows]
        if isinstance(self._added, torch.Tensor):
            parts.append(self._added.detach().float().to("cpu"))
        return sum(parts[1:], parts[0]) if parts else torch.zeros(())

    def backward(self) -> None:
        pairs = [one.take_gradient() for one in self.rows]
        if isinstance(self._added, torch.Tensor):
            pairs.append((self._added, torch.ones_like(self._added)))
        pairs = [(tensor, grad) for tensor, grad in pairs if tensor.requires_grad]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


class _Rows:
    """The rows of one cross entropy, their tiles, and the running sums of [Note: loss tiles]. Its sum is over `divisor`."""

    def __init__(
        self, logits: DeferredLogits, labels: torch.Tensor, tile_tokens: int, divisor: float = 1.0, backward: bool = True
    ) -> None:
        self._outer = logits.hidden
        self._operations = logits.operations
        self._columns = slice(0, logits.vocab_size)
        self._random_state = logits.random_state
        self._divisor = divisor
        flat = logits.hidden.detach()
        self._shape = flat.shape
        self._picked: torch.Tensor | None = None
        if flat.shape[0] > tile_tokens:
            self._picked = (labels != IGNORE_INDEX).nonzero().squeeze(1)
            flat, labels = flat[self._picked], labels[self._picked]
        self._hidden, self._labels = flat, labels
        self._tiles = [slice(i, i + tile_tokens) for i in range(0, flat.shape[0], tile_tokens)]
        self._grad = torch.zeros_like(flat) if backward and self._picked is not None else None
        self._backward = backward
        self.loss = torch.zeros((), dtype=torch.float32, device=flat.device)
        self._sums: list[torch.Tensor] | None = None

    def plain_loss(self, forward: Callable) -> None:
        if self._backward and self._grad is None:
            self._grad = torch.empty_like(self._hidden)
        set_random_state(self._random_state)
        for tile in self._tiles:
            hidden = self._hidden[tile].detach().requires_grad_(self._outer.requires_grad)
            with torch.set_grad_enabled(self._backward):
                logits = _apply(self._operations, forward(hidden), self._columns).float()
                loss = (
                    functional.cross_entropy(logits, self._labels[tile], ignore_index=IGNORE_INDEX, reduction="sum")
                    / self._divisor
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
        columns = slice(chunk.start, end)
        for tile in self._tiles:
            hidden, labels = self._hidden[tile], self._labels[tile]
            weight = chunk.weight
            z = chunk.logits(hidden) if forward is None else forward(hidden)
            slope = None
            if self._operations and self._backward:
                z.requires_grad_()
                with torch.enable_grad():
                    x = _apply(self._operations, z, columns)
                (slope,) = torch.autograd.grad(x, z, torch.ones_like(x))
                x = x.detach().float()
            else:
                x = _apply(self._operations, z, columns).float()
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
        self, chunk: HeadChunk, weight_grad: torch.Tensor, bias_grad: torch.Tensor | None
    ) -> None:
        """Adds dL/dW of the chunk, fp32 [rows of the chunk, hidden], and dL/db; after `finish_chunks`."""
        log_sum = self._log_sum()
        end = chunk.start + chunk.weight.shape[0]
        columns = slice(chunk.start, end)
        for tile in self._tiles:
            hidden, labels = self._hidden[tile], self._labels[tile]
            z = chunk.logits(hidden)
            slope = None
            if self._operations:
                z.requires_grad_()
                with torch.enable_grad():
                    x = _apply(self._operations, z, columns)
                (slope,) = torch.autograd.grad(x, z, torch.ones_like(x))
                x = x.detach().float()
            else:
                x = z.float()
            p = x.sub_(log_sum[tile][:, None]).exp_() if not self._operations else torch.exp(x - log_sum[tile][:, None])
            at = ((labels >= chunk.start) & (labels < end)).nonzero().squeeze(1)
            p[at, labels[at] - chunk.start] -= 1.0
            p[labels == IGNORE_INDEX] = 0.0
            p.div_(self._divisor)
            if slope is not None:
                p *= slope
            if bias_grad is not None:
                bias_grad += p.sum(dim=0)
            weight_grad += p.to(hidden.dtype).t() @ hidden

    def finish_loss(self) -> None:
        losses = self._log_sum() - self._label_logit
        self.loss = losses[self._labels != IGNORE_INDEX].sum() / self._divisor

    def finish_chunks(self) -> None:
        self.finish_loss()
        valid = self._labels != IGNORE_INDEX
        grad = self._weighted.div_(self._sum[:, None]).sub_(self._label_row).div_(self._divisor)
        grad[~valid] = 0
        self._grad = grad.to(self._hidden.dtype)
        del self._weighted, self._label_row

    def take_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states, their gradient)."""
        grad, self._grad = self._grad, None
        if self._picked is not None and self._outer.requires_grad:
            grad = grad.new_zeros(self._shape).index_copy_(0, self._picked, grad)
        return self._outer, grad

    def token_scores(self) -> TokenScores:
        valid = self._labels != IGNORE_INDEX
        losses = torch.where(valid, self._log_sum() - self._label_logit, 0.0)
        likeliest = valid & (self._label_logit >= self._maximum)
        return TokenScores(self._in_place(losses), self._in_place(likeliest))

    def _in_place(self, values: torch.Tensor) -> torch.Tensor:
        """[rows that were computed] to [n]; 0 at the others."""
        if self._picked is None:
            return values
        return values.new_zeros(self._shape[0]).index_copy_(0, self._picked, values)

    def _log_sum(self) -> torch.Tensor:
        return self._sum.log() + self._maximum
