"""Runs that step together: each with the bits that it has alone, and the model read as for one."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from data_tools import prepare_in_this_process
from text_models import StopAfter, write_model, write_rows
from text_models import make_config as text_config
from tiny_models import make_config, save_tiny, token_data
from transformers import TrainerCallback

import finetune.one_run
import finetune.sweep
from finetune import Config, Sweep, Trainer
from finetune.config import ConfigError
from finetune.config.sweep import read_sweep
from finetune.data import TokenDataset
from finetune.memory.errors import UserError
from finetune.needs_of_model import ADAPTERS, GRADIENTS
from finetune.planner import Planner
from finetune.sweeps.outcomes import read_outcomes
from finetune.sweeps.places import plan_places


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TokenDataset:
    return token_data(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(autouse=True)
def quick_data(monkeypatch) -> None:
    """A TokenDataset given as data is used as it is."""
    prepare = finetune.one_run.prepare_for

    def prepare_for(config: Config, source: Any, *to: Any, **options: Any) -> Any:
        return source if isinstance(source, TokenDataset) else prepare(config, source, *to, **options)

    monkeypatch.setattr(finetune.one_run, "prepare_for", prepare_for)


def files_of(output: Path) -> dict[str, bytes]:
    """What a run leaves that is the same in every process, by name."""
    found = [output / "adapter" / "adapter_model.safetensors", output / "adapter" / "adapter_config.json"]
    found += sorted((output / "state").glob("*/tensors.safetensors"))[-1:]
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


def losses_of(output: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row.get(key) for key in ("step", "loss", "grad_norm", "learning_rate", "eval_loss")) for row in rows]


def assert_as_alone(output: Path, alone: Path) -> None:
    assert losses_of(output) == losses_of(alone)
    found, expected = files_of(output), files_of(alone)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def alone(config: Config, output: Path) -> Path:
    Trainer(config.model_copy(update={"output": output})).train()
    return output


def test_two_runs_read_as_one(model, data, tmp_path):
    base = {"engine": {"dtype": "float32", "num_threads": 1, "resident_blocks": 0}}
    configs = {
        "small": make_config(model, data, tmp_path / "sweep", **base),
        "large": make_config(
            model, data, tmp_path / "sweep", **base, lora={"r": 5, "alpha": 3, "dropout": 0.2},
            training={"learning_rate": 1e-3, "seed": 12},
        ),
    }
    Sweep(configs).train()
    assert_as_alone(tmp_path / "sweep" / "small", alone(configs["small"], tmp_path / "small"))
    together, by_itself = (
        json.loads((tmp_path / where / "report.json").read_text())["measured"]["disk_read_bytes"]
        for where in ("sweep/small", "small")
    )
    assert 0 < together <= by_itself


def rows_of(path: Path, count: int) -> str:
    return write_rows(path, [{"text": f"the cat sat on {i} mats and hello {'there ' * (i % 4)}"} for i in range(count)])


def pairs_of(path: Path) -> str:
    words = [" great", " terrible indeed", " about the mat"]
    rows = [{"prompt": f"the cat {i}", "chosen": words[i % 3], "rejected": words[(i + 1) % 3]} for i in range(5)]
    return write_rows(path, rows)


def unlike_runs(folder: Path, model: Path) -> dict[str, Config]:
    """Of unlike data, objectives, adapters, schedules and lengths."""
    data, pairs = rows_of(folder / "a.jsonl", 9), pairs_of(folder / "b.jsonl")
    training = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3}
    own = {
        "pairs": {
            "data": pairs, "eval_data": pairs,
            "training": {**training, "max_steps": 2, "objective": "dpo", "lr_scheduler": "cosine"},
            "lora": {"r": 2, "dropout": 0.3, "target_modules": ["c_attn"]},
        },
        "packed": {
            "data": data, "eval_data": data, "dataset": {"packing": True}, "sequence_length": 48,
            "training": {**training, "max_steps": 3, "weight_decay": 0.1, "eval_steps": 2, "seed": 3},
            "lora": {"r": 4, "dropout": 0.2, "use_dora": True},
        },
    }  # fmt: skip
    return {name: text_config(model, folder / "sweep", **values) for name, values in own.items()}


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            signal.raise_signal(signal.SIGINT)


def with_places(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many runs step together, though there is memory for more."""

    def plan(*args: Any) -> tuple[int, Any]:
        found, planned = plan_places(*args)
        return min(count, found), planned

    monkeypatch.setattr(finetune.sweep, "plan_places", plan)


