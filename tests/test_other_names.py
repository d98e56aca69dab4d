"""Keys by the names of Transformers' TrainingArguments."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainingArguments

from finetune import Trainer
from finetune.config import Config, ConfigError
from finetune.memory.errors import UserError


def test_names_of_training_arguments_are_taken_and_said():
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "lr_scheduler_type": "cosine"}
    config = Config(model="m", num_train_epochs=2, training=training | {"eval_strategy": "epoch"}, train_on_inputs=True)
    same = {"epochs": 2, "micro_batch_size": 4, "batch_size": 32, "lr_scheduler": "cosine", "eval_steps": "epoch"}
    assert config.model_dump() == Config(model="m", training=same, dataset={"completion_only": False}).model_dump()
    assert config.renamed == [
        "num_train_epochs is training.epochs here: 2",
        "train_on_inputs is dataset.completion_only here: False",
        "per_device_train_batch_size is training.micro_batch_size here: 4",
        "lr_scheduler_type is training.lr_scheduler here: 'cosine'",
        "eval_strategy is training.eval_steps here: 'epoch'",
        "gradient_accumulation_steps is training.batch_size here: 32",
    ]
    settings = ["training.num_train_epochs=3", "training.eval_strategy=no", "gradient_accumulation_steps=3"]
    config = Config.load(None, {"model": "m", "training.micro_batch_size": 2}, settings)
    assert (config.training.epochs, config.training.eval_steps, config.training.batch_size) == (3, None, 6)
    assert not Config(model="m", training={"eval_steps": 5}).renamed


@pytest.mark.parametrize(
    "values, words",
    [
        ({"epochs": 1, "num_train_epochs": 2}, "training.epochs: found 1, but num_train_epochs makes it 2: give one of them"),
        ({"training": {"batch_size": 8, "gradient_accumulation_steps": 4}}, "training.batch_size: found 8, but .* makes it 4"),
        ({"gradient_accumulation_steps": 2, "micro_batch_size": "auto"}, "expected a number of micro-batches .* 2 of 'auto'"),
        ({"training": {"save_strategy": "no"}}, "1 problem .*\n.*save_strategy: expected steps or epoch, found 'no'"),
        ({"num_train_epochs": -1}, "training.epochs: expected a number greater than 0, found -1"),
    ],
)
def test_what_contradicts_itself_is_refused(values: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        Config(model="m", **values)


def test_training_arguments_are_taken_with_their_defaults(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=3, eval_strategy="epoch",
        warmup_steps=0.1, lr_scheduler_type="cosine", logging_steps=3, use_cpu=True, report_to="none", neftune_noise_alpha=5,
    )  # fmt: skip
    config = Trainer(model="m", data="d", args=args, training={"learning_rate": 1e-3, "epochs": 2}, seed=7).config
    expected = {
        "batch_size": 6, "micro_batch_size": 2, "epochs": 2, "warmup_ratio": 0.1, "lr_scheduler": "cosine", "save_steps": 500,
        "eval_steps": "epoch", "learning_rate": 1e-3, "seed": 7, "max_grad_norm": 1.0, "neftune_noise_alpha": 5.0,
    }  # fmt: skip
    assert {key: getattr(config.training, key) for key in expected} == expected
    assert config.output == tmp_path and config.training.max_steps is None and config.training.report_to == []
    assert Trainer(model="m", args=TrainingArguments(str(tmp_path), use_cpu=True)).config.training.learning_rate == 5e-5
    for more, words in [
        ({"optim": "adafactor", "group_by_length": True}, "found optim=.*: leave them out, and set what they are for"),
        ({"save_steps": 0.25}, "expected save_steps to be a number of steps, found 0.25, a share of them"),
    ]:
        known = {key: value for key, value in more.items() if key in TrainingArguments.__dataclass_fields__}
        with pytest.raises(UserError, match=words):
            Trainer(model="m", args=TrainingArguments(str(tmp_path), use_cpu=True, **known))
    with pytest.raises(UserError, match=r"expected a configuration or its values, found both \(args\)"):
        Trainer(Config(model="m"), args=args)
