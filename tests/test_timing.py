"""Visits that are run to be timed: they are the blocks' own, and nothing remembers them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import make_config, save_tiny

from finetune.methods.base import make_method
from finetune.offload.sizing.needs import DECODED, PROCESS
from finetune.offload.sizing.timing import Workload, time_visits
from finetune.offload.weights.formats import PlainTensor
from finetune.planned_run import BatchShape
from finetune.prediction import predict_step, with_prediction
from finetune.session import Session

pytestmark = pytest.mark.timed

CASES = {
    "lora": {},
    "dora": {"lora": {"use_dora": True, "dropout": 0.1}},
    "lora over packed weights": {"quantize": "nf4"},
    "full": {"method": "full"},
    "lisa": {"method": "lisa", "selection": {"layers": 2}},
    "zo": {"method": "zo", "zo": {"perturbations": 2}},
    "zo, products": {"method": "zo", "zo": {"noise": "low_rank", "perturb": "products"}},
    "fzoo": {"method": "zo", "zo": {"estimator": "fzoo", "perturbations": 3, "noise": "gaussian"}},
    "a device": {"device": "simulated"},
    "a head in chunks": {"engine": {"loss_tile_vocab": 40}},
    "a packed base on a device": {"device": "simulated", "quantize": "int8"},
    "chunks of a text": {"engine": {"sequence_chunk": 6}},
    "bf16": {"engine": {"dtype": "bfloat16"}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def planned_session(model, folder, monkeypatch, **changes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    if "method" in changes:
        changes["lora"] = {}
    session = Session(make_method(make_config(model, None, folder / "out", **changes)))
    return session, session.plan(BatchShape.of_text(2, 20, 6, session.setup.has_gradients))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_step_of_every_method_is_predicted_from_its_own_visits(changes, model, tmp_path, monkeypatch):
    session, planned = planned_session(model, tmp_path, monkeypatch, **changes)
    try:
        before = torch.get_rng_state(), [p.clone() for p in session.trainable]
        found = with_prediction(session, planned)
        assert found.timing is not None and len(found.timing.blocks) == len(session.parts.blocks)
        trains = session.setup.has_gradients
        for block in found.timing.blocks:
            assert block.forward.first > 0 and (block.backward.first > 0) == (block.recomputed.first > 0) == trains
        step, timing = predict_step(found, found.rates, found.timing), found.timing
        least = [min(block.forward.first, block.forward.other) for block in timing.blocks]
        visits = 6 * sum(least) + sum(block.backward.of(6) for block in timing.blocks)
        if changes.get("method") != "lisa":  # where backward ends early
            assert step.seconds >= 0.9 * visits
        assert "a step takes about" in found.describe()
        assert torch.equal(torch.get_rng_state(), before[0])
        for p, kept in zip(session.trainable, before[1], strict=True):
            assert p.grad is None
            torch.testing.assert_close(p.detach(), kept.detach(), rtol=0, atol=0, equal_nan=True)
        for block in session.parts.blocks:
            assert all(p.device.type == "cpu" and p.grad is None for p in block.parameters())
    finally:
        session.close()


@pytest.mark.parametrize("rooms", [False, True])
def test_weights_that_stay_decoded_are_decoded_by_the_first_lane_alone(rooms, tmp_path, monkeypatch):
    """bf16 in the file, fp32 in products."""
    monkeypatch.setattr("finetune.offload.weights.binding.LAZY_MIN_BYTES", 1)
    changes = {"engine": {"dtype": "float32"}, "lora": {"target_modules": ["q_proj"]}}
    stored = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    session, planned = planned_session(stored, tmp_path, monkeypatch, **changes)
    decoded, decode = [], PlainTensor.decode

    def counting(self, stored, dtype, out=None):
        decoded.append(out is not None)
        return decode(self, stored, dtype, out)

    monkeypatch.setattr(PlainTensor, "decode", counting)
    plan = planned.plan
    if not rooms:
        plan = replace(plan, slots={n: s for n, s in plan.slots.items() if not n.startswith(DECODED)})
    try:
        lazy = len(session.parts.bindings[0].lazy_bytes)
        work = Workload(session.parts, session.model, plan, planned.shape.inputs, train=False, trained=None, lanes=2)
        time_visits(work, session.device)
        visits = decoded.count(True) / lazy
        assert lazy and (visits in (3, 4, 5) if rooms else not visits)
    finally:
        session.close()


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_experts_run_too(device, tmp_path, monkeypatch):
    stored = save_tiny("mixtral", tmp_path / "model")
    session, planned = planned_session(stored, tmp_path, monkeypatch, device=device, lora={"target_modules": ["q_proj"]})
    try:
        assert session.parts.experts
        found = with_prediction(session, planned)
        assert found.timing is not None and all(block.forward.first > 0 for block in found.timing.blocks)
        assert session.device.peak_bytes() == 0  # nothing stays there
        assert all(matrices.near is None for matrices in session.parts.experts)
    finally:
        session.close()


def test_a_visit_that_would_take_long_is_not_run(model, tmp_path, monkeypatch):
    session, planned = planned_session(model, tmp_path, monkeypatch)
    try:
        monkeypatch.setattr("finetune.prediction.MOST_SECONDS", 0.0)
        found = with_prediction(session, planned)
        assert found.timing is None and found.rates and "a step takes about" in found.describe()
        assert not found.untimed
    finally:
        session.close()


def test_a_visit_is_not_run_where_the_budget_has_no_room_for_it_yet(model, tmp_path, monkeypatch):
    """The C library's allocator takes up to three times what is alive, and there is no arena yet."""
    session, planned = planned_session(model, tmp_path, monkeypatch)
    try:
        least = planned.plan.host_parts[PROCESS] + 3 * planned.batch.visit.peak_bytes + max(planned.streamed.block_bytes)
        for budget_bytes, runs in ((least, True), (least - 1, False)):
            limited = replace(planned, plan=replace(planned.plan, host_budget_bytes=budget_bytes))
            assert (with_prediction(session, limited).timing is not None) == runs
    finally:
        session.close()


def test_blocks_that_cannot_be_run_by_themselves_are_named(model, tmp_path, monkeypatch):
    """What is predicted then comes from products alone, and says so."""
    session, planned = planned_session(model, tmp_path, monkeypatch)
    try:

        def fail(*_, **__):
            raise KeyError("no such shape")

        monkeypatch.setattr(session.parts.blocks[0], "forward", fail)
        found = with_prediction(session, planned)
        assert found.timing is None and predict_step(found, found.rates).seconds > 0
        assert "GFLOP/s (its blocks could not be run by themselves: KeyError: 'no such shape')" in found.describe()
    finally:
        session.close()
