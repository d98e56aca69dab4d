"""Early stopping and the best step: against Transformers' own Trainer, across resumed runs, and for each kind of method."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers as tf
from safetensors.torch import load_file
from text_models import StopAfter, make_config, write_model, write_rows

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.config.training_options import TrainingOptions
from finetune.data import preparation, worker
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.learning_rates import find_learning_rate
from finetune.memory.errors import UserError
from finetune.reporting.report import read_metrics
from finetune.runs.best import BestStep, read_best

TRAINED = [{"prompt": "the cat sat", "completion": " on the mat"}, {"prompt": "hello", "completion": " the cat"}]
HELD_OUT = [{"prompt": "the cat sat", "completion": " hello hello"}, {"prompt": "hello", "completion": " on on"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "float32")


@pytest.fixture(autouse=True)
def data_prepared_here(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_load_tokenizer", lambda job: tf.AutoTokenizer.from_pretrained(job.tokenizer))
    monkeypatch.setattr(
        preparation, "_run_worker", lambda job, _: worker.run(worker.Job(**job), lambda rows, tokens: None)
    )


def run_config(model: Path, folder: Path, name: str, **changes: Any) -> Config:
    data, held_out = (write_rows(folder / f"{word}.jsonl", rows) for word, rows in (("a", TRAINED), ("b", HELD_OUT)))
    training = {
        "batch_size": 2, "max_steps": 8, "learning_rate": 0.1, "lr_scheduler": "constant", "eval_steps": 1,
        "load_best_model_at_end": True, "early_stopping_patience": 3, **changes.pop("training", {}),
    }  # fmt: skip
    return make_config(model, folder / name, data=data, eval_data=held_out, training=training, lora={"r": 2}, **changes)


def losses(directory: Path) -> list[float]:
    return [row.get("eval_loss") for row in read_metrics(directory / "metrics.jsonl")]


class RaisesOnce:
    """In place of metrics: what ends a run in its evaluation number `call`."""

    def __init__(self, call: int) -> None:
        self._left = call

    def __call__(self, found: Any) -> dict[str, float]:
        self._left -= 1
        if not self._left:
            raise OSError("there is no room")
        return {}


@pytest.mark.parametrize("greater", [False, True])
def test_rules_are_those_of_transformers(greater):
    """Values with ties, NaN and improvements below the threshold; its callback and its Trainer's comparison."""
    options = TrainingOptions(
        metric_for_best_model="score", greater_is_better=greater, early_stopping_patience=3, eval_steps=1,
        early_stopping_threshold=0.15,
    )  # fmt: skip
    best, stopping = BestStep(options), tf.EarlyStoppingCallback(3, 0.15)
    strategy = tf.trainer_utils.SaveStrategy.STEPS
    args = SimpleNamespace(metric_for_best_model="score", greater_is_better=greater, save_strategy=strategy)
    trainer = SimpleNamespace(args=args, state=tf.TrainerState())
    control = tf.TrainerControl()
    for step, value in enumerate([math.nan, 2.0, 1.9, 1.7, math.nan, 1.7, 2.2, 2.3, 2.5, 1.4, 2.5, 2.5, 2.5], start=1):
        trainer.state.global_step = step
        metrics = {"eval_score": value}
        stopping.on_evaluate(args, trainer.state, control, metrics)
        assert best.take(step, metrics) == tf.Trainer._determine_best_metric(trainer, metrics, None)
        assert (best.misses, best.step or None) == (stopping.early_stopping_patience_counter, trainer.state.best_global_step)
        assert best.should_stop == (best.misses >= 3) and (not best.step or best.value == trainer.state.best_metric)
    assert control.should_training_stop


def test_a_run_ends_early_with_its_best_adapter_and_so_does_a_resumed_one(model, tmp_path, capsys):
    config = run_config(model, tmp_path, "whole")
    report = Trainer(config).train().report
    found = losses(config.output)
    best = found.index(min(found)) + 1
    assert 1 <= best < 5 and len(found) == best + 3 == report["steps"]  # three more that were no better
    assert report["best"] == {"step": best, "metric": "loss", "value": min(found)} == read_best(config.output)
    assert f"stopped early after step {best + 3}: the best loss is" in capsys.readouterr().err
    assert evaluate(config, config.output)["loss"] == pytest.approx(min(found), rel=1e-6)
    assert [path.name for path in (config.output / "best").iterdir()] == [f"step-{best:08d}"]

    changes = {"save_steps": 50, "save_total_limit": 1, "compute_metrics": RaisesOnce(best)}
    parts = run_config(model, tmp_path, "parts", training=changes)
    with pytest.raises(UserError, match="compute_metrics: .* failed: OSError"):
        Trainer(parts).train()
    assert losses(parts.output) == [*found[: best - 1], None]
    Trainer(parts.model_copy(update={"resume": True}), [StopAfter(best + 1)]).train()  # it evaluates the best step first
    (parts.output / "best.json").unlink()
    assert len(list((parts.output / "state").iterdir())) == 1
    resumed = parts.model_copy(update={"resume": True})
    assert Trainer(resumed).train().report["best"] == report["best"]
    assert losses(parts.output) == found
    short = run_config(model, tmp_path, "short", training={"max_steps": best, "load_best_model_at_end": False})
    Trainer(short).train()  # whose last step is the best one
    names = ("adapter/adapter_model.safetensors", f"best/step-{best:08d}/adapter_model.safetensors")
    one = load_file(short.output / names[0])
    others = [load_file(run.output / name) for run in (config, parts) for name in names]
    assert all(other[key].equal(one[key]) for other in others for key in one)

    assert Trainer(resumed).train().global_step == best + 3  # it stays over
    for path in (parts.output / "best").rglob("*"):
        path.unlink() if path.is_file() else None
    (parts.output / "best" / f"step-{best:08d}").rmdir()
    with pytest.raises(UserError, match=f"step-{best:08d}, the adapter of the best step so far, is missing: bring it back"):
        Trainer(resumed).train()


