"""Zeroth-order runs over packed bases from the outside: what they leave, resumed runs, memory, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import kill_again_and_again
from packed_checkpoints import write_packed
from test_resume import data, data_prepared_here, models  # noqa: F401  fixtures
from test_zeroth_order import journal_bytes, weights
from text_models import StopAfter, make_config
from transformers import AutoModelForCausalLM

import finetune.offload.files.safetensors_files
import finetune.offload.perturb.unpacked
import finetune.offload.weights.parts
from finetune import Config, Trainer
from finetune.data import preparation
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.generate import generate
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.planner import Planner

PRODUCTS = {"noise": "low_rank", "rank": 16, "perturb": "products", "fold_steps": 3, "epsilon": 1e-2}


@pytest.fixture(autouse=True)
def rows_on_demand(monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)


@pytest.fixture(scope="module")
def bases(models, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    """Packed, and the same numbers in bf16."""
    folder = tmp_path_factory.mktemp("bases") / "bfloat16"
    folder.mkdir()
    return write_packed(Path(models["bfloat16"]), folder, "nf4", nested=True)


def run_config(
    model: Path, rows: str, output: Path, steps: int, zo: dict[str, Any] | None = None, dtype: str = "bfloat16", **changes: Any
) -> Config:
    training = {"max_steps": steps, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 2}
    return make_config(
        model, output, data=rows, method="zo", zo=PRODUCTS | (zo or {}), training=training,
        engine={"dtype": dtype}, **changes,
    )  # fmt: skip


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(bases, data, tmp_path):  # noqa: F811
    """Beyond the groups that plain weights would have folded."""
    whole, parts = (run_config(bases[0], data, tmp_path / name, 11, {"fold_steps": 2}) for name in ("whole", "parts"))
    Trainer(whole).train()
    for stop in (2, 5, 9):
        Trainer(parts.model_copy(update={"resume": stop > 2}), callbacks=[StopAfter(stop)]).train()
    Trainer(parts.model_copy(update={"resume": True})).train()
    assert journal_bytes(parts) == journal_bytes(whole)
    assert not (whole.output / "weights").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on(bases, data, tmp_path):  # noqa: F811
    whole = run_config(bases[0], data, tmp_path / "whole", 40)
    Trainer(whole).train()
    config = run_config(bases[0], data, tmp_path / "killed", 40, resume=True)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    preparation.prepare(data, model=config.model, cache_dir=config.output / "tokens", sequence_length=64)
    journal = config.output / "journal.zo"
    kill_again_and_again(tmp_path / "run.yaml", lambda: journal.stat().st_size if journal.exists() else 0, 2, 0.1)
    Trainer(config).train()
    assert journal_bytes(config) == journal_bytes(whole)


def test_what_a_run_has_tuned_is_measured_and_speaks(bases, data, tmp_path):  # noqa: F811
    config = run_config(bases[0], data, tmp_path / "run", 7, {"fold_steps": 2}, "float32", eval_data=data)
    trainer = Trainer(config)
    inside = trainer.train().report["evaluation"]["loss"]
    assert trainer.evaluate()["loss"] == pytest.approx(inside, rel=2e-6)
    base = make_config(bases[0], tmp_path / "eval", eval_data=data)
    assert evaluate(base)["loss"] != inside
    assert "".join(generate(base, config.output, ["what is it"], max_new_tokens=4))


def test_export_is_that_of_the_plain_weights(bases, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(finetune.offload.files.safetensors_files, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(finetune.offload.perturb.unpacked, "CHUNK_BYTES", 5000)
    configs = [run_config(model, data, tmp_path / model.name, 5) for model in bases]
    for config in configs:
        Trainer(config).train()
        for step in (2, 5):
            export(config, tmp_path / f"{config.output.name}-{step}", at_step=step)
    for step in (2, 5):
        found, expected = (weights(tmp_path / f"{config.output.name}-{step}") for config in configs)
        assert found.keys() == expected.keys()
        assert all(found[name].equal(value) and found[name].dtype == value.dtype for name, value in expected.items())
    folder = tmp_path / "packed-5"
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert all(loaded[name].equal(value) for name, value in found.items())


def test_groups_that_do_not_fit_are_refused(bases, data, tmp_path, monkeypatch):  # noqa: F811
    """Their factors stay for the whole run: the message says what makes them fewer."""
    monkeypatch.setattr(Planner, "process_bytes", 300 << 20)  # this one has run other tests: fewer would not fit either
    config = run_config(bases[0], data, tmp_path / "run", 6000, {"fold_steps": 1}, host_memory="900MiB")
    with pytest.raises(PlanRefused, match="sums of the factors of updates") as refused:
        Trainer(config).train()
    assert "raise zo.fold_steps" in str(refused.value)


@pytest.mark.parametrize(
    ("zo", "message"),
    [
        ({"rounding": "nearest"}, "zo.rounding: expected exact with weights that are packed .*, found nearest"),
        ({"perturb": "weights"}, "bitsandbytes 4-bit, .* train an adapter .*zo.perturb products"),
    ],
)
def test_refusals(zo, message, bases, data, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=message):
        Trainer(run_config(bases[0], data, tmp_path / "run", 2, zo)).train()
