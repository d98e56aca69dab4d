"""The loss over tiles of rows: logits are never whole.

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
(these are of the cross entropy alone; `finetune.offload.step.loss_form` has other forms).
Tile sizes follow from the model alone (`default_tiles`), never from a budget, so placement does not change results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from finetune.memory.tensor_file import in_file
from finetune.offload.step.loss_form import LossForm
from finetune.offload.step.random_state import set_random_state

if TYPE_CHECKING:
    from finetune.offload.step.deferred_logits import DeferredLogits, DeferredLoss
    from finetune.offload.step.weights import HeadRows

IGNORE_INDEX: int = nn.CrossEntropyLoss().ignore_index
"""The label of a row that has none: -100, by PyTorch's own default."""

Operation = Callable[[torch.Tensor, slice], torch.Tensor]
"""Elementwise, of logits [n, columns] and the columns of the vocabulary that they are of."""


class TokenScores(NamedTuple):
    """Of every position, [n]; 0 and False where the label is -100.

    losses: fp32, the cross entropy of the label. likeliest: bool, whether no token is likelier than it. tokens: int64, the
    likeliest one, the first of several, -100 where the label is; None: not asked.
    """

    losses: torch.Tensor
    likeliest: torch.Tensor
    tokens: torch.Tensor | None = None


def apply_operations(operations: Sequence[Operation], x: torch.Tensor, columns: slice) -> torch.Tensor:
    for operation in operations:
        x = operation(x, columns).view(x.shape)  # what stands beside may have the dimensions of whole logits
    return x


def step_items(losses: Sequence[DeferredLoss]) -> int:
    """Labels of a step, 1 where there are none."""
    return max(1, sum(loss.num_items for loss in losses))


def lane_losses(
    losses: Sequence[DeferredLoss], tile_tokens: int, backward: bool = True, keeps_rows: bool = True
) -> list[LaneLoss]:
    """Of one step."""
    items = step_items(losses)
    return [LaneLoss(loss, items, tile_tokens, backward, keeps_rows) for loss in losses]


class LaneLoss:
    """One lane's own loss, times its share of the `step_items` labels of the step. keeps_rows: as in `TiledCrossEntropy`."""

    def __init__(
        self, loss: DeferredLoss, step_items: int, tile_tokens: int, backward: bool = True, keeps_rows: bool = True
    ) -> None:
        items = loss.num_items
        self.rows = []
        for term in loss.terms:
            mean_of = term.num_items if term.is_mean else 1
            if term.weight:  # the divisor of one mean with a weight of 1 is step_items, exactly
                divisor = step_items * max(1, mean_of) / (max(1, items) * term.weight)
                if term.divisor is not None:
                    divisor = term.divisor / term.weight
                self.rows.append(term.tiled(tile_tokens, divisor, backward, keeps_rows))
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
            with in_file():
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


