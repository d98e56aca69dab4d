"""`training.micro_batch_size: auto`: held against plans of every size, and against runs with the number that was chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_machine_plans import profile
from tiny_models import make_config, save_tiny, token_data

import finetune.one_run
from finetune.config import Config
from finetune.config.errors import ConfigError
from finetune.data.batches import BatchPlan
from finetune.data.collation import collate
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.methods.base import make_method
from finetune.micro_batch_choice import WORTH, MicroBatchChoice, padding_of, sizes
from finetune.objectives.base import scored_shape
from finetune.session import Session
from finetune.trainer import Trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_data(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(autouse=True)
def tokens_are_there(monkeypatch) -> None:
    monkeypatch.setattr(finetune.one_run, "prepare_for", lambda config, source, *to, **options: source)


def machine_file(tmp_path: Path, slow_calls: float = 0.0, memory_bytes: int = 1 << 33) -> Path:
    """Products take as long as their operations, reads none; slow_calls: seconds of every call of an operation."""
    machine = profile(1e9)
    machine["host"]["compute"] |= {"operation_seconds": slow_calls}
    machine["host"]["memory_bytes"] = memory_bytes
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump(machine))
    return path


def planned(model: Path, tmp_path: Path, machine: Path, size: int | str, **changes):
    training = {"batch_size": 6, "micro_batch_size": size}
    return Trainer(make_config(model, None, tmp_path, machine=str(machine), training=training, **changes)).plan()


@pytest.mark.parametrize(
    "rows, found",
    [(1, [1]), (2, [1, 2]), (5, [1, 2, 3, 5]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 6, 12]), (7, [1, 2, 4, 7])],
)
def test_sizes_cut_a_batch_into_ever_fewer_parts(rows, found):
    assert sizes(rows) == found


def test_padding_is_that_of_the_steps_themselves(tokens):
    lengths = np.asarray(tokens.lengths)
    batches = BatchPlan(len(lengths), 5, 1, 3, lengths, steps=6)
    padding = padding_of(batches)
    for size in (1, 2, 3, 5):
        batches.micro_batch_size = size
        found = [
            collate([[tokens[row[0]]] for row in group], 0)["input_ids"].numel()
            for step in range(6)
            for group in batches.step(step)
        ]
        alone = sum(int(lengths[row[0]]) for step in range(6) for group in batches.step(step) for row in group)
        assert padding(size) == pytest.approx(sum(found) / alone)
    assert padding(5) > padding(1) == 1


def test_the_choice_is_the_smallest_of_the_fastest(model, tmp_path):
    """Held against plans of fixed sizes. Where calls take the time, all rows together are best; where products do, one row."""
    machine = machine_file(tmp_path, 1e-3)
    choice = planned(model, tmp_path, machine, "auto").choice
    fixed = {size: planned(model, tmp_path, machine, size).values["step_seconds"] for size in (1, 5, 6)}
    assert list(choice.seconds) == sizes(6) and {size: choice.seconds[size] for size in (1, 6)} == {1: fixed[1], 6: fixed[6]}
    assert choice.size == 6 and choice.seconds[6] <= WORTH * min(fixed.values())
    assert choice == planned(model, tmp_path, machine, "auto").choice  # the same again
    assert planned(model, tmp_path, machine_file(tmp_path), "auto").choice.size == 1


def test_what_does_not_fit_is_not_chosen(model, tmp_path):
    machine = machine_file(tmp_path, 1e-3)
    changes = {"dataset": {"sequence_length": 1024}, "engine": {"activations": "disk"}}
    training = {"batch_size": 6, "micro_batch_size": 3}
    config = make_config(model, None, tmp_path, machine=str(machine), training=training, **changes)
    session = Session(make_method(config), only_plan=True)
    budget = session.least_memory(scored_shape(config, 1024))[0] + (8 << 20)  # the process is not always as large
    session.close()
    found = planned(model, tmp_path, machine, "auto", host_memory=budget, **changes)
    assert found.choice.size == 3 and found.choice.seconds[6] is None and "6: does not fit" in found.describe()
    with pytest.raises(PlanRefused):
        planned(model, tmp_path, machine, 6, host_memory=budget, **changes)
    assert found.values["micro_batch_choice"]["size"] == 3 and found.values["micro_batch_shape"] == [3, 1024]


def of_run(config: Config) -> dict:
    Trainer(config).train()
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [row["loss"] for row in rows], "run": json.loads((config.output / "run.json").read_text())}


def test_a_run_is_that_of_the_chosen_number_and_goes_on_with_it(model, tokens, tmp_path, monkeypatch):
    def config(name: str, size: int | str, steps: int = 3, **changes) -> Config:
        training = {"micro_batch_size": size, "max_steps": steps, "lr_scheduler": "constant"}
        return make_config(model, tokens, tmp_path / name, training=training, **changes)

    whole = of_run(config("auto", "auto"))
    size = whole["run"]["settings"]["training"]["micro_batch_size"]
    assert size in sizes(5) and of_run(config("fixed", size)) == whole
    of_run(config("half", size, 1))
    monkeypatch.setattr(finetune.one_run, "choose_micro_batch_size", lambda *_: pytest.fail("it is chosen already"))
    assert of_run(config("half", "auto", resume=True)) == whole
    assert MicroBatchChoice(2).words == "micro-batches of 2, as when the run began"


def test_where_it_would_be_more_than_time_it_is_refused(tmp_path):
    model = save_tiny("vit", tmp_path / "vit")
    pictures = [{"pixel_values": torch.zeros(3, 14, 14), "labels": torch.tensor(1)}] * 3
    lora = {"target_modules": ["q_proj"]}
    for call in (Trainer.train, Trainer.plan):
        with pytest.raises(UserError, match="expected a number, because steps over rows of tensors are not predicted"):
            call(Trainer(make_config(model, pictures, tmp_path / "run", training={"micro_batch_size": "auto"}, lora=lora)))
    mixture = save_tiny("mixtral", tmp_path / "mixture")
    config = make_config(
        mixture, None, tmp_path, training={"micro_batch_size": "auto", "router_loss": "micro_batch"}, lora=lora
    )
    with pytest.raises(UserError, match="the routers' loss is one over each micro-batch, found auto"):
        Trainer(config).plan()
    balanced = config.model_copy(update={"training": config.training.model_copy(update={"router_loss": "global_batch"})})
    assert Trainer(balanced).plan().choice is not None


def test_what_is_no_number_of_rows_is_named():
    for value in (0, -1, True, 1.5, "many", "1.5", None):
        with pytest.raises(ConfigError, match="micro_batch_size: expected a number of rows, 1 or more, or auto, found"):
            Config(model="m", micro_batch_size=value)
    assert Config(model="m", micro_batch_size="8").training.micro_batch_size == 8
    assert Config.load(None, {"model": "m"}, ["micro_batch_size=auto"]).training.micro_batch_size == "auto"
