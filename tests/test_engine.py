"""The engine: lanes, visits and recomputation on small modules, against autograd over the whole."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

from finetune.offload.step.activations import Activations, SavedTensor
from finetune.offload.step.engine import Engine
from finetune.offload.step.weights import Block as BlockKey

WIDTH = 6


class Block(nn.Module):
    """Two outputs, dropout inside, an input of its own beside one that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.side = nn.Linear(WIDTH, 3)

    def forward(self, x, shared, flag=None):
        y = x + functional.dropout(torch.tanh(self.linear(x)), 0.3, self.training) * shared
        return y, {"side": self.side(y.clone()), "flag": flag}


class Model(nn.Module):
    """Work between blocks: in-place writes, a residual over two blocks, side outputs in the loss, a block left out."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(2, WIDTH)
        self.shared = nn.Parameter(torch.rand(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))

    def forward(self, x, skip=None):
        shared = self.shared * 2
        x = functional.dropout(self.first(x), 0.2, self.training)
        kept, sides = x, []
        for index, block in enumerate(self.blocks):
            if index == skip:
                continue
            x, more = block(x, shared, flag=index)
            assert more["flag"] == index
            sides.append(more["side"].pow(2).mean())
            if index == 1:
                x = x + kept
            x += 0.5
        return x.mean() + torch.stack(sides).sum()


class Weights:
    """Checks the protocol: one block at a time, between begin and the end."""

    def __init__(self) -> None:
        self.held: BlockKey | None = None
        self.visits: list[int] = []
        self.variants: list[int] = []

    def begin(self, order) -> None:
        self.order = list(order)

    def enter(self, variant: int) -> None:
        self.variants.append(variant)

    def acquire(self, key: BlockKey) -> None:
        assert self.held is None
        self.held = key
        self.visits.append(key.index)

    def release(self, key: BlockKey) -> None:
        assert self.held == key
        self.held = None

    def trains(self, key: BlockKey) -> bool:
        return False


def backward(outputs):
    total = torch.zeros(())
    for loss in outputs:
        loss.backward()
        total = total + loss.detach()
    return total


def expected_of(model: Model, inputs, seeds):
    model.zero_grad()
    total = torch.zeros(())
    for kwargs, seed in zip(inputs, seeds, strict=True):
        torch.manual_seed(seed)
        loss = model(**kwargs)
        loss.backward()
        total = total + loss.detach()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return total, grads


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def inputs_of(count: int, skips=()) -> list[dict]:
    generator = torch.Generator().manual_seed(9)
    inputs = [{"x": torch.randn(1 + i, 3 + 2 * i, 2, generator=generator)} for i in range(count)]
    for lane, skip in enumerate(skips):
        inputs[lane]["skip"] = skip
    return inputs


@pytest.mark.parametrize("skips", [(), (1, None, 3), (0, 2, 2)])
def test_loss_and_gradients_are_those_of_plain_autograd(skips, model):
    inputs, seeds = inputs_of(3, skips), [5, 6, 7]
    total, grads = expected_of(model, inputs, seeds)
    weights = Weights()
    engine = Engine(model, model.blocks, weights, Activations())
    for _ in range(2):
        model.zero_grad()
        weights.visits.clear()
        assert engine.train_step(inputs, seeds, backward).equal(total)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-5, atol=1e-7)
        assert weights.visits == [0, 1, 2, 3, 3, 2, 1, 0]  # once a pass, whatever the number of lanes
        assert weights.order == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]
    engine.close()
    assert expected_of(model, inputs, seeds)[0].equal(total)


def test_backward_stops_at_the_lowest_trainable_block(model):
    model.requires_grad_(False)
    model.blocks[2].linear.requires_grad_(True)
    weights = Weights()
    engine = Engine(model, model.blocks, weights, Activations())
    engine.train_step(inputs_of(2), [1, 2], backward)
    assert weights.visits == [0, 1, 2, 3, 3, 2]
    assert model.blocks[2].linear.weight.grad is not None and model.blocks[1].linear.weight.grad is None


def test_forward_only_needs_no_graph_and_keeps_nothing(model):
    model.eval()
    engine = Engine(model, model.blocks, Weights(), Activations())
    found = engine.forward(inputs_of(2))
    engine.close()
    with torch.no_grad():
        for value, kwargs in zip(found, inputs_of(2), strict=True):
            assert not value.requires_grad and value.equal(model(**kwargs))


def test_variants_share_a_visit_and_are_entered_before_their_lanes_run(model):
    """The weights of a variant, in and outside of blocks, are those that its lanes meet."""
    model.eval()
    plain = [[p.detach().clone() for p in model.parameters()], [p.detach() * 1.5 for p in model.parameters()]]

    class TwoVariants(Weights):
        def enter(self, variant: int) -> None:
            super().enter(variant)
            for parameter, value in zip(model.parameters(), plain[variant], strict=True):
                parameter.data = value

    weights = TwoVariants()
    engine = Engine(model, model.blocks, weights, Activations())
    found = engine.forward(inputs_of(2) * 2, variants=[0, 0, 1, 1])
    engine.close()
    assert weights.visits == [0, 1, 2, 3]
    with torch.no_grad():
        for variant in (0, 1):
            weights.enter(variant)
            for i, kwargs in enumerate(inputs_of(2)):
                assert found[2 * variant + i].equal(model(**kwargs))
    assert not found[0].equal(found[2])


def test_saved_inputs_are_all_released(model):
    saved: list[SavedTensor] = []

    class Recording(Activations):
        def save(self, tensor):
            saved.append(super().save(tensor))
            return saved[-1]

    engine = Engine(model, model.blocks, Weights(), Recording())
    engine.train_step(inputs_of(3), [1, 2, 3], backward)
    assert saved and all(one.users == 0 and one._tensor is None for one in saved)
    shared = [one for one in saved if one.num_bytes == WIDTH * 4]
    assert len(shared) == 3  # a tensor given to every block is kept once a lane


def test_steps_leave_no_tensors_behind(model):
    engine = Engine(model, model.blocks, Weights(), Activations())
    model.requires_grad_(True)

    def count() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    engine.train_step(inputs_of(3), [1, 2, 3], backward)
    before = count()
    for _ in range(3):
        engine.train_step(inputs_of(3), [1, 2, 3], backward)
    assert count() == before


def test_a_block_outside_the_engine_is_refused(model):
    engine = Engine(model, model.blocks, Weights(), Activations())
    with pytest.raises(RuntimeError, match="called outside the engine"):
        model(**inputs_of(1)[0])
    engine.close()


def test_an_error_inside_a_lane_comes_out(model):
    engine = Engine(model, model.blocks, Weights(), Activations())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.train_step([{"x": torch.ones(2, 3, 5)}], [1], backward)
    assert torch.is_grad_enabled()
