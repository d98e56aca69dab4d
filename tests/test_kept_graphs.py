"""Graphs that stay from forward to backward, over weights that lie elsewhere by then: the bits of plain autograd."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_engine import backward, expected_of
from torch import nn
from torch.nn import functional

from finetune.offload.step.activations import Activations
from finetune.offload.step.engine import Engine
from finetune.offload.step.weights import Block as BlockKey

WIDTH = 6


class Block(nn.Module):
    """A frozen or trained base with an adapter beside it, dropout, a buffer, and a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 9, bias=False)
        self.register_buffer("factor", torch.rand(9))

    def forward(self, x, shared):
        y = self.norm(x)
        y = self.up(y) + self.b(self.a(functional.dropout(y, 0.3, self.training)))
        y = torch.tanh(y * self.factor) * self.up.bias[3:6].sum()
        return x + self.down(y) * shared, {"side": y.square().mean()}


class Model(nn.Module):
    def __init__(self, num_blocks: int = 4, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.first = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(num_blocks))

    def forward(self, x):
        shared, sides = x.mean() + 1, []  # without a gradient, which plain autograd would add up in another order
        x = functional.dropout(self.first(x), 0.2, self.training)
        for block in self.blocks:
            x, more = block(x, shared)
            sides.append(more["side"])
            x += 0.5
        return x.mean() + torch.stack(sides).sum()


class Moving:
    """Weights that are at another address in every visit, and are NaN where they were before.

    trained: whether they are trained themselves; adapters (`a`, `b`) stay where they are."""

    def __init__(self, model: nn.Module, trained: bool = False) -> None:
        self.trained = trained
        self.visits: list[int] = []
        self.taken: dict[str, torch.Tensor] = {}
        self._blocks, self._values = model.blocks, []
        for block in model.blocks:
            homes = [(m._parameters, n, f"{p}.{n}") for p, m in block.named_modules() for n in m._parameters]
            homes = [home for home in homes if home[0][home[1]] is not None and not home[2].startswith(("a.", "b."))]
            homes += [(block._buffers, n, n) for n in block._buffers]
            self._values.append([(home, name, path, home[name].detach().clone()) for home, name, path in homes])
            for home, name, _, value in self._values[-1]:
                nan = torch.full((), float("nan")).expand(value.shape)
                home[name] = nn.Parameter(nan, requires_grad=False) if home is not block._buffers else nan
        self._slab = torch.full((2000,), float("nan"))
        self._start = 0

    def begin(self, order) -> None: ...
    def enter(self, variant: int) -> None: ...

    def trains(self, key: BlockKey) -> bool:
        return self.trained

    def acquire(self, key: BlockKey) -> None:
        self.visits.append(key.index)
        self._away = []
        self._start = (self._start + 517) % 1000
        start = self._start
        for home, name, _, value in self._values[key.index]:
            view = self._slab[start : start + value.numel()].view(value.shape).data.copy_(value)
            start += value.numel() + 3
            self._away.append((home, name, home[name]))
            is_parameter = isinstance(home[name], nn.Parameter)
            home[name] = nn.Parameter(view, requires_grad=self.trained) if is_parameter else view

    def release(self, key: BlockKey) -> None:
        for (home, name, path, _), (_, _, placeholder) in zip(self._values[key.index], self._away, strict=True):
            if home[name].grad is not None:
                self.taken[f"blocks.{key.index}.{path}"] = home[name].grad
            home[name] = placeholder
        self._slab.fill_(float("nan"))