def test_the_best_step_of_a_journal_is_what_is_used_and_exported(model, tmp_path):
    zo = {"epsilon": 1e-2}
    training = {"learning_rate": 3e-4, "max_steps": 4, "early_stopping_patience": None, "metric_for_best_model": "eval_loss"}
    training |= {"greater_is_better": True}  # so that it is not the last one
    config = run_config(model, tmp_path, "zo", training=training, method="zo", zo=zo)
    report = Trainer(config).train().report
    found = losses(config.output)
    best = found.index(max(found)) + 1
    assert report["best"]["step"] == best < 4
    assert evaluate(config, config.output)["loss"] == pytest.approx(max(found), rel=1e-6)
    assert export(config, tmp_path / "exported") == best
    assert export(config, tmp_path / "last", at_step=4) == 4
    without = config.training.model_copy(update={"load_best_model_at_end": False})
    Trainer(config.model_copy(update={"resume": True, "training": without})).train()
    assert read_best(config.output) is None  # the last step is the result again


def test_evaluations_at_the_end_of_epochs(model, tmp_path):
    training = {"batch_size": 1, "eval_steps": "epoch", "save_steps": "epoch", "epochs": 2.5, "max_steps": None}
    training |= {"compute_metrics": RaisesOnce(1)}
    config = run_config(model, tmp_path, "epochs", training=training)
    with pytest.raises(UserError, match="there is no room"):
        Trainer(config).train()
    Trainer(config.model_copy(update={"resume": True})).train()  # it evaluates the end of the first epoch
    rows = list(read_metrics(config.output / "metrics.jsonl"))
    assert ["eval_loss" in row for row in rows] == [False, True, False, True, True]
    assert json.loads((config.output / "best.json").read_text())["step"] in (2, 4, 5)


def test_what_cannot_be_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="load_best_model_at_end: expected evaluations in the run, found no "):
        run_config(model, tmp_path, "a", training={"eval_steps": None})
    with pytest.raises(ConfigError, match="expected a method that leaves an adapter or a journal, found full"):
        run_config(model, tmp_path, "a", method="full")
    with pytest.raises(ConfigError, match="eval_steps: expected a number of steps, 1 or more, or epoch, found 'never'"):
        run_config(model, tmp_path, "a", training={"eval_steps": "never"})
    with pytest.raises(ConfigError, match="expected only with methods that save states, found method zo"):
        run_config(model, tmp_path, "a", method="zo", training={"save_total_limit": 2})
    config = run_config(model, tmp_path, "a").model_copy(update={"eval_data": None})
    with pytest.raises(UserError, match="training.load_best_model_at_end: expected eval_data, which evaluations are over"):
        Trainer(config).train()
    config = run_config(model, tmp_path, "a", training={"report_to": "wandb"})
    with pytest.raises(UserError, match="expected the package wandb to be installed, found it missing: pip install wandb"):
        Trainer(config).train()
    config = run_config(model, tmp_path, "a", training={"metric_for_best_model": "bleu"})
    with pytest.raises(UserError, match="metric_for_best_model: expected one of loss, perplexity, .* found bleu"):
        Trainer(config).train()


def test_rates_are_tried_on_the_first_steps_of_a_run_and_nothing_stays(model, tmp_path):
    config = run_config(model, tmp_path, "out")
    found = find_learning_rate(config, 12, 1e-4, 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}
    assert found.rates[0] == pytest.approx(1e-4) and 10 <= len(found.losses) == len(found.rates) <= 12
    changes = {"max_steps": 2, "learning_rate": found.rates[0], "early_stopping_patience": None, "eval_steps": None}
    Trainer(run_config(model, tmp_path, "out", training=changes | {"load_best_model_at_end": False})).train()
    rows = read_metrics(config.output / "metrics.jsonl")
    assert [row["loss"] for row in rows] == found.losses[:2]  # the second after an update with the first rate
    with pytest.raises(UserError, match="expected 10 steps or more and rates above 0, .* found 5 steps"):
        find_learning_rate(config, 5)
