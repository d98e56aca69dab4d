"""Configuration: every source of keys, all errors in one message, a faithful round trip, presets that load."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import finetune.data.options
from finetune.adapters.lora_options import LoraOptions
from finetune.config import Config, ConfigError
from finetune.config.config import KEYS
from finetune.config.errors import OTHER_NAMES
from finetune.config.function_names import describe_function, distinct_names
from finetune.config.loading import SHORTHANDS
from finetune.config.presets import find_preset, preset_names, read_presets
from finetune.config.reference import all_keys
from finetune.config.run_file import may_be_replaced, run_text
from finetune.config.sections import SECTIONS
from finetune.config.training_options import TrainingOptions
from finetune.config.unused_keys import unused_adapter_note
from finetune.data.options import DatasetOptions


def problems(**values: object) -> dict[str, str]:
    with pytest.raises(ConfigError) as error:
        Config(**values)
    return dict(line.split(": ", 1) for line in error.value.problems)


def test_shorthands_land_in_their_sections() -> None:
    config = Config(
        model="m", data="d", max_steps=3, epochs=2, batch_size=6, micro_batch_size=2, learning_rate=1e-3, seed=0,
        sequence_length=77, training={"weight_decay": 0.1},
    )  # fmt: skip
    expected = TrainingOptions(
        max_steps=3, epochs=2, batch_size=6, micro_batch_size=2, learning_rate=1e-3, seed=0, weight_decay=0.1
    )
    assert config.training == expected
    assert config.dataset == DatasetOptions(sequence_length=77)


def test_every_shorthand_names_a_key_of_its_section() -> None:
    for key, section in SHORTHANDS.items():
        assert key in type(Config(model="m").__getattribute__(section)).model_fields


def test_shorthand_beside_a_section_object() -> None:
    config = Config(model="m", training=TrainingOptions(weight_decay=0.5), max_steps=4)
    assert (config.training.weight_decay, config.training.max_steps) == (0.5, 4)


def test_shorthand_that_contradicts_its_section() -> None:
    assert Config(model="m", max_steps=5, training={"max_steps": 5}).training.max_steps == 5
    found = problems(model="m", max_steps=5, training={"max_steps": 6})
    assert found == {"max_steps": "found 5, but training.max_steps is 6: give one of them"}


def test_all_problems_come_together() -> None:
    found = problems(
        batch_size=0,
        seed=1.5,
        sequence_length=True,
        method="prefix",
        host_memory="5XB",
        data={"a": 1},
        resume="yes",
        dataset=[1],
        engine={"dtype": "bf16"},
        lora={"target_modules": [1], "extra": {"lora_alpha": 3}},
        training={"learning_rate": float("nan"), "lr_scheduler_kwargs": 3},
    )
    assert found.keys() == {
        "model", "training.batch_size", "training.seed", "method", "host_memory", "data", "resume", "dataset",
        "engine.dtype", "lora.target_modules", "lora.extra", "training.learning_rate", "training.lr_scheduler_kwargs",
        "sequence_length",
    }  # fmt: skip
    assert found["training.batch_size"] == "expected a number greater than or equal to 1, found 0"
    assert found["training.seed"] == "expected a valid integer, found 1.5"
    assert found["dataset"] == "expected a mapping of keys to values, found [1]"
    assert found["engine.dtype"] == "expected 'auto', 'bfloat16', 'float16' or 'float32', found 'bf16'; nearest: bfloat16"
    assert found["lora.target_modules"] == "expected a valid string or a list of strings, found [1]"
    assert "use lora.alpha" in found["lora.extra"]
    assert "unknown unit 'XB'" in found["host_memory"]
    assert "--model" in found["model"]


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"modle": "x"}, "modle", "model"),
        ({"batchsize": 4}, "batchsize", "training.batch_size"),
        ({"training": {"batchsize": 4}}, "training.batchsize", "training.batch_size"),
        ({"lora": {"learning_rate": 1}}, "lora.learning_rate", "training.learning_rate"),
        ({"lora": {"rank": 8}}, "lora.rank", "lora.r"),
        ({"trainig": {}}, "trainig", "training"),
        ({"lr": 1e-4}, "lr", "training.learning_rate"),
        ({"engine": {"look_ahead": 2}}, "engine.look_ahead", "engine.lookahead"),
        ({"optimizer": {"nme": "sgd"}}, "optimizer.nme", "optimizer.name"),
        ({"zo": {"momentm": 0.5}}, "zo.momentm", "zo.momentum"),
        ({"optimizer": {"momentm": 0.5}}, "optimizer.momentm", "optimizer.momentum"),
        ({"selection": {"layer": 2}}, "selection.layer", "selection.layers"),
    ],
)
def test_unknown_key_names_the_nearest(values: dict, key: str, nearest: str) -> None:
    found = problems(model="m", **values)
    assert found.keys() == {key}
    assert f"unknown key; nearest: {nearest} " in found[key]


def test_unknown_key_like_no_other() -> None:
    assert problems(model="m", qqqq=[1])["qqqq"] == "unknown key (value [1])"


def test_every_other_name_points_at_a_key() -> None:
    assert set(OTHER_NAMES.values()) <= set(KEYS)


@pytest.mark.parametrize("amount", ["1GiB", "50%", "-2GB", 2**30, None])
def test_byte_amounts_are_kept_as_written(amount: object) -> None:
    assert Config(model="m", host_memory=amount, device_memory=amount, disk=amount).host_memory == amount


@pytest.mark.parametrize("amount", ["0", "1.5", "much", True, 1.5, "120%"])
def test_byte_amounts_that_are_none(amount: object) -> None:
    assert problems(model="m", disk=amount).keys() == {"disk"}


def test_warmup_is_given_once() -> None:
    found = problems(model="m", training={"warmup_steps": 3, "warmup_ratio": 0.1})
    assert found["training"] == "expected warmup_steps or warmup_ratio, found both (3 and 0.1)"


def test_paths_and_data_objects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(model=Path("~/m"), data="~/d.jsonl", eval_data=Path("e.jsonl"), output="~/o")
    assert config.model == str(tmp_path / "m")
    assert config.data == str(tmp_path / "d.jsonl")
    assert config.eval_data == "e.jsonl"
    assert config.output == tmp_path / "o"
    rows = [{"text": "a"}]
    config = Config(model="m", data=rows)
    assert config.data is rows
    text = config.to_yaml()
    assert text.startswith("# data was a Python object (list)\n")
    assert yaml.safe_load(text)["data"] is None


def test_samples_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(finetune.data.options, "SAMPLES", tmp_path)
    (tmp_path / "reviews.jsonl").touch()
    assert Config(model="m", data="sample:reviews").data == str(tmp_path / "reviews.jsonl")
    assert "(reviews), found 'review'" in problems(model="m", data="sample:review")["data"]


def test_configuration_is_frozen() -> None:
    config = Config(model="m")
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 3


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_load_puts_flags_and_settings_on_top(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.yaml", "model: m\nmax_steps: 9\ntraining: {seed: 7, save_steps: 3}\nlora: {extra: {bias: all}}\n"
    )
    config = Config.load(
        file,
        {"max_steps": 4, "training.seed": 0},
        ["training.learning_rate=1e-4", "lora.target_modules=[q_proj, v_proj]", "lora.extra.bias=none",
         "lora.extra.rank_pattern={up_proj: 4}", "training.max_grad_norm=null", "data=a=b.jsonl"],
    )  # fmt: skip
    assert config.training == TrainingOptions(max_steps=4, seed=0, save_steps=3, learning_rate=1e-4, max_grad_norm=None)
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.lora.extra == {"bias": "none", "rank_pattern": {"up_proj": 4}}
    assert config.data == "a=b.jsonl"


def test_flag_and_setting_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="found 4, but training.max_steps is 5"):
        Config.load(None, {"model": "m", "max_steps": 4}, ["training.max_steps=5"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "expected YAML, found: while parsing"),
        ("- model", "expected keys and values, found ['model']"),
        ("model: m\nmax_steps: 1\ntraining: {max_steps: 2}", "max_steps: found 1, but training.max_steps is 2"),
        ("7: 8\nmodel: m", "7: unknown key"),
        ("", "model: missing"),
        ("model: !!python/object/apply:os.getcwd []", "expected YAML"),
    ],
)
def test_file_that_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    file = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError) as error:
        Config.load(file)
    assert str(error.value).startswith(f"1 problem in {file}:\n  ")
    assert words in str(error.value)


@pytest.mark.parametrize("setting", ["training.seed", "=3", "model=[", "model='x", "lora={r: 3, r: 4}"])
def test_setting_that_is_wrong(setting: str) -> None:
    with pytest.raises(ConfigError, match="in --set"):
        Config.load(None, {"model": "m"}, [setting])


def test_settings_that_are_wrong_come_together() -> None:
    with pytest.raises(ConfigError) as error:
        Config.load(None, {"model": "m"}, ["training.seed", "lora.r=8", "train=[a"])
    assert [line.split(":")[0] for line in error.value.problems] == [
        "expected key=value, such as training.max_steps=50, found 'training.seed'", "train",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("output=runs/exp #3", Path("runs/exp #3")),
        ("data=a #b.jsonl", "a #b.jsonl"),
        ("data=*.jsonl", "*.jsonl"),
        ("data=&a", "&a"),
        ("model=runs/a:", "runs/a:"),
        ("model=a: b", "a: b"),
        ("model=- a", "- a"),
        ("model=no", "no"),
        ("model=007", "007"),
        ("model='1'", "1"),
        ("output=123", Path("123")),
        ("output=2024-01-01", Path("2024-01-01")),
        ("output=1_000", Path("1_000")),
        ("output=1:30", Path("1:30")),
        ("output=1e-4", Path("1e-4")),
        ("data=1.5", "1.5"),
        ("eval_data=null", None),
        ("resume=yes", True),
        ("max_steps=1_000", 1000),
        ("training.seed=0x10", 16),
        ("training.max_grad_norm=~", None),
        ("training.learning_rate=1e-4", 1e-4),
        ("zo.epsilon=1e-1", 0.1),
        ("lora.extra.rank_pattern={a: 3}", {"rank_pattern": {"a": 3}}),
        ("lora.extra.layer_replication=1e5", {"layer_replication": 100000.0}),
        ("lora.init_lora_weights=no", False),
        ("lora.target_modules=.*_proj # all", ".*_proj # all"),
        ("lora.target_modules=[on top, b]", ["on top", "b"]),
    ],
)
def test_settings_mean_what_was_typed(setting: str, value: object) -> None:
    config = Config.load(None, {"model": "m", "method": "zo" if setting.startswith("zo.") else "lora"}, [setting])
    key = setting.partition("=")[0].split(".")
    found = getattr(config, key[0]) if key[0] in type(config).model_fields else config.training.max_steps
    for name in key[1:2]:
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_a_truth_value_is_no_number() -> None:
    found = problems(model="m", training={"learning_rate": True, "warmup_ratio": False}, zo={"epsilon": True})
    assert found == {
        "training.learning_rate": "expected a number, found True",
        "training.warmup_ratio": "expected a number, found False",
        "zo.epsilon": "expected a number, found True",
    }


def test_paths_that_are_none() -> None:
    found = problems(model="m", output=None, data=["a.jsonl", 3])
    assert found["output"] == "expected a directory's path, found None"
    assert found["data"].startswith("expected paths, hub ids, a sequence of rows or a datasets.IterableDataset, found 3")


def test_a_section_keeps_what_settings_before_gave_it() -> None:
    config = Config.load(None, {"model": "m"}, ["training.batch_size=3", "training={max_steps: 5, seed: 7}", "training.seed=8"])
    assert (config.training.batch_size, config.training.max_steps, config.training.seed) == (3, 5, 8)


def test_a_seed_has_64_bits() -> None:
    assert Config(model="m", seed=(1 << 64) - 1).training.seed == (1 << 64) - 1
    assert problems(model="m", seed=1 << 64)["training.seed"].startswith("expected a number less than 18446744073709551616")


def test_a_number_with_a_leading_zero_is_not_octal() -> None:
    with pytest.raises(ConfigError, match="training.seed: expected a valid integer, found '010'"):
        Config.load(None, {"model": "m"}, ["training.seed=010"])


def test_setting_below_a_value_is_reported_at_its_key() -> None:
    with pytest.raises(ConfigError, match=r"training.seed: expected a valid integer, found \{'x': 1\}"):
        Config.load(None, {"model": "m"}, ["training.seed.x=1"])


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    text = "model: m\nlora: {r: 3, extra: {a: 1, b: {c: 1, c: 2}}}\ntrain: [x, {y: 1, y: 2}]\nmodel: n\nlora: {r: 4}\n"
    with pytest.raises(ConfigError) as error:
        Config.load(write(tmp_path / "c.yaml", text))
    assert error.value.problems == (
        "lora.extra.b.c: stands twice, in lines 2 and 2: keep one of them",
        "train.1.y: stands twice, in lines 3 and 3: keep one of them",
        "model: stands twice, in lines 1 and 4: keep one of them",
        "lora: stands twice, in lines 2 and 5: keep one of them",
    )


def test_numbers_of_a_file_are_what_they_look_like(tmp_path: Path) -> None:
    text = (
        "model: 2024-01-01\noutput: 1:30\nresume: on\n"
        "training: {lr_scheduler: polynomial, lr_scheduler_kwargs: {lr_end: 1e-9, power: +.5}, learning_rate: 1E3}\n"
        "lora: &l {extra: {bias: all}}\nzo: {epsilon: 1e-3}\n"
    )
    config = Config.load(write(tmp_path / "c.yaml", text))
    assert (config.model, config.output, config.resume) == ("2024-01-01", Path("1:30"), True)
    assert config.training.lr_scheduler_kwargs == {"lr_end": 1e-9, "power": 0.5}
    assert (config.training.learning_rate, config.zo.epsilon) == (1000.0, 1e-3)


def test_what_does_not_go_together_comes_with_the_rest() -> None:
    found = problems(
        method="full", train=["mlp"], selection={"subspace": "columns"}, optimizer={"name": "lamb", "state": "8bit"},
        training={"seed": -1, "warmup_steps": 3, "warmup_ratio": 0.1}, zo={"estimator": "fzoo", "perturbations": 0},
    )  # fmt: skip
    assert found == {
        "model": "missing; name a model directory or hub id (--model, or `model:` in the file)",
        "training.seed": "expected a number greater than or equal to 0, found -1",
        "zo.perturbations": "expected a number greater than or equal to 1, found 0",  # nothing of what fzoo wants
        "training": "expected warmup_steps or warmup_ratio, found both (3 and 0.1)",
        "optimizer": "expected optimizer.state float32 or bfloat16 with lamb, found 8bit",
        "zo.estimator": "expected only with method zo, found with method full",
        "the keys together": "expected method frugal with selection.subspace columns, found full",
    }
    # A method that is none takes no part in what goes together.
    assert problems(model="m", method="fulll", train=["mlp"]).keys() == {"method"}


@pytest.mark.parametrize("method", ["lora", "zo", "full", "lisa"])
def test_keys_that_a_method_does_not_read(method: str) -> None:
    """They would change nothing: all of them are named, and those that are as they are anyway are not."""
    sections = {
        "lora": {"r": 3, "alpha": 32}, "zo": {"epsilon": 0.5}, "optimizer": {"name": "lion", "rank": 32},
        "selection": {"layers": 3}, "training": {"adam_beta1": 0.8, "max_grad_norm": 0.5},
    }  # fmt: skip
    read = {
        "lora": {"lora", "training"}, "zo": {"zo"}, "full": {"optimizer", "training"},
        "lisa": {"optimizer", "selection", "training"},
    }[method]  # fmt: skip
    keys = {"zo.epsilon", "optimizer.name", "selection.layers", "training.adam_beta1", "training.max_grad_norm"}
    expected = {key for key in keys if key.partition(".")[0] not in read}
    assert problems(model="m", method=method, **sections).keys() == expected
    assert Config(model="m", method=method, **{name: sections[name] for name in read}).method == method
    assert Config(model="m", method="zo", zo={"parameters": "lora"}, lora={"r": 3}, training={"max_grad_norm": None})


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("adamw", {"adam_beta1", "adam_epsilon", "state"}),
        ("adafactor", set()),
        ("apollo", {"adam_beta1", "adam_epsilon", "rank", "scale"}),
        ("lion", {"adam_beta1", "state"}),
        ("sgd", {"momentum", "state"}),
    ],
)
def test_keys_that_an_optimizer_does_not_read(name: str, read: set[str]) -> None:
    """They are refused, but in runs that may have been begun with them."""
    options = {"rank": 8, "scale": 2.0, "momentum": 0.5, "state": "bfloat16"}
    training = {"adam_beta1": 0.5, "adam_epsilon": 1e-6}
    values = {"model": "m", "method": "full", "optimizer": options | {"name": name}, "training": training}
    expected = {key: f"{'optimizer' if key in options else 'training'}.{key}" for key in options | training}
    found = problems(**values)
    assert found.keys() == {key for short, key in expected.items() if short not in read}
    if name == "lion":
        assert found["optimizer.rank"] == (
            "expected only with optimizer.name apollo or selection.subspace columns, projection, found with lion"
        )
    assert Config(**values, resume=True).optimizer.rank == 8
    frugal = values | {"method": "frugal", "selection": {"subspace": "columns"}}
    assert not problems(**frugal).keys() & {"optimizer.rank", "training.adam_beta1", "training.adam_epsilon"}


def test_source_that_is_neither_file_nor_preset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)'laptop-16g'.*did you mean laptop-16gb\?"):
        Config.load("laptop-16g")
    with pytest.raises(ConfigError, match="found none in it: name --model and --output"):
        Config.load(tmp_path)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = Config(
        model="1e-4", data="ä.jsonl", eval_data="010", output="1:30", host_memory="-2GB",
        training={"learning_rate": 1e-5, "report_to": ["tensorboard"]},
        lora={"target_modules": ["a", "b"], "extra": {"rank_pattern": {"x.y": 3}}, "init_lora_weights": "pissa"},
        engine={"simulated_copy_gbps": 0.5},
    )  # fmt: skip
    assert Config.load(write(tmp_path / "saved.yaml", config.to_yaml())) == config


class _Reward:
    def __call__(self, completions: list[str], **_: object) -> list[float]:
        return [self.count(one) for one in completions]

    def count(self, text: str) -> float:
        return len(text)


def test_functions_have_names_that_can_be_read(tmp_path: Path) -> None:
    """The same for equal ones, no address in them; those that can be imported stand in the file as a file has them."""
    makers: dict[str, Callable[[], Any]] = {
        "write": lambda: write,
        "_Reward": _Reward,
        "_Reward.count": lambda: _Reward().count,
        "write(a, [1, None], key=_Reward, path=PosixPath)": lambda: partial(
            write, "a", [1, None], path=tmp_path, key=_Reward()
        ),
        "test_functions_have_names_that_can_be_read.<locals>.<lambda>.<locals>.<lambda>": lambda: lambda **_: [],
    }
    for name, make in makers.items():
        assert describe_function(make()) == name.replace("(a,", "('a',")
    functions = [make() for make in makers.values()]
    config = Config(
        model="m", training={"objective": "grpo"}, dataset={"sequence_length": 512},
        grpo={"reward_funcs": functions},
    )  # fmt: skip
    words = ["test_config:write", "<python>:_Reward", "<python>:count", "<python>:write", "<python>:lambda"]
    assert Config.load(write(tmp_path / "saved.yaml", config.to_yaml())).grpo.reward_funcs == words
    assert distinct_names(functions) == ["write", "_Reward", "count", "write_2", "<lambda>"]


def test_settings_of_a_run_serve_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are whole, but of hub ids; what was for one call is left out, and the directory may be another."""
    monkeypatch.chdir(tmp_path)
    for name in ("m", "d.jsonl", "template.jinja", "rewards.py"):
        write(tmp_path / name, "")
    config = Config(
        model="m", data="d.jsonl[:90%]", eval_data="owner/set:test[:5]", method="zo", output="out", resume=True, trace="t.json",
        quantize="nf4", quantization={"cache": "cache"}, zo={"objective": "rewards.py:score"},
        dataset={"chat_template": "template.jinja"}, training={"report_to": "tensorboard"},
    )  # fmt: skip
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    write(moved / "config.yaml", run_text(config))
    assert may_be_replaced(moved / "config.yaml") and may_be_replaced(moved / "none")
    assert not may_be_replaced(tmp_path / "d.jsonl")
    monkeypatch.chdir("/")
    expected = config.model_copy(update={
        "model": str(tmp_path / "m"), "data": f"{tmp_path}/d.jsonl[:90%]", "output": moved, "resume": False, "trace": None,
        "quantization": config.quantization.model_copy(update={"cache": tmp_path / "cache"}),
        "dataset": config.dataset.model_copy(update={"chat_template": str(tmp_path / "template.jinja")}),
    })  # fmt: skip
    assert Config.load(moved) == expected
    assert Config.load(moved, {"max_steps": 3}).training.max_steps == 3
    rows = Config(model="m", data=[{"text": "long " * 999}] * 7)
    assert "data=<7 rows>" in repr(rows) and len(repr(rows)) < 5000
    assert "# data was a Python object (list)" in run_text(rows)