def inputs_of(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(9)
    return [{"x": torch.randn(1 + i, 3 + 2 * i, 2, generator=generator)} for i in range(count)]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_the_bits_are_those_of_plain_autograd(kept, trained, model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained or ".a." in name or ".b." in name or "first" in name)
    inputs, seeds = inputs_of(3), [5, 6, 7]
    total, grads = expected_of(model, inputs, seeds)
    weights = Moving(model, trained)
    engine = Engine(model, model.blocks, weights, Activations(), kept_graphs=kept)
    for _ in range(2):
        model.zero_grad()
        weights.taken.clear()
        assert engine.train_step(inputs, seeds, backward).equal(total)
        found = weights.taken | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            assert found[name].equal(grad), name


def test_what_is_kept_is_not_computed_again(model):
    model.requires_grad_(False)
    model.first.requires_grad_(True)
    calls: list[int] = []
    for index, block in enumerate(model.blocks):
        block.norm.register_forward_hook(lambda *_, index=index: calls.append(index))
    weights = Moving(model)
    Engine(model, model.blocks, weights, Activations(), kept_graphs=3).train_step(inputs_of(2), [1, 2], backward)
    assert weights.visits == [0, 1, 2, 3, 3, 2, 1, 0]  # backward needs the weights
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]


def test_nothing_stays_behind_a_step(model):
    """Neither tensors nor, in a graph, weights."""
    model.requires_grad_(True)
    weights = Moving(model, trained=True)
    engine = Engine(model, model.blocks, weights, Activations(), kept_graphs=4)
    bound: list[weakref.ref] = []
    acquire = weights.acquire

    def watching(key):
        acquire(key)
        weight = model.blocks[key.index].up._parameters["weight"]
        weight.data = weight.detach().clone()  # as decoded weights are, in memory of their own
        bound.append(weakref.ref(weight.untyped_storage()))

    weights.acquire = watching

    def lost(outputs):
        gc.collect()
        assert len(bound) == 4 and not any(one() for one in bound)
        return backward(outputs)

    def count() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    engine.train_step(inputs_of(3), [1, 2, 3], lost)
    model.zero_grad()
    weights.taken.clear()
    before = count()
    for _ in range(3):
        bound.clear()
        engine.train_step(inputs_of(3), [1, 2, 3], lost)
        model.zero_grad()
        weights.taken.clear()
    assert count() == before


class SavesItsOutput(Block):
    def forward(self, x, shared):
        y, more = super().forward(x, shared)
        return torch.tanh(y), more


def test_a_model_may_overwrite_what_a_graph_has_saved():
    """As where it is recomputed. Plain autograd refuses it."""
    torch.manual_seed(0)
    model = Model(block=SavesItsOutput)
    found, values = [], model.state_dict()
    for kept in (0, 4):
        model = Model(block=SavesItsOutput)
        model.load_state_dict(values)
        engine = Engine(model, model.blocks, Moving(model), Activations(), kept_graphs=kept)
        engine.train_step(inputs_of(1), [3], backward)
        found.append(model.first.weight.grad)
    assert found[0].equal(found[1])


class OverwritesItsOwn(Block):
    def forward(self, x, shared):
        y = torch.exp(x)
        z = x + self.down(self.up(y))
        y += 1
        return z, {"side": z.mean()}


def test_a_block_that_overwrites_what_it_saved_is_refused_as_by_plain_autograd():
    model = Model(block=OverwritesItsOwn)
    engine = Engine(model, model.blocks, Moving(model), Activations(), kept_graphs=4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.train_step(inputs_of(1), [3], backward)


class _KeepsByItself(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight.t()
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.t(), None


class KeepsByItself(Block):
    def forward(self, x, shared):
        y, more = super().forward(x, shared)
        return y + self.down(_KeepsByItself.apply(y, self.up.weight)), more


def test_a_function_that_keeps_weights_where_no_hook_sees_them_is_recomputed():
    torch.manual_seed(0)
    model = Model(block=KeepsByItself)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".a." in name or ".b." in name or "first" in name)
    inputs, seeds = inputs_of(2), [5, 6]
    total, grads = expected_of(model, inputs, seeds)
    engine = Engine(model, model.blocks, Moving(model), Activations(), kept_graphs=4)
    assert engine.train_step(inputs, seeds, backward).equal(total)
    for name, parameter in model.named_parameters():
        assert name not in grads or parameter.grad.equal(grads[name]), name
