"""Learning rate schedules: Transformers' own, with what they take known before anything of Transformers is loaded."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from finetune.config import Config, ConfigError
from finetune.config.schedule_options import SCHEDULES
from finetune.memory.errors import UserError
from finetune.methods.schedule import check_schedule, make_scheduler


def one_weight(rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def rates(config: Config, num_steps: int, first_step: int = 0) -> list[float]:
    optimizer = one_weight(config.learning_rate)
    scheduler = make_scheduler(config.training, optimizer, num_steps, first_step)
    found = []
    for _ in range(first_step, num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_arguments_are_those_of_transformers(name):
    taken = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters.keys()
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert SCHEDULES[name].model_fields.keys() == taken - ours
    for key, field in SCHEDULES[name].model_fields.items():
        default = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters[key].default
        assert field.is_required() == (default is inspect.Parameter.empty)
        assert field.is_required() or field.default == default


@pytest.mark.parametrize(("ratio", "steps"), [(0.03, 20), (0.1, 5), (0.07, 100), (0.1, 30), (0.5, 1), (0.0, 7)])
def test_a_share_of_warm_up_is_rounded_as_by_transformers(ratio, steps, tmp_path):
    expected = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio, use_cpu=True).get_warmup_steps(steps)
    found = rates(Config(model="m", training={"warmup_ratio": ratio, "learning_rate": 1.0}), steps)
    assert found[:expected] == [step / expected for step in range(expected)]
    assert expected == steps or found[expected] == 1.0


GOOD = [
    ("cosine", {"num_cycles": 1}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"lr_end": 1e-5, "power": 2}),
    ("polynomial", {}),
    ("inverse_sqrt", {"timescale": 7}),
    ("cosine_with_min_lr", {"min_lr": 1e-2}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-3, "warmup_lr_rate": 0.5}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "warmup_type": "1-sqrt", "decay_type": "linear", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 7, "num_stable_steps": 1}),
]


@pytest.mark.filterwarnings("ignore:Both num_training_steps")
@pytest.mark.parametrize(("name", "arguments"), GOOD)
def test_what_is_taken_gives_the_rates_of_transformers(name, arguments):
    training = {"lr_scheduler": name, "lr_scheduler_kwargs": arguments, "warmup_steps": 3, "max_steps": 9}
    config = Config(model="m", learning_rate=1e-2, training=training)
    assert check_schedule(config.training, 9) is None
    optimizer = one_weight(1e-2)
    scheduler = get_scheduler(name, optimizer, 3, 9, scheduler_specific_kwargs=arguments)
    expected = []
    for _ in range(9):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(config, 9) == expected
    assert rates(config, 9, first_step=5) == expected[5:]


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"lr_scheduler": "warmup_stable_decay"}, "lr_scheduler_kwargs.num_decay_steps with .*stable_decay, found none"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler_kwargs.min_lr or .min_lr_rate .*, found none"),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.0, "min_lr_rate": 0.1}}, "found both"),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
            "num_cycles with lr_scheduler cosine, found min_lr; min_lr is of cosine_with_min_lr, cosine_warmup_with_min_lr",
        ),
        ({"lr_scheduler_kwargs": {"num_cycle": 3}}, "nothing with lr_scheduler linear, found num_cycle$"),
        ({"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "num_cycles to be a valid number, found 'x'"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "sqrt"}},
            "decay_type to be 'linear', 'cosine' or '1-sqrt', found 'sqrt'",
        ),
        ({"lr_scheduler": "polynomial", "learning_rate": 0.0}, "above the lr_end of .*, 1e-07, found 0"),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.1}, "learning_rate": 0.01},
            "training.learning_rate above the min_lr of .*, 0.1, found 0.01",
        ),
        ({"lr_scheduler": "polynomial", "warmup_steps": 3, "max_steps": 3}, "found 3 of 3 steps"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}, "max_steps": 7,
             "warmup_ratio": 0.3},
            "at most 7 steps together, which the run has, found 3 and 5",
        ),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_with_the_configuration(training, words):
    with pytest.raises(ConfigError, match=words) as error:
        Config(model="m", training=training)
    assert len(error.value.problems) == 1


def test_the_length_of_a_run_may_be_known_from_its_data_alone():
    options = {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}, "warmup_steps": 3}
    training = Config(model="m", training=options).training
    assert check_schedule(training, 8) is None
    with pytest.raises(UserError, match="training: expected .* at most 7 steps together"):
        check_schedule(training, 7)


def test_a_warm_up_that_a_schedule_leaves_out_is_said():
    training = Config(model="m", training={"lr_scheduler": "constant", "warmup_ratio": 0.25}).training
    note = check_schedule(training, 9)
    assert f"constant has no warm-up: the {math.ceil(9 / 4)} steps" in note and "constant_with_warmup" in note
    assert check_schedule(Config(model="m", training={"warmup_steps": 4}).training, 5) is None
    note = check_schedule(Config(model="m", training={"warmup_steps": 5}).training, 5)
    assert note == "the warm-up of 5 steps is not over when the run ends after 5"
