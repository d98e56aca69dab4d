"""Experts that are trained one by one, from the outside: stops, damage, what a run leaves, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import data, data_prepared_here  # noqa: F401  fixtures
from test_zeroth_order import assert_same_weights, weights
from text_models import StopAfter, make_config, write_model

import finetune.offload.update.units
from finetune import Config, Trainer
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.generate import generate
from finetune.memory.errors import UserError
from finetune.offload.update.store import read_manifest


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(finetune.offload.update.units, "PIECE_BYTES", 4096)


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory) -> Path:
    return write_model("mixtral", tmp_path_factory.mktemp("mixtral") / "bfloat16", dtype=torch.bfloat16)


def config_of(model: Path, rows: str, output: Path, **changes: Any) -> Config:
    training = {"max_steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2} | changes.pop("training", {})
    engine = {"dtype": "bfloat16", "expert_slots": 2} | changes.pop("engine", {})
    return make_config(model, output, data=rows, training=training, engine=engine, **{"method": "full"} | changes)


RUNS = {
    "full": {},
    "exact clipping": {"optimizer": {"clipping": "exact"}},
    "no master, 8 bit": {"optimizer": {"master": "none", "state": "8bit"}},
    "bf16 state, beside an accelerator": {"optimizer": {"state": "bfloat16"}, "device": "simulated"},
    "one version": {"optimizer": {"versions": 1}},
    "lisa": {"method": "lisa", "selection": {"interval": 2, "layers": 1}},
    "frugal": {"method": "frugal", "selection": {"interval": 2, "layers": 1, "sign_scale": 0.1}},
    "adafactor, whose experts stay in their blocks": {"optimizer": {"name": "adafactor"}, "engine": {"expert_slots": None}},
}


@pytest.mark.every(4)
@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_stopped_run_goes_on_wherever_experts_are(changes, mixtral, data, tmp_path):  # noqa: F811
    """What is rounded at random is so by element, not by place: other numbers of slots, the same bits."""
    whole = config_of(mixtral, data, tmp_path / "whole", **changes)
    Trainer(whole).train()
    more = dict(changes, engine={"expert_slots": None, "resident_blocks": 1})
    parts = config_of(mixtral, data, tmp_path / "parts", **more)
    Trainer(parts, callbacks=[StopAfter(3)]).train()
    result = Trainer(parts.model_copy(update={"resume": True})).train()
    assert result.report["first_step"] == 3
    export(whole, tmp_path / "a")
    export(parts, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    before, after = weights(mixtral), weights(tmp_path / "a")
    assert any(not value.equal(before[name]) for name, value in after.items() if "experts" in name)


@pytest.mark.parametrize("method", ["full", "lisa", "zo"])
def test_what_a_run_leaves_is_what_it_exports(method, mixtral, data, tmp_path):  # noqa: F811
    of_method: dict[str, Any] = {"selection": {"interval": 1, "layers": 1}} if method == "lisa" else {}
    if method == "zo":  # whose weights are fp32 until they are exported
        mixtral = write_model("mixtral", tmp_path / "float32")
        of_method = {"zo": {"fold_steps": 4}, "training": {"learning_rate": 1e-3}, "engine": {"dtype": "float32"}}
    config = config_of(mixtral, data, tmp_path / "out", method=method, **of_method)
    Trainer(config).train()
    export(config, tmp_path / "model")
    answers = []
    for model, run in ((mixtral, config.output), (tmp_path / "model", None)):
        measured = make_config(model, tmp_path / f"eval {run is None}", eval_data=data)
        loss = evaluate(measured, run)["loss"]
        answers.append((loss, "".join(generate(measured, run, ["the cat", "hello"], max_new_tokens=4))))
    assert answers[0] == answers[1]
    assert answers[0][0] != evaluate(make_config(mixtral, tmp_path / "plain", eval_data=data))["loss"]


@pytest.mark.parametrize("part", ["weights", "state"])
def test_a_flipped_bit_of_an_expert_is_found(part, mixtral, data, tmp_path):  # noqa: F811
    config = config_of(mixtral, data, tmp_path / "out")
    Trainer(config, callbacks=[StopAfter(2)]).train()
    store = config.output / "store"
    name, _, offset, weights_bytes, master_bytes, state_offset, *_ = next(
        piece for piece in read_manifest(store)["pieces"] if piece[0].endswith("down_proj[2]")
    )
    with open(store / "data", "r+b") as file:
        file.seek((offset if part == "weights" else state_offset) + 2050)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    with pytest.raises(UserError, match=r"down_proj\[2\].*checksum"):
        Trainer(config.model_copy(update={"resume": True})).train()
    if part == "weights":
        with pytest.raises(UserError, match=r"down_proj\[2\].*checksum"):
            evaluate(make_config(mixtral, tmp_path / "eval", eval_data=data), config.output)