def test_unlike_runs_are_interrupted_and_go_on_and_have_the_bits_of_their_own(tmp_path, monkeypatch, capsys):
    """A model with dropout of its own, so that what one run measures must not change another's mode."""
    prepare_in_this_process(monkeypatch)
    configs = unlike_runs(tmp_path, write_model("gpt2", tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt) as stop:
        Sweep(configs, make_callbacks=lambda name: [Interrupt(1)] if name == "packed" else []).train()
    found = read_outcomes(tmp_path / "sweep")
    assert {one.state for one in found.values()} == {"stopped"}
    assert found["packed"].steps == stop.value.step == 1
    outcomes = Sweep({name: config.model_copy(update={"resume": True}) for name, config in configs.items()}).train()
    for name, config in configs.items():
        assert_as_alone(tmp_path / "sweep" / name, alone(config, tmp_path / name))
    assert [(one.state, one.steps) for one in sorted(outcomes, key=lambda one: one.name)] == [("finished", 3), ("finished", 2)]
    losses = {one.name: one.evaluation["loss"] for one in outcomes}
    assert [one.name for one in outcomes] == sorted(losses, key=losses.get)
    assert losses["packed"] == losses_of(tmp_path / "packed")[-1][-1]
    assert f"{losses['pairs']:.4f}" in capsys.readouterr().out


def test_a_run_that_ends_early_or_fails_frees_its_place(model, data, tmp_path, monkeypatch, capsys):
    with_places(1, monkeypatch)
    rates = {"diverges": 1e38, "ends early": 1e-3}
    configs = {
        name: make_config(model, data, tmp_path / "sweep", training={"learning_rate": rate, "warmup_steps": 0})
        for name, rate in rates.items()
    }
    with pytest.raises(UserError, match="1 of 2 runs failed: diverges: .*lower training.learning_rate"):
        Sweep(configs, make_callbacks=lambda name: [StopAfter(1)] if name == "ends early" else []).train()
    found = read_outcomes(tmp_path / "sweep")
    assert {name: one.state for name, one in found.items()} == {"diverges": "failed", "ends early": "finished"}
    assert found["diverges"].steps < 4 and found["ends early"].steps == 1
    assert "failed: " in capsys.readouterr().out.splitlines()[2]  # the last rank
    # What has ended is not done again.
    mark = tmp_path / "sweep" / "ends early" / "adapter" / "mark"
    mark.touch()
    Sweep({"ends early": configs["ends early"].model_copy(update={"resume": True})}).train()
    assert mark.exists()


def test_as_many_runs_fit_as_the_memory_holds(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Planner, "process_bytes", 300 << 20)

    def plan(memory: int | str) -> Any:
        least = {"host_memory": memory, "engine": {"kept_graphs": 0, "resident_blocks": 0, "lookahead": 0}}
        lora = {"target_modules": ["q_proj"]}
        configs = {
            str(rank): make_config(model, data, tmp_path / "sweep", lora={"r": rank, **lora}, **least) for rank in (9000, 10000)
        }
        return Sweep(configs).plan()

    ample = plan("4GiB")
    assert (ample.together, ample.total) == (2, 2)
    adapters = sum(item.num_bytes for item in ample.planned.needs.items if item.name in (ADAPTERS, GRADIENTS))
    assert adapters == 16 * 5 * (40 + 48) * (9000 + 10000)  # values, gradients and two moments, in fp32
    memory = ample.planned.plan.host_peak_bytes - adapters // 4  # less than the smaller one takes
    tight = plan(memory)
    assert tight.together == 1 and "2 runs: 1 fit together" in tight.describe()
    assert tight.planned.plan.host_peak_bytes <= memory


WORDS = {
    "combinations": (
        ["lora.r=8,16", "learning_rate=1e-4,3e-4"],
        ["r=8,learning_rate=1e-4", "r=8,learning_rate=3e-4", "r=16,learning_rate=1e-4", "r=16,learning_rate=3e-4"],
    ),
    "lists": (
        ["lora.target_modules=[q_proj,v_proj],all-linear"], ["target_modules=q_proj_v_proj", "target_modules=all-linear"],
    ),
    "paths": (["data=/x/a.jsonl,b.jsonl"], ["data=a.jsonl", "data=b.jsonl"]),
    "files": (["{a}", "{b}", "seed=1"], ["a,seed=1", "b,r=2,seed=1", "b,r=3,seed=1"]),
    "one file": (["{b}"], ["r=2", "r=3"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_words_are_runs_with_names(case, tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\nlora: {alpha: 5}\n")
    (tmp_path / "b.yaml").write_text("model: m\nsweep: {lora.r: [2, 3]}\n")
    words, names = WORDS[case]
    words = [word.format(a=tmp_path / "a.yaml", b=tmp_path / "b.yaml") for word in words]
    runs = read_sweep(words, {"model": "m"}, ["training.batch_size=3"])
    assert list(runs) == names
    assert all(run.config.training.batch_size == 3 for run in runs.values())
    if case == "combinations":
        found = [(run.config.lora.r, run.config.learning_rate) for run in runs.values()]
        assert found == [(8, 1e-4), (8, 3e-4), (16, 1e-4), (16, 3e-4)]
        assert runs[names[1]].own == {"lora.r": 8, "training.learning_rate": 3e-4}
    if case == "files":
        assert [(run.config.lora.alpha, run.config.lora.r) for run in runs.values()] == [(5, 16), (32, 2), (32, 3)]


REFUSED = {
    "another method": (["method=lora,zo"], "method=zo: expected method lora, found zo"),
    "another base": (["model=a,b"], "model: expected the same in all runs"),
    "no key": (["lora.rank=1,2"], "lora.rank: unknown key; nearest: lora.r"),
    "twice": (["seed=1,2", "training.seed=3"], "training.seed: is swept twice"),
    "set too": (["training.batch_size=1,2"], "training.batch_size: is swept, and set for all runs too"),
    "the same value": (["seed=1,1"], "two runs are called seed=1"),
    "a bad value": (["lora.r=8,x"], "lora.r"),
    "no list": (["{a}"], "sweep: expected keys with lists of values"),
    "a file that is a sweep's, and another base": (["{b}", "{c}"], "model: expected the same in all runs, found 'm' in b,r=2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sweep_is_refused(case, tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\nsweep: [1, 2]\n")
    (tmp_path / "b.yaml").write_text("model: m\nsweep: {lora.r: [2]}\n")
    (tmp_path / "c.yaml").write_text("model: n\n")
    words, message = REFUSED[case]
    words = [word.format(a=tmp_path / "a.yaml", b=tmp_path / "b.yaml", c=tmp_path / "c.yaml") for word in words]
    settings = ["training.batch_size=3"]
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_sweep(words, {} if case == "a file that is a sweep's, and another base" else {"model": "m"}, settings)
    if case == "no list":
        with pytest.raises(ConfigError, match="use `finetune sweep`"):
            Config.load(tmp_path / "b.yaml")


def test_adapters_outside_of_blocks_are_refused(model, data, tmp_path):
    configs = {"head": make_config(model, data, tmp_path / "sweep", lora={"target_modules": ["lm_head", "q_proj"]})}
    with pytest.raises(UserError, match="head: .*expected adapters of linear layers inside its blocks, found one of lm_head"):
        Sweep(configs).train()
    assert not (tmp_path / "sweep" / "head" / "run.json").exists()
