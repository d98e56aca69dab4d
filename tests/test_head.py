"""The tiled loss against plain cross entropy, and its error against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from finetune.memory.errors import UserError
from finetune.offload.sizing.meta_operations import peak_bytes
from finetune.offload.step.deferred_logits import DeferredLogits
from finetune.offload.step.head import TiledHead, default_tiles
from finetune.offload.step.weights import HeadChunk, HeadRows

VOCAB, HIDDEN = 101, 24
SHAPES = [(2, 11), (1, 7), (3, 5)]


class Chunks:
    """Pieces of a head in memory; `held` counts acquires without release. trained: whether the head has gradients."""

    def __init__(self, head: nn.Linear, tile_vocab: int, trained: bool = False) -> None:
        self.trained, self.gradients, self.variant = trained, {}, 0
        self.starts = list(range(0, head.weight.shape[0], tile_vocab))
        self.head, self.tile_vocab, self.held, self.visits = head, tile_vocab, 0, []

    def acquire(self, key: HeadChunk) -> None:
        self.held += 1
        self.visits.append(key.index)

    def enter(self, variant: int) -> None:
        self.variant = variant

    def trains(self, key: HeadChunk) -> bool:
        return self.trained

    @property
    def head_rows(self) -> HeadRows:
        assert self.held == 1
        start = self.starts[self.visits[-1]]
        rows = slice(start, start + self.tile_vocab)
        bias = None if self.head.bias is None else self.head.bias.detach()[rows]
        return HeadRows(start, self.head.weight.detach()[rows], bias)

    def add_gradients(self, key: HeadChunk, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        assert self.visits[-1] == key.index and self.held == 1
        self.gradients[key.index] = (weight, bias)

    def release(self, key: HeadChunk) -> None:
        self.held -= 1


def soft_cap(x):
    return torch.tanh(x / 2.0) * 2.0


def identity(x):
    return x


class Case:
    """Hidden states of three lanes, labels (the last lane has none), and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=bias).requires_grad_(False)
        for parameter in self.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.head.to(dtype)
        self.hidden = [torch.randn(*shape, HIDDEN, generator=generator).to(dtype) for shape in SHAPES]
        self.labels = [torch.randint(0, VOCAB, shape, generator=generator) for shape in SHAPES]
        self.labels[0][:, :4] = -100
        self.labels[2][:] = -100
        self.num_items = sum(int((y[:, 1:] != -100).sum()) for y in self.labels)

    def plain(self, operation=identity, dtype: torch.dtype | None = None):
        """Loss of the step and gradients of the hidden states, whole logits; in `dtype` throughout if given."""
        total, grads = torch.zeros((), dtype=dtype or torch.float32), []
        weight = self.head.weight if dtype is None else self.head.weight.to(dtype)
        bias = self.head.bias if dtype is None or self.head.bias is None else self.head.bias.to(dtype)
        for hidden, labels in zip(self.hidden, self.labels, strict=True):
            hidden = (hidden if dtype is None else hidden.to(dtype)).clone().requires_grad_()
            logits = operation(functional.linear(hidden, weight, bias))
            logits = logits.float() if dtype is None else logits
            shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum") / self.num_items
            loss.backward()
            grads.append(hidden.grad)
            total = total + loss.detach()
        return total, grads

    def deferred(self, hidden, operation=identity):
        """What a causal language model's own loss makes of deferred logits."""
        pairs = zip(hidden, self.labels, strict=True)
        return [ForCausalLMLoss(operation(self.head(h)), labels, VOCAB) for h, labels in pairs]

    def tiled(self, tile_tokens: int, tile_vocab: int, operation=identity):
        chunks = Chunks(self.head, tile_vocab)
        outer = [hidden.clone().requires_grad_() for hidden in self.hidden]
        tiled = TiledHead(self.head, chunks, len(chunks.starts), tile_tokens)
        try:
            loss = tiled.loss_and_backward(self.deferred(outer, operation))
        finally:
            del self.head.forward
        assert chunks.held == 0
        return loss, [h.grad for h in outer], chunks


