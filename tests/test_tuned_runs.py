"""What a run has tuned, measured: in the middle of the run, after it, and once it is exported."""

from __future__ import annotations

import gc
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_resume import data, data_prepared_here, models  # noqa: F401  fixtures
from text_models import StopAfter, make_config, write_rows

import finetune.offload.update.units
import finetune.offload.weights.parts
import finetune.one_run
from finetune import Config, Trainer
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.generate import generate
from finetune.memory.errors import UserError
from finetune.memory.meter import host_bytes
from finetune.methods.base import make_method
from finetune.offload.update.store import read_manifest
from finetune.runs.listing import find_runs
from finetune.session import Session

LOW_RANK = {"noise": "low_rank", "rank": 4, "perturb": "products"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"r": 3, "dropout": 0.1}},
    "zo": {"method": "zo", "zo": {"fold_steps": 1}},
    "zo, products": {"method": "zo", "zo": LOW_RANK | {"fold_steps": 2}},
    "zo, lora": {"method": "zo", "zo": {"parameters": "lora"}, "lora": {"r": 3}},
    "zo, prefix": {"method": "zo", "zo": {"parameters": "prefix"}},
    "full": {"method": "full"},
    "lisa": {"method": "lisa", "selection": {"interval": 1, "layers": 1}},
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """So that this model too has embedding rows that are read on demand, and several pieces a unit."""
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    monkeypatch.setattr(finetune.offload.update.units, "PIECE_BYTES", 8192)


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory) -> str:
    """Not the training rows: other tokens, other lengths."""
    rows = [{"prompt": f"{'hello there ' * (i % 4)}what is it", "completion": " about the world"} for i in range(7)]
    return write_rows(tmp_path_factory.mktemp("other") / "rows.jsonl", rows)


def run_config(model: Path, rows: str, output: Path, method: str, **changes: Any) -> Config:
    training = {"max_steps": 4, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3, "save_steps": 2}
    return make_config(model, output, data=rows, training=training | changes.pop("training", {}), **METHODS[method], **changes)


def measured(config: Config, rows: str, folder: Path) -> float:
    """The loss of what a run has left: of its adapter, or of the model that it exports."""
    model, adapter = config.model, None
    if make_method(config).adapter_directory:
        adapter = config.output / "adapter"
    else:
        model = folder / "exported"
        export(config, model)
    return evaluate(make_config(model, folder / "evaluated", eval_data=rows), adapter)["loss"]


