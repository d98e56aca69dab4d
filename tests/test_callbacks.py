"""Transformers' callbacks: the events, state and control that Transformers' own Trainer gives them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.state import PartialState
from text_models import make_config, write_model, write_rows
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from finetune import Config, Trainer
from finetune.data import preparation, worker
from finetune.memory.errors import UserError
from finetune.reporting.report import read_metrics

ROWS = [{"prompt": "the cat sat on"[: 3 + i], "completion": " mat hello"[: 4 + i % 5]} for i in range(7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.fixture(autouse=True)
def data_prepared_here(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_load_tokenizer", lambda job: tf.AutoTokenizer.from_pretrained(job.tokenizer))
    monkeypatch.setattr(
        preparation, "_run_worker", lambda job, _: worker.run(worker.Job(**job), lambda rows, tokens: None)
    )


def run_config(model: Path, data: str, output: Path, **changes: Any) -> Config:
    """3 steps an epoch, 2 epochs."""
    training = {"batch_size": 3, "micro_batch_size": 3, "epochs": 2, "eval_steps": 2, "save_steps": 2, "learning_rate": 0.0}
    training |= changes.pop("training", {})
    return make_config(model, output, data=data, eval_data=data, training=training, lora={"r": 2}, **changes)


EVENTS = (
    "train_begin", "epoch_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "step_end", "epoch_end", "log",
    "evaluate", "save", "train_end",
)  # fmt: skip


class Recorder(TrainerCallback):
    """Keeps every event with its place; orders: (event, step) -> what `control` is to have then."""

    def __init__(self, orders: dict[tuple[str, int], dict[str, bool]] | None = None) -> None:
        self.orders = orders or {}
        self.seen: list[tuple[str, int, float]] = []
        self.kept: dict[str, Any] = {}

    def note(self, event: str, args: Any, state: Any, control: Any, **more: Any) -> Any:
        self.seen.append((event, state.global_step, round(state.epoch, 6)))
        self.kept |= {"args": args, "state": state, **more}
        for name, value in self.orders.get((event, state.global_step), {}).items():
            setattr(control, name, value)
        return control


for _event in EVENTS:
    setattr(Recorder, f"on_{_event}", lambda self, *args, _event=_event, **more: self.note(_event, *args, **more))


def events_of_transformers(model: Path, folder: Path, callbacks: list[Any], eval_steps: int) -> None:
    """The same numbers of rows and steps with Transformers' Trainer."""
    rows = [{"input_ids": torch.tensor([3, 4, 5, 6]), "labels": torch.tensor([3, 4, 5, 6])} for _ in ROWS]
    args = TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=3, eval_strategy="steps",
        eval_steps=eval_steps, save_steps=2, logging_steps=1, learning_rate=0.0, use_cpu=True, report_to=[], disable_tqdm=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    plain = tf.AutoModelForCausalLM.from_pretrained(model)
    trainer = tf.Trainer(plain, args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(tf.trainer_callback.PrinterCallback)
    trainer.train()


@pytest.mark.parametrize(
    ("orders", "patience", "eval_steps", "steps"),
    [
        (
            {
                ("step_end", 1): {"should_evaluate": True, "should_save": True},
                ("step_end", 2): {"should_evaluate": False, "should_save": False, "should_log": False},
                ("epoch_end", 3): {"should_save": True},
            },
            None, 2, 6,
        ),
        ({("step_end", 2): {"should_epoch_stop": True}, ("step_begin", 3): {"should_training_stop": True}}, None, 1, 4),
        ({}, 2, 1, 3),
    ],
)  # fmt: skip
def test_events_come_as_from_transformers(orders, patience, eval_steps, steps, model, data, tmp_path):
    found, expected = Recorder(orders), Recorder(orders)
    stops = [] if patience is None else [EarlyStoppingCallback(patience)]
    Trainer(run_config(model, data, tmp_path / "ours", training={"eval_steps": eval_steps}), [found, *stops]).train()
    stops = [] if patience is None else [EarlyStoppingCallback(patience)]
    events_of_transformers(model, tmp_path / "theirs", [expected, *stops], eval_steps)
    assert found.seen == expected.seen and found.seen[-1][1] == steps
    for name in ("max_steps", "num_train_epochs", "best_global_step", "train_batch_size", "eval_steps", "save_steps"):
        assert getattr(found.kept["state"], name) == getattr(expected.kept["state"], name), name

    def told(recorder: Recorder) -> list[tuple[int, float, set[str]]]:
        keys = {"loss", "grad_norm", "learning_rate", "eval_loss", "train_loss", "train_runtime"}
        return [(e["step"], round(e["epoch"], 6), keys & e.keys()) for e in recorder.kept["state"].log_history]

    assert told(found) == told(expected)


def test_what_is_no_callback_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match="callbacks: expected transformers.TrainerCallback objects or classes, found <built-in"):
        Trainer(Config(model="nowhere"), [Recorder, print])