def test_every_key_has_a_sentence_and_a_default_that_is_read_again() -> None:
    keys = list(all_keys())
    assert [key.name for key in keys] == KEYS
    assert all(len(key.sentence) > 9 for key in keys), [key.name for key in keys if len(key.sentence) < 10]
    defaults = [f"{key.name}={key.default}" for key in keys if key.default is not None]
    assert Config.load(None, {"model": "m"}, defaults) == Config(model="m")
    values = {key.name: key.values for key in keys}
    assert values["engine.queue_depth"] == "whole number from 1 or null"
    assert values["training.adam_beta1"] == "number"
    assert values["engine.activations"] == "auto, host, disk"


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_valid_and_says_its_goal(name: str) -> None:
    config = Config.load(name, {"model": "m", "data": "d", "eval_data": None})
    assert config.host_memory is not None
    assert Config.load(find_preset(name), {"model": "m", "data": "d", "eval_data": None}) == config
    preset = next(preset for preset in read_presets() if preset.name == name)
    assert preset.goal.endswith(".") and 20 < len(preset.goal) <= 100
    assert preset.path.read_text().startswith(f"# {preset.goal}\n#\n#   finetune run {name}")


def test_the_presets_are_those_promised() -> None:
    promised = {"tiny-cpu", "laptop-16gb", "laptop-8gb", "8gb-gpu-70b-lora", "24gb-gpu-70b-lora", "cpu-server"}
    assert promised <= set(preset_names())