@pytest.mark.every(3)
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_in_the_run_is_that_of_what_it_has_tuned_so_far(
    method, models, data, other_rows, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    model, inside = models["float32"], []

    def recorded(*arguments):
        inside.append(evaluate_open(*arguments)["loss"])
        return {"loss": inside[-1]}

    evaluate_open = finetune.one_run.evaluate_open
    monkeypatch.setattr(finetune.one_run, "evaluate_open", recorded)
    whole = run_config(model, data, tmp_path / "whole", method, eval_data=other_rows, training={"eval_steps": 2})
    Trainer(whole).train()
    parts = run_config(model, data, tmp_path / "parts", method)
    Trainer(parts, callbacks=[StopAfter(2)]).train()
    at_two = measured(parts, other_rows, tmp_path / "two")
    Trainer(parts.model_copy(update={"resume": True})).train()
    at_four = measured(parts, other_rows, tmp_path / "four")
    assert at_two != at_four
    assert inside[0] == pytest.approx(at_two, rel=2e-6) and inside[-1] == pytest.approx(at_four, rel=2e-6)
    losses = [[json.loads(line)["loss"] for line in (c.output / "metrics.jsonl").open()] for c in (whole, parts)]
    assert losses[0] == losses[1]


TUNED = [("lora", "float32"), ("zo", "float32"), ("zo", "bfloat16"), ("full", "bfloat16"), ("lisa", "float32")]


@pytest.mark.every(3)
@pytest.mark.parametrize(("method", "dtype"), TUNED)
def test_a_run_is_measured_and_speaks_without_an_export(method, dtype, models, data, other_rows, tmp_path):  # noqa: F811
    """And the process is after each part as it was before: it trains again, within the same plan."""
    config = run_config(models[dtype], data, tmp_path / "run", method, eval_data=other_rows, engine={"lookahead": 0})
    trainer = Trainer(config)
    first, held = trainer.train().report, gc.get_objects()
    assert not [one for one in held if isinstance(one, Session)]
    held_bytes = host_bytes()
    del held
    found = trainer.evaluate()["loss"]
    again = Config.load(config.output, {"eval_data": other_rows})  # of which nothing else need be named
    assert evaluate(again, config.output)["loss"] == found
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").open()]
    kept = [(row["step"], row["evaluated_on"], row["eval_loss"]) for row in rows if "loss" not in row]
    assert kept == [(4, "rows.jsonl", found)] * 2
    run = find_runs([config.output])[0]
    assert (run.step, run.loss, run.measured["loss"], run.evaluated_on) == (4, first["last_loss"], found, "rows.jsonl")
    base, exported = make_config(config.model, tmp_path / "eval", eval_data=other_rows), measured(config, other_rows, tmp_path)
    assert found != evaluate(base)["loss"]
    rounded = config.method == "zo" and dtype == "bfloat16"  # an export has the dtypes of the original
    assert found == exported or rounded and found == pytest.approx(exported, rel=1e-2)
    assert found == pytest.approx(first["evaluation"]["loss"], rel=2e-6)
    if not make_method(config).adapter_directory and not rounded:
        says = "".join(generate(base, config.output, ["what is it"], max_new_tokens=4))
        tuned = base.model_copy(update={"model": str(tmp_path / "exported")})
        assert says == "".join(generate(tuned, None, ["what is it"], max_new_tokens=4))
    again = Trainer(config.model_copy(update={"output": tmp_path / "again"})).train().report
    assert again["plan"]["resident_blocks"] == first["plan"]["resident_blocks"]
    assert again["last_loss"] == first["last_loss"]
    assert abs(host_bytes() - held_bytes) < 20 << 20


def test_a_damaged_store_is_not_measured(models, data, other_rows, tmp_path):  # noqa: F811
    config = run_config(models["float32"], data, tmp_path / "run", "full", eval_data=other_rows)
    Trainer(config).train()
    unit, index, offset, *_ = read_manifest(config.output / "store")["pieces"][3]
    with (config.output / "store" / "data").open("r+b") as file:
        file.seek(offset + 5)
        byte = file.read(1)
        file.seek(offset + 5)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match=f"the weights of {re.escape(unit)}.*are not what was written"):
        Trainer(config).evaluate()


def test_what_holds_no_result_is_named(models, data, tmp_path):  # noqa: F811
    config = make_config(models["float32"], tmp_path, eval_data=data)
    with pytest.raises(UserError, match="nor does it hold what a run has tuned"):
        evaluate(config, tmp_path)


def test_an_adapter_of_another_run_in_its_place_is_not_measured(models, data, tmp_path):  # noqa: F811
    runs = {seed: make_config(models["float32"], tmp_path / str(seed), data=data, training={"max_steps": 1, "seed": seed})
            for seed in (1, 2)}  # fmt: skip
    for config in runs.values():
        Trainer(config).train()
    shutil.copy(tmp_path / "2" / "adapter" / "adapter_model.safetensors", tmp_path / "1" / "adapter")
    with pytest.raises(UserError, match="1/adapter belongs to another run than the rest of the directory"):
        evaluate(runs[1].model_copy(update={"eval_data": data}), tmp_path / "1")
    assert evaluate(runs[1].model_copy(update={"eval_data": data}), tmp_path / "1" / "adapter")["loss"] > 0
