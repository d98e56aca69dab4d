"""What a plan says before a run: how long a step takes."""

from __future__ import annotations

import pytest
from tiny_models import make_config, save_tiny

import finetune.offload.rates.disk
from finetune.methods.base import make_method
from finetune.offload.residency.io import FaultPlan, IOEngine
from finetune.offload.sizing.calibration import Rates
from finetune.planned_run import BatchShape
from finetune.prediction import predict_step
from finetune.session import Session
from finetune.setup import Setup
from finetune.trainer import Trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("train, kept_graphs", [(False, None), (True, 0), (True, None)])
def test_the_slower_of_disk_and_compute_sets_the_time(model, tmp_path, train, kept_graphs):
    engine = {"resident_blocks": 0, "lookahead": 1, "kept_graphs": kept_graphs}
    config = make_config(model, None, tmp_path, engine=engine)
    session = Session(make_method(config) if train else Setup(config))
    planned = session.plan(BatchShape.of_text(2, 300, 3, train))
    session.close()
    layouts = planned.parts.layouts
    blocks = len(layouts)
    block_bytes = sum(layout.num_bytes for layout in layouts) / blocks
    reads = predict_step(planned, Rates(1e3, 1e18)).seconds * 1e3 / block_bytes
    # Blocks that are in slots where a pass turns, and where the next step begins, are not read again.
    assert (2 * blocks - 5 if train else blocks) - 0.01 <= reads <= (2 if train else 1) * blocks + 0.01
    weights = sum(view.shape[0] * view.shape[1] for x in layouts for view in x.views.values() if len(view.shape) == 2)
    products = predict_step(planned, Rates(1e18, 1e6)).seconds * 1e6 / (2 * weights * 3 * 2 * 300)
    # Forward; the gradient of the input; recomputation. Scores of attention and the head are more.
    least = 1 if not train else 2.5 if kept_graphs == 0 else 2
    assert least <= products <= 2 * least and (products < 2.5 or kept_graphs == 0)


def test_a_plan_says_how_long_a_step_takes(model, tmp_path):
    planned = Trainer(make_config(model, None, tmp_path, training={"max_steps": 7, "batch_size": 3})).plan()
    at, pace, run = planned.describe().splitlines()[-3:]
    assert at.startswith("a step takes about 0.") and "measured on this machine" in at and "tokens a second" in at
    assert pace.endswith(f"{'compute' if planned.values['slowest'] == 'compute' else 'the disk'} sets the pace")
    assert run.startswith("  all 7 steps: about ")
    values = planned.values
    assert values["run_seconds"] == pytest.approx(7 * values["step_seconds"])
    assert values["tokens_per_second"] * values["step_seconds"] == pytest.approx(3 * 32)


def test_a_plan_says_why_it_has_no_time(model, tmp_path, monkeypatch):
    faulty = IOEngine("threads", inject=FaultPlan(eio_at=1))
    monkeypatch.setattr(finetune.offload.rates.disk, "IOEngine", lambda *_: faulty)
    last = Trainer(make_config(model, None, tmp_path)).plan().describe().splitlines()[-1]
    assert (
        last.startswith("no time of a step is predicted, because the model cannot be read here: ") and "safetensors" in last
    )