def test_lora_keys_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    lora = LoraOptions(r=4, alpha=8, dropout=0.1, use_rslora=True, extra={"bias": "all"})
    config = peft.LoraConfig(**lora.peft_arguments())
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 8, 0.1, "all")
    assert (config.use_rslora, config.use_dora, config.init_lora_weights) == (True, False, True)
    assert config.target_modules == "all-linear"


def test_schedulers_are_those_of_transformers() -> None:
    from transformers.trainer_utils import SchedulerType

    known = set(TrainingOptions.model_fields["lr_scheduler"].annotation.__args__)
    assert known == {member.value for member in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}


def test_configuration_imports_nothing_heavy() -> None:
    code = "import sys, finetune.config; print({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_tiny_preset_needs_nothing_more() -> None:
    config = Config.load("tiny-cpu")
    assert Path(config.data).is_file() and Path(config.eval_data).is_file()
    assert config.data != config.eval_data


@pytest.mark.parametrize(
    ("zo", "steps"),
    [
        ({}, 32),
        ({"noise": "gaussian"}, 8),
        ({"noise": "low_rank", "perturbations": 4}, 50),
        ({"perturbations": 7}, 4),
        ({"perturbations": 40}, 1),
        ({"momentum": 0.9, "momentum_window": 5, "perturbations": 2}, 3),
        ({"fold_steps": 9, "perturbations": 7}, 9),
    ],
)
def test_the_pending_noises_of_a_group_are_bounded(zo, steps):
    assert Config(model="m", method="zo", zo=zo).zo.group_steps == steps