def test_arguments_are_real_and_claim_no_device(model, data, tmp_path, caplog):
    recorder, before = Recorder(), dict(PartialState._shared_state)
    training = {"warmup_ratio": 0.3, "lr_scheduler": "cosine", "weight_decay": 0.1, "max_steps": 1}
    logger = logging.getLogger("transformers.trainer_callback")
    logger.addHandler(caplog.handler)
    try:
        Trainer(run_config(model, data, tmp_path / "out", training=training), [recorder]).train()
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records  # of a flow that is missing
    args = recorder.kept["args"]
    assert isinstance(args, TrainingArguments) and PartialState._shared_state == before
    assert (args.device, args.n_gpu, args.world_size, args.process_index) == (torch.device("cpu"), 0, 1, 0)
    assert args.train_batch_size * args.gradient_accumulation_steps == 3 and args.get_warmup_steps(6) == 2
    assert (args.eval_strategy, args.eval_steps, args.save_steps, args.logging_steps) == ("steps", 2, 2, 1)
    assert json.loads(args.to_json_string())["weight_decay"] == 0.1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_resumed_run_knows_what_was_before(model, data, tmp_path):
    """As an unbroken run: the state, what callbacks know, and where an epoch was cut short."""

    def recorders() -> tuple[Recorder, EarlyStoppingCallback]:
        return Recorder({("step_end", 2): {"should_epoch_stop": True}}), EarlyStoppingCallback(3)

    whole, _ = callbacks = recorders()
    config = run_config(model, data, tmp_path / "whole", training={"eval_steps": 1, "epochs": 3})
    Trainer(config, callbacks).train()
    config = run_config(model, data, tmp_path / "parts", training={"eval_steps": 1, "epochs": 3})
    first, _ = callbacks = recorders()
    first.orders[("step_end", 3)] = {"should_training_stop": True}
    Trainer(config, callbacks).train()
    resumed, stopping = recorders()
    resumed.orders = {}
    Trainer(config.model_copy(update={"resume": True}), [resumed, stopping]).train()
    assert resumed.seen[0] == ("train_begin", 3, pytest.approx(4 / 3))
    assert stopping.early_stopping_patience_counter == 3 and resumed.seen[-1][1] == whole.seen[-1][1] == 4
    assert [event for event in whole.seen if event[1] > 3] == [event for event in resumed.seen if event[1] > 3]

    def told(recorder: Recorder) -> list[tuple[Any, ...]]:
        history = recorder.kept["state"].log_history
        return [(e["step"], e.get("loss"), e.get("eval_loss")) for e in history if "train_loss" not in e]

    assert told(resumed) == told(whole)
    assert resumed.kept["state"].best_metric == whole.kept["state"].best_metric
    rows = [list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert [row["epoch"] for row in rows[1]] == [1 / 3, 1, 4 / 3, 5 / 3]


def test_values_of_evaluation_are_written(model, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_config(model, data, tmp_path, training={"report_to": ["tensorboard"], "learning_rate": 1e-2, "epochs": 5 / 3})
    report = Trainer(config).train().report
    later = Trainer(config).evaluate()["loss"]
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert ["eval_loss" in row for row in rows] == [False, True, False, True, True]
    assert rows[-1]["eval_loss"] == report["evaluation"]["loss"] and rows[1]["eval_loss"] != rows[3]["eval_loss"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("eval/loss")]
    assert found == [(row["step"], pytest.approx(row["eval_loss"])) for row in rows if "eval_loss" in row]
    assert [(event.step, event.value) for event in events.Scalars("eval/rows.jsonl/loss")] == [(5, pytest.approx(later))]


def test_a_trainer_is_made_of_keywords() -> None:
    assert Trainer(model="m", data=[{"text": "a"}], max_steps=3).config == Config(model="m", data=[{"text": "a"}], max_steps=3)
    with pytest.raises(UserError, match=r"expected a configuration or its values, found both \(model\)"):
        Trainer(Config(model="m"), model="m")


def test_an_evaluation_of_no_data_is_refused(model, data, tmp_path, capsys):
    config = run_config(model, data, tmp_path).model_copy(update={"eval_data": None})
    with pytest.raises(UserError, match="a callback asked for an evaluation.*expected eval_data, found none"):
        Trainer(config, [Recorder({("step_end", 1): {"should_evaluate": True}})]).train()
    with pytest.raises(UserError, match="cannot serve this run: EarlyStoppingCallback requires .* training.eval_steps"):
        Trainer(config, [EarlyStoppingCallback()]).train()
    assert "note: there is no eval_data, so training.eval_steps evaluates nothing\n" in capsys.readouterr().err
