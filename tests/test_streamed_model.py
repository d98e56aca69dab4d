"""How a streamed model is composed: any policy holds the same weights, and a step makes small what the model is handed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from text_models import VOCAB, make_config, plain_model, write_model

from finetune.methods.base import make_method
from finetune.offload.step.own_loss import TiledLoss
from finetune.offload.streamed_model import Options, StreamedModel
from finetune.planned_run import BatchShape
from finetune.session import Session

SEEDS = [1, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def batches() -> tuple[list[dict], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCAB, (2, length), generator=generator) for length in (9, 7)]
    return [{"input_ids": one, "use_cache": False} for one in ids], ids


def session_of(model: Path, output: Path, method: str, **engine: int) -> Session:
    config = make_config(model, output, data="none", method=method, engine=engine, learning_rate=1e-3)
    return Session(make_method(config))


@pytest.mark.parametrize("engine", [{}, {"loss_tile_vocab": 100}], ids=["one chunk", "chunks"])
def test_policies_hold_the_same_weights(engine, model, batches, tmp_path):
    """Where nothing is perturbed, moved or trained yet: the same bits under each, near the plain model's loss."""
    inputs, labels = batches
    found = {}
    for method in ("lora", "zo", "full"):
        session = session_of(model, tmp_path / method, method, **engine)
        try:
            plan = session.plan(BatchShape.of_text(2, 9, 2, train=method != "zo"))
            streamed = session.open(plan, tmp_path / method / "scratch")
            found[method] = streamed.step_losses(inputs, labels)
        finally:
            session.close()
    assert found["lora"].losses.equal(found["zo"].losses) and found["lora"].losses.equal(found["full"].losses)
    plain, total, count = plain_model(model), 0.0, 0
    for batch, label in zip(inputs, labels, strict=True):
        items = label[:, 1:].numel()
        with torch.no_grad():
            total += float(plain(**batch, labels=label).loss) * items
        count += items
    assert found["lora"].num_items == count
    assert found["lora"].losses.item() == pytest.approx(total / count, rel=1e-5)


class Twice(TiledLoss):
    def backward(self, outputs, inputs, watched):
        for output in outputs:
            output.loss = output.loss * 2.0
        return super().backward(outputs, inputs, watched)


def test_a_step_makes_small_what_the_model_is_handed(model, batches, tmp_path):
    results = []
    for options in ({}, {"make_loss": Twice}):
        session = session_of(model, tmp_path, "lora")
        plan = session.plan(BatchShape.of_text(2, 9, 2, train=True)).plan
        streamed = StreamedModel(
            session.parts, plan, session.device, Options(tmp_path / "scratch"), model=session.model, **options
        )
        try:
            loss = streamed.train_step(*batches, SEEDS)
            results.append([loss, *(p.grad for p in session.trainable if p.grad is not None)])
        finally:
            streamed.close()
    own, twice = results
    assert len(own) == len(twice) > 1 and any(grad.any() for grad in own[1:])
    assert all(b.equal(2 * a) for a, b in zip(own, twice, strict=True))


def test_a_session_that_fails_to_close_gives_up_its_files(model, tmp_path, monkeypatch):
    """Else no other run could be there before the process ends."""

    def fail(self: StreamedModel) -> None:
        raise OSError(5, "Input/output error")

    closed = []
    session = session_of(model, tmp_path, "zo")
    session.open(session.plan(BatchShape.of_text(2, 9, 2, train=False)), tmp_path / "scratch")
    streamed = session.streamed
    monkeypatch.setattr(session.setup, "close", lambda: closed.append(True))
    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "close", fail)
        with pytest.raises(OSError, match="Input"):
            session.close()
    assert closed
    streamed.close()