@pytest.mark.parametrize(
    ("section", "key", "value", "nearest"),
    [
        ("optimizer", "name", "adamv", "adamw"),
        ("training", "lr_scheduler", "cosin", "cosine"),
        ("zo", "noise", "gausian", "gaussian"),
    ],
)
def test_a_wrong_word_names_the_nearest(section, key, value, nearest):
    with pytest.raises(ConfigError) as caught:
        Config(model="m", method="zo" if section == "zo" else "full", **{section: {key: value}})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{section}.{key}: expected ") and problem.endswith(f", found '{value}'; nearest: {nearest}")



@pytest.mark.parametrize("section", sorted(SECTIONS.keys() - {"adapter"}))  # PEFT knows the keys of that one
def test_every_section_names_its_wrong_keys_and_the_nearest(section):
    key = next(iter(SECTIONS[section].model_fields))
    with pytest.raises(ConfigError) as caught:
        Config(model="m", **{section: {key: object(), f"{key}x": 1}})
    wrong, unknown = caught.value.problems
    assert wrong.startswith(f"{section}.{key}: expected ")
    assert unknown == f"{section}.{key}x: unknown key; nearest: {section}.{key} (value 1)"


def test_a_wrong_name_of_an_optimizer_is_reported_by_its_key():
    with pytest.raises(ConfigError, match=r"optimizer\.name: expected 'adamw', .*, found 'adam'"):
        Config(model="m", method="full", optimizer={"name": "adam"})


def test_an_adapters_keys_beside_another_method_are_named():
    def note(**values):
        return unused_adapter_note(Config(model="m", **values))

    assert note(method="full", lora={"r": 8, "alpha": 32}).endswith("method full, so these keys change nothing: lora.r")
    assert note(method="zo", zo={"parameters": "prefix"}, lora={"r": 8, "dropout": 0.1}).endswith(": lora.r, lora.dropout")
    assert note(lora={"r": 8}) is note(method="zo", zo={"parameters": "lora"}, lora={"r": 8}) is note(method="full") is None
