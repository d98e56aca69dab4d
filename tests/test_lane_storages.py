"""Lanes that are on disk while they wait: small modules against autograd over the whole, and what is in memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_engine import Model, Weights, backward, expected_of, inputs_of, model  # noqa: F401  a fixture
from torch import nn

import finetune.offload.step.activations
from finetune.memory.slots import Slab
from finetune.offload.devices.base import map_host_bytes
from finetune.offload.residency.io import FaultPlan, IOEngine
from finetune.offload.step.activations import Activations
from finetune.offload.step.engine import Engine
from finetune.offload.step.lane_storages import LaneActivations, LaneStorages

SLOT_BYTES = 4096


@pytest.fixture(autouse=True)
def small_tensors_go_to_disk(monkeypatch):
    monkeypatch.setattr(finetune.offload.step.activations, "SPILL_MIN_BYTES", 1)


@pytest.fixture(params=["threads", "auto"])
def store(request, tmp_path) -> Iterator[LaneActivations]:
    with IOEngine(request.param, request_bytes=4096, inject=FaultPlan(short_every=3, short_bytes=512)) as io:
        pool = Slab(map_host_bytes(4 * SLOT_BYTES)).carve("a", SLOT_BYTES, 4)
        found = LaneActivations(io, pool, torch.device("cpu"), tmp_path)
        yield found
        found.close()
        assert pool.free_count == 4


def storages_of(store: LaneActivations, whole: nn.Module) -> LaneStorages:
    inside = {module for block in whole.blocks for module in block.modules()}
    return LaneStorages(store, [module for module in whole.modules() if module not in inside], 1)


@pytest.mark.parametrize("kept", [0, 2])
def test_steps_are_those_of_the_plain_loop(kept, model, store):  # noqa: F811
    """In-place writes, a residual over two blocks, a block that one lane leaves out, side outputs in the loss."""
    inputs = [*inputs_of(3), {**inputs_of(4)[3], "skip": 2}]
    seeds = [1, 2, 3, 4]
    model.requires_grad_(True)
    loss, _ = expected_of(model, inputs, seeds)
    engine = Engine(model, model.blocks, Weights(), Activations())
    engine.train_step(inputs, seeds, backward)  # the order in which `shared` gets its gradients is the engine's
    engine.close()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    engine = Engine(model, model.blocks, Weights(), store, kept_graphs=kept)
    storages = storages_of(store, model)
    for _ in range(2):
        storages.begin_step(inputs, lambda lane: None)
        found = engine.train_step(inputs, seeds, backward, storages=storages)
        assert found.equal(loss)
        for name, parameter in model.named_parameters():
            assert parameter.grad.equal(grads[name]), name
            parameter.grad = None
    del found
    engine.close()
    storages.begin_step([], lambda lane: None)


class Plain(nn.Module):
    """Of wide blocks; a table that is made once stays for all lanes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(40, 40) for _ in range(3))
        self.table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(40.0) * 2
        x = x + self.table
        for block in self.blocks:
            x = block(x) * self.table
        return x.mean()


def test_only_the_lane_that_runs_is_in_memory(store):
    torch.manual_seed(0)
    model, near = Plain(), []  # noqa: F811
    inputs = [{"x": torch.randn(30, 40)} for _ in range(9)]
    loss, grads = expected_of(model, inputs, range(9))
    model.table = None
    storages = storages_of(store, model)
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda *_: near.append({one.lane for one in storages._known.values() if one.is_near})
        )
    engine = Engine(model, model.blocks, Weights(), store)
    storages.begin_step(inputs, lambda lane: None)
    begun = []
    storages.begin_lane = begun.append
    assert engine.train_step(inputs, range(9), backward, storages=storages).equal(loss)
    assert all(parameter.grad.equal(grads[name]) for name, parameter in model.named_parameters())
    assert begun == list(range(9)) and not storages._known
    assert near and all(len(lanes) <= 1 for lanes in near)
    with torch.no_grad():
        expected = [float(output) for output in engine.forward(inputs)]
    storages.begin_step(inputs, lambda lane: None)
    outputs = engine.forward(inputs, storages=storages)
    with storages.guarded():
        assert [float(output) for output in outputs] == expected
    engine.close()


def test_what_is_written_into_goes_to_disk_again(store):
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Identity(), nn.ReLU(inplace=True), nn.Identity()])

        def forward(self, x):
            early = x * 1
            first = self.blocks[0](early)
            first.add_(1)  # what waited is changed by the lane
            second = self.blocks[1](first)  # and by a block
            return self.blocks[2](second) + first + early

    model = Writes()  # noqa: F811
    inputs = [{"x": torch.randn(50, 40)} for _ in range(5)]
    with torch.no_grad():
        expected = [model(**one) for one in inputs]
    engine, storages = Engine(model, model.blocks, Weights(), store), storages_of(store, model)
    storages.begin_step(inputs, lambda lane: None)
    outputs = engine.forward(inputs, storages=storages)
    with storages.guarded():
        assert all(torch.equal(found, wanted) for found, wanted in zip(outputs, expected, strict=True))
    engine.close()


def test_a_failed_step_gives_its_slots_back(model, store, monkeypatch):  # noqa: F811
    engine, storages = Engine(model, model.blocks, Weights(), store), storages_of(store, model)
    storages.begin_step(inputs_of(3), lambda lane: None)

    def fail(outputs):
        raise ArithmeticError("no loss")

    with pytest.raises(ArithmeticError):
        engine.train_step(inputs_of(3), [1, 2, 3], fail, storages=storages)
    loss, _ = expected_of_again(model, engine)
    storages.begin_step(inputs_of(3), lambda lane: None)
    assert engine.train_step(inputs_of(3), [1, 2, 3], backward, storages=storages).equal(loss)
    engine.close()
    storages.begin_step([], lambda lane: None)


def expected_of_again(model: Model, engine: Engine):  # noqa: F811
    wrapped = [block.__dict__.pop("forward") for block in model.blocks]
    found = expected_of(model, inputs_of(3), [1, 2, 3])
    for block, forward in zip(model.blocks, wrapped, strict=True):
        block.forward = forward
    return found