@pytest.mark.parametrize("tile_tokens, tile_vocab", [(64, VOCAB), (5, 33)])
def test_losses_of_variants(tile_tokens, tile_vocab):
    """Each variant's own weights, one acquire of a chunk for all, no gradients."""
    case = Case()
    scales = [1.0, 1.25, -0.5]

    class Scaled(Chunks):
        def enter(self, variant: int) -> None:
            super().enter(variant)
            if len(self.starts) == 1:
                self.head.weight.data = original * scales[variant]

        @property
        def head_rows(self) -> HeadRows:
            chunk = super().head_rows
            chunk.weight = chunk.weight * scales[self.variant]
            return chunk

    original = case.head.weight.data.clone()
    chunks = Scaled(case.head, tile_vocab)
    tiled = TiledHead(case.head, chunks, len(chunks.starts), tile_tokens)
    found = tiled.losses([loss for _ in scales for loss in case.deferred(case.hidden)], len(scales))
    del case.head.forward
    assert chunks.visits == list(range(len(chunks.starts))) and not found.requires_grad
    for loss, scale in zip(found, scales, strict=True):
        case.head.weight.data = original * scale
        expected, _ = case.plain()
        assert loss.item() == (expected.item() if tile_vocab == VOCAB else pytest.approx(expected.item(), rel=1e-6))