class TiledCrossEntropy:
    """The rows of one cross entropy, their tiles, and the running sums of [Note: loss tiles].

    logits: [n, vocabulary]. labels: int64 [n]. `loss`, fp32 [], is the sum over the labelled rows by `divisor`.
    keeps_rows: whether hidden states of these rows stay in memory beside those of the model; else they are chosen again.
    """

    def __init__(
        self,
        logits: DeferredLogits,
        labels: torch.Tensor,
        tile_tokens: int,
        divisor: float = 1.0,
        backward: bool = True,
        keeps_rows: bool = True,
        form: LossForm = LossForm(),
        row_weights: torch.Tensor | None = None,
    ) -> None:
        self._outer = logits.hidden
        self._form = form
        self._vocab_size = logits.vocab_size
        self._operations = logits.operations
        self._columns = slice(0, logits.vocab_size)
        self._random_state = logits.random_state
        self._divisor = divisor
        self._shape = logits.hidden.shape
        self._picked: torch.Tensor | None = None
        if self._shape[0] > tile_tokens:
            self._picked = (labels != IGNORE_INDEX).nonzero().squeeze(1)
            labels = labels[self._picked]
            row_weights = None if row_weights is None else row_weights[self._picked]
        self._labels, self._weights = labels, row_weights
        with in_file():
            self._kept = self._rows() if keeps_rows else None
        self._tiles = [slice(i, i + tile_tokens) for i in range(0, labels.shape[0], tile_tokens)]
        self._grad: torch.Tensor | None = None
        self._backward = backward
        self.loss = torch.zeros((), dtype=torch.float32, device=labels.device)
        self._sums: list[torch.Tensor] | None = None
        self.predicts = False
        """Whether `token_scores` names the likeliest tokens."""

    def _rows(self) -> torch.Tensor:
        """Hidden states of the rows that are computed."""
        flat = self._outer.detach()
        return flat if self._picked is None else flat[self._picked]

    @property
    def _hidden(self) -> torch.Tensor:
        return self._rows() if self._kept is None else self._kept

    def plain_loss(self, forward: Callable) -> None:
        rows = self._hidden
        if self._backward:
            with in_file():
                self._grad = torch.zeros_like(rows) if self._picked is not None else torch.empty_like(rows)
        set_random_state(self._random_state)
        for tile in self._tiles:
            hidden = rows[tile].detach().requires_grad_(self._outer.requires_grad)
            with torch.set_grad_enabled(self._backward):
                logits = apply_operations(self._operations, forward(hidden), self._columns).float()
                weights = None if self._weights is None else self._weights[tile]
                loss = self._form.total(logits, self._labels[tile], IGNORE_INDEX, weights) / self._divisor
            del logits
            if loss.requires_grad:
                loss.backward()
            if hidden.grad is not None:
                self._grad[tile] = hidden.grad
            self.loss = self.loss + loss.detach()

    def add_chunk(self, chunk: HeadRows, forward: Callable | None = None) -> None:
        """Adds the chunk's part of the softmax sums, and of the gradient when this lane needs one."""
        rows, form = self._hidden, self._form
        count = rows.shape[0]
        if self._sums is None:
            device = rows.device
            self._maximum = torch.full((count,), float("-inf"), device=device)
            self._sum = torch.zeros(count, device=device)
            self._label_logit = torch.zeros(count, device=device)
            self._sums = []
            self._likeliest = torch.zeros(count if self.predicts else 0, dtype=torch.int64, device=device)
            if self._backward:
                with in_file():
                    self._weighted = torch.zeros(count, rows.shape[1], device=device)
                    self._label_row = torch.zeros_like(rows)
                    if form.smoothing:
                        self._row_sum = torch.zeros(count if self._operations else 1, rows.shape[1], device=device)
            if form.smoothing:
                self._logit_sum = torch.zeros(count, device=device)
        if form.smoothing and self._backward and not self._operations:
            self._row_sum += chunk.sum_of_rows()
        for tile in self._tiles:
            hidden = rows[tile]
            z = chunk.logits(hidden) if forward is None else forward(hidden)
            x, slope = self._operated(z, chunk, self._backward)
            del z
            at, column = self._labelled_in(chunk, tile)
            self._label_logit[tile][at] = x[at, column]
            if form.smoothing:
                self._logit_sum[tile] += x.sum(dim=1)
            if self.predicts:
                highest, index = x.max(dim=1)
                is_higher = highest > self._maximum[tile]
                self._likeliest[tile] = torch.where(is_higher, index + chunk.start, self._likeliest[tile])
            maximum = torch.maximum(self._maximum[tile], x.amax(dim=1))
            rescale = torch.exp(self._maximum[tile] - maximum)
            p = self._exponentials(x, maximum)
            self._sum[tile] = self._sum[tile] * rescale + p.sum(dim=1)
            self._maximum[tile] = maximum
            if self._backward:
                if slope is not None:
                    p = p * slope
                    if form.smoothing:
                        self._row_sum[tile] += slope.to(hidden.dtype) @ chunk.weight
                self._weighted[tile] *= rescale[:, None]
                self._weighted[tile] += p.to(hidden.dtype) @ chunk.weight
                row = chunk.weight[column]
                self._label_row[tile][at] = row if slope is None else row * slope[at, column][:, None]

    def add_weight_gradient(
        self, chunk: HeadRows, weight_grad: torch.Tensor, bias_grad: torch.Tensor | None
    ) -> None:
        """Adds dL/dW of the chunk, fp32 [rows of the chunk, hidden], and dL/db; after `finish_chunks`."""
        log_sum, rows, form = self._log_sum(), self._hidden, self._form
        for tile in self._tiles:
            hidden = rows[tile]
            x, slope = self._operated(chunk.logits(hidden), chunk, wants_slope=True)
            p = self._exponentials(x, log_sum[tile])
            at, column = self._labelled_in(chunk, tile)
            if form.z:
                p.mul_(1 + 2 * form.z * log_sum[tile][:, None])
            p[at, column] -= 1.0 - form.smoothing
            if form.smoothing:
                p.sub_(form.smoothing / self._vocab_size)
            p[self._labels[tile] == IGNORE_INDEX] = 0.0
            if self._weights is not None:
                p.mul_(self._weights[tile][:, None])
            p.div_(self._divisor)
            if slope is not None:
                p *= slope
            if bias_grad is not None:
                bias_grad += p.sum(dim=0)
            weight_grad += p.to(hidden.dtype).t() @ hidden

    def _operated(
        self, z: torch.Tensor, chunk: HeadRows, wants_slope: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(f(z), fp32; f'(z), None where f does nothing or nobody wants it) of logits of the chunk's columns."""
        if not self._operations:
            return z.float(), None
        columns = slice(chunk.start, chunk.start + chunk.weight.shape[0])
        if not wants_slope:
            return apply_operations(self._operations, z, columns).float(), None
        z.requires_grad_()
        with torch.enable_grad():
            x = apply_operations(self._operations, z, columns)
        (slope,) = torch.autograd.grad(x, z, torch.ones_like(x))
        return x.detach().float(), slope

    def _exponentials(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """exp(x - shift); without operations nothing else holds x, and it is written over."""
        return torch.exp(x - shift[:, None]) if self._operations else x.sub_(shift[:, None]).exp_()

    def _labelled_in(self, chunk: HeadRows, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the tile whose label is of the chunk, and its column there."""
        labels = self._labels[tile]
        at = ((labels >= chunk.start) & (labels < chunk.start + chunk.weight.shape[0])).nonzero().squeeze(1)
        return at, labels[at] - chunk.start

    def finish_loss(self) -> None:
        log_sum, form = self._log_sum(), self._form
        losses = log_sum - self._label_logit
        if form.smoothing:
            losses = (1 - form.smoothing) * losses + form.smoothing * (log_sum - self._logit_sum / self._vocab_size)
        if form.z:
            losses = losses + form.z * log_sum.square()
        if self._weights is not None:
            losses = losses * self._weights
        self.loss = losses[self._labels != IGNORE_INDEX].sum() / self._divisor

    def finish_chunks(self) -> None:
        self.finish_loss()
        with in_file():
            self._finish_gradient()
        del self._weighted, self._label_row

    def _finish_gradient(self) -> None:
        valid, form = self._labels != IGNORE_INDEX, self._form
        grad = self._weighted.div_(self._sum[:, None])
        if form.z:
            grad.mul_(1 + 2 * form.z * self._log_sum()[:, None])
        if form.smoothing:
            grad.sub_((1 - form.smoothing) * self._label_row).sub_(form.smoothing / self._vocab_size * self._row_sum)
            del self._row_sum
        else:
            grad.sub_(self._label_row)
        if self._weights is not None:
            grad.mul_(self._weights[:, None])
        grad = grad.div_(self._divisor)
        grad[~valid] = 0
        self._grad = grad.to(self._outer.dtype)

    def take_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states, their gradient)."""
        grad, self._grad = self._grad, None
        if self._picked is not None and self._outer.requires_grad:
            with in_file():
                grad = grad.new_zeros(self._shape).index_copy_(0, self._picked, grad)
        return self._outer, grad

    def token_scores(self) -> TokenScores:
        valid = self._labels != IGNORE_INDEX
        losses = torch.where(valid, self._log_sum() - self._label_logit, 0.0)
        likeliest = valid & (self._label_logit >= self._maximum)
        tokens = self._in_place(torch.where(valid, self._likeliest, IGNORE_INDEX)) if self.predicts else None
        return TokenScores(self._in_place(losses), self._in_place(likeliest), tokens)

    def _in_place(self, values: torch.Tensor) -> torch.Tensor:
        """[rows that were computed] to [n]; 0 at the others."""
        if self._picked is None:
            return values
        return values.new_zeros(self._shape[0]).index_copy_(0, self._picked, values)

    def _log_sum(self) -> torch.Tensor:
        return self._sum.log() + self._maximum