def worst(found, exact) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [identity, soft_cap])
def test_one_tile_is_plain_bit_for_bit(dtype, bias, operation):
    case = Case(dtype, bias)
    loss, grads, _ = case.tiled(64, VOCAB, operation)
    expected, expected_grads = case.plain(operation)
    assert loss.equal(expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype and grad.equal(wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [identity, soft_cap])
@pytest.mark.parametrize("tile_tokens, tile_vocab", [(5, VOCAB), (64, 40), (5, 33), (1, 1), (64, 100)])
def test_tiles_err_no_more_than_plain(tile_tokens, tile_vocab, dtype, bias, operation):
    case = Case(dtype, bias)
    exact, exact_grads = case.plain(operation, torch.float64)
    plain, plain_grads = case.plain(operation)
    loss, grads, chunks = case.tiled(tile_tokens, tile_vocab, operation)
    assert chunks.visits == list(range(-(-VOCAB // tile_vocab)))
    # A chunk's part of the gradient is rounded to the head's dtype once more than in the whole product.
    floor = torch.finfo(torch.float32).eps
    assert abs(float(loss) - float(exact)) <= 3 * abs(float(plain) - float(exact)) + 8 * floor * float(exact)
    scale = max(float(g.abs().max()) for g in exact_grads)
    assert worst(grads, exact_grads) <= 3 * worst(plain_grads, exact_grads) + 8 * floor * scale
    assert float(grads[2].abs().max()) == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [identity, soft_cap])
@pytest.mark.parametrize("tile_tokens, tile_vocab", [(64, 40), (5, 33), (64, 100)])
def test_gradients_of_the_head_itself(tile_tokens, tile_vocab, dtype, bias, operation):
    """In chunks, against fp64; the error is compared with that of autograd over whole logits."""
    case = Case(dtype, bias)

    def gradients(precision):
        head = [p.detach().to(precision).requires_grad_() for p in case.head.parameters()]
        for hidden, labels in zip(case.hidden, case.labels, strict=True):
            logits = operation(functional.linear(hidden.to(precision), *head))
            logits = logits if precision == torch.float64 else logits.float()
            shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum") / case.num_items
            loss.backward()
        return [p.grad for p in head]

    chunks = Chunks(case.head, tile_vocab, trained=True)
    outer = [hidden.clone().requires_grad_() for hidden in case.hidden]
    tiled = TiledHead(case.head, chunks, len(chunks.starts), tile_tokens)
    try:
        tiled.loss_and_backward(case.deferred(outer, operation))
    finally:
        del case.head.forward
    count = len(chunks.starts)
    assert chunks.visits == [*range(count), *reversed(range(count))] and chunks.held == 0
    found = [torch.cat([chunks.gradients[i][part] for i in range(count)]) for part in range(2 if bias else 1)]
    exact, plain = gradients(torch.float64), gradients(dtype)
    scale = max(float(g.abs().max()) for g in exact)
    assert worst(found, exact) <= 3 * worst(plain, exact) + 8 * torch.finfo(torch.float32).eps * scale


def test_the_sum_of_a_chunks_rows_makes_no_copy_of_it():
    weight = torch.randn(1500, 16, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    chunk = HeadRows(0, weight, None)
    assert peak_bytes(chunk.sum_of_rows) < 2 * weight.nbytes  # counted with the weight, whose rows are views
    torch.testing.assert_close(chunk.sum_of_rows(), weight.double().sum(dim=0).float(), rtol=1e-5, atol=1e-4)


def test_large_logits_do_not_overflow():
    case = Case()
    case.hidden = [hidden * 300 for hidden in case.hidden]
    exact, exact_grads = case.plain(dtype=torch.float64)
    loss, grads, _ = case.tiled(64, 7)
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
    assert worst(grads, exact_grads) < 1e-5


def test_nothing_labelled_at_all():
    case = Case()
    case.labels = [torch.full_like(y, -100) for y in case.labels]
    case.num_items = 1
    for tile_tokens, tile_vocab in [(64, VOCAB), (3, VOCAB), (64, 30), (3, 30)]:
        loss, grads, _ = case.tiled(tile_tokens, tile_vocab)
        assert float(loss) == 0
        assert all(float(g.abs().max()) == 0 for g in grads)


@pytest.mark.parametrize("tile_tokens, tile_vocab", [(64, VOCAB), (4, VOCAB), (64, 17), (4, 17)])
@pytest.mark.parametrize("operation", [identity, soft_cap])
def test_token_scores_and_last_logits(tile_tokens, tile_vocab, operation):
    case = Case(bias=True)
    chunks = Chunks(case.head, tile_vocab)
    with torch.no_grad():
        whole = [operation(case.head(hidden)) for hidden in case.hidden]
        tiled = TiledHead(case.head, chunks, len(chunks.starts), tile_tokens)
        deferred = [operation(case.head(hidden)) for hidden in case.hidden]
        scores = tiled.token_scores([one.view(-1, VOCAB) for one in deferred], [y.flatten() for y in case.labels])
        last = tiled.last_logits(deferred)
    for (found, likeliest, _), logits, labels in zip(scores, whole, case.labels, strict=True):
        logits, labels = logits.flatten(0, 1), labels.flatten()
        expected = functional.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found[labels == -100] == 0).all() and not likeliest[labels == -100].any()
        assert likeliest[labels != -100].equal((logits.argmax(dim=1) == labels)[labels != -100])
    for found, logits in zip(last, whole, strict=True):
        torch.testing.assert_close(found, logits[:, -1], rtol=1e-5, atol=1e-5)
    assert chunks.held == 0


def in_place(x):
    x.div_(2.0)
    x *= torch.tensor([[[1.5]]])
    return x.add_(0.25).tanh()


OPERATIONS = {
    "functional": lambda x: functional.tanh(x / 2.0) * 2.0,  # calls the method
    "methods": lambda x: x.float().div(2).tanh().mul(torch.tensor(2.0)).clamp(min=-1.5).to(torch.float64),
    "from the other side": lambda x: 0.5 - torch.tensor([3.0]) * x,
    "in place": in_place,
    "functions": lambda x: torch.add(torch.neg(torch.clamp(x, max=0.75)), 1, alpha=2),
    "one for each token": lambda x: torch.linspace(0.5, 2, VOCAB)[None, None] * x,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("tile_vocab", [VOCAB, 33])
def test_operations_on_logits_are_those_of_a_tensor(operation, tile_vocab):
    case = Case()
    plain, plain_grads = case.plain(lambda x: operation(x.clone()))
    loss, grads, _ = case.tiled(5, tile_vocab, operation)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    for grad, wanted in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
    logits = operation(torch.zeros(1, 2, VOCAB))
    assert operation(DeferredLogits(torch.zeros(1, 2, HIDDEN), VOCAB)).dtype == logits.dtype


NEED_WHOLE_LOGITS = {
    "tokens set": lambda x: x.index_fill_(-1, torch.tensor([1]), 0.0),
    "a tensor changed in place": lambda x: torch.ones(1).mul_(x),
    "limits of each row": lambda x: torch.clamp(x, min=torch.zeros(2, 11, 1)),
    "a case": lambda x: torch.where(torch.tensor(True), x, 0.0),
    "softmax": lambda x: torch.softmax(x, dim=-1),
    "a choice of tokens": lambda x: x[..., :3],
    "a choice of tokens at the end": lambda x: x[..., None],
    "rows mixed with columns": lambda x: x.view(-1, 2 * VOCAB),
    "a factor for each row": lambda x: x * torch.ones(2, 11, 1),
    "label smoothing": lambda x: functional.cross_entropy(x[0], torch.zeros(11, dtype=torch.int64), label_smoothing=0.1),
    "a method": lambda x: x.argmax(dim=-1),
    "a function of the loss": lambda x: torch.exp(ForCausalLMLoss(x, torch.zeros(2, 11, dtype=torch.int64), VOCAB)),
}


@pytest.mark.parametrize("name", NEED_WHOLE_LOGITS)
def test_what_needs_whole_logits_is_refused(name):
    with pytest.raises(UserError, match="tiled loss"):
        NEED_WHOLE_LOGITS[name](DeferredLogits(torch.zeros(2, 11, HIDDEN), VOCAB))


OWN_LOSSES = {
    "as given": lambda logits, labels, extra: functional.cross_entropy(logits.view(-1, VOCAB), labels.reshape(-1)),
    "a bias for each token": lambda logits, labels, extra: functional.cross_entropy(
        (logits + extra["bias"]).view(-1, logits.size(-1)), labels.view(-1)
    ),
    "chosen rows": lambda logits, labels, extra: functional.cross_entropy(
        logits[..., :-1, :][labels[:, 1:] != 7].contiguous(), labels[:, 1:][labels[:, 1:] != 7]
    ),
    "another label that is ignored": lambda logits, labels, extra: nn.CrossEntropyLoss(ignore_index=5)(
        logits.view(-1, VOCAB), labels.clamp(min=5).view(-1)
    ),
    "with a loss added": lambda logits, labels, extra: 0.02 * extra["router"].pow(2).sum()
    + ForCausalLMLoss(logits, labels, VOCAB),
    "two terms": lambda logits, labels, extra: ForCausalLMLoss(logits, labels, VOCAB)
    + 0.3 * functional.cross_entropy(logits[:, 0], labels[:, -1]) / 2,
}


@pytest.mark.parametrize("tile_tokens, tile_vocab", [(64, VOCAB), (5, 33)])
@pytest.mark.parametrize("name", OWN_LOSSES)
def test_a_models_own_loss(name, tile_tokens, tile_vocab):
    """Of one lane, whatever its code does with logits and labels: the value and the gradients that whole logits have."""
    case, own = Case(), OWN_LOSSES[name]
    labels = case.labels[0]
    extra = {"bias": torch.linspace(-2, 2, VOCAB)[None], "router": torch.ones(3, requires_grad=True)}
    hidden = [case.hidden[0].clone().requires_grad_() for _ in range(2)]
    expected = own(case.head(hidden[0]), labels, extra)
    expected.backward()
    router, extra["router"].grad = extra["router"].grad, None
    chunks = Chunks(case.head, tile_vocab)
    tiled = TiledHead(case.head, chunks, len(chunks.starts), tile_tokens)
    found = tiled.loss_and_backward([own(case.head(hidden[1]), labels, extra)])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden[1].grad, hidden[0].grad, rtol=1e-4, atol=1e-6)
    assert extra["router"].grad is router is None or extra["router"].grad.equal(router)
    assert tiled.losses([own(case.head(hidden[1]), labels, extra)], 1).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("vocab, row_bytes", [(101, 64), (49152, 1152), (128_256, 8192), (262_144, 4 * 5376)])
def test_default_tiles_are_bounded_and_cover(vocab, row_bytes):
    tokens, rows = default_tiles(vocab, row_bytes)
    assert 1 <= rows <= vocab and (rows - 1) * row_bytes < 32 << 20
    assert tokens >= 16 and (tokens == 16 or tokens * rows * 4 <= 8 << 20)
