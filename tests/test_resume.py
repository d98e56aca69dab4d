"""A run that is stopped, killed or interrupted, and goes on: the same losses and the same adapter, bit for bit."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from text_models import StopAfter, make_config, write_model, write_rows
from transformers import AutoTokenizer

from finetune import Config, Trainer
from finetune.data import preparation, worker
from finetune.memory.errors import UserError

LONG = 80  # steps: enough for a signal to arrive in the middle
WORDS = "the cat sat on mat hello there world what is it about user assistant was great terrible".split()
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Left:
    """What a run leaves: (step, loss, learning rate) of every row of metrics, and the adapter."""

    rows: list[tuple[int, float, float]]
    adapter: dict[str, torch.Tensor]

    @classmethod
    def by(cls, config: Config) -> Left:
        rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
        adapter = load_file(config.output / "adapter" / "adapter_model.safetensors")
        return cls([(row["step"], row["loss"], row["learning_rate"]) for row in rows], adapter)


def assert_same(found: Left, expected: Left) -> None:
    assert found.rows == expected.rows
    assert found.adapter.keys() == expected.adapter.keys()
    for name, value in expected.adapter.items():
        assert found.adapter[name].equal(value), name


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    rows = [
        {"prompt": " ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(3 + i % 9)), "completion": f" {WORDS[i % 17]}"}
        for i in range(17)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {name: write_model("llama", folder / name, dtype=dtype) for name, dtype in dtypes.items()}


@pytest.fixture(autouse=True)
def data_prepared_here(monkeypatch) -> None:
    """Without a process for each data set, which costs seconds; other tests hold that."""
    monkeypatch.setattr(worker, "_load_tokenizer", lambda job: AutoTokenizer.from_pretrained(job.tokenizer))
    monkeypatch.setattr(
        preparation, "_run_worker", lambda job, _: worker.run(worker.Job(**job), lambda rows, tokens: None)
    )


def run_config(model: Path, data: str, output: Path, steps: int, *, resume: bool = False, **training) -> Config:
    """Everything that could be lost: dropout, warm-up, moments, clipping, and epochs that end within the run."""
    return make_config(
        model, output, data=data, resume=resume,
        training={
            "max_steps": steps, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3, "warmup_steps": 2,
            "max_grad_norm": 0.1, "weight_decay": 0.01, "save_steps": 5,
        } | training,
        lora={"r": 3, "dropout": 0.1},
        engine={"dtype": model.name},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(models, data, tmp_path, dtype):
    whole = run_config(models[dtype], data, tmp_path / "whole", 6)
    Trainer(whole).train()
    expected = Left.by(whole)
    assert [step for step, _, _ in expected.rows] == [1, 2, 3, 4, 5, 6]
    assert len({loss for _, loss, _ in expected.rows}) == 6

    first = run_config(models[dtype], data, tmp_path / "parts", 6)
    assert Trainer(first, callbacks=[StopAfter(3)]).train().global_step == 3
    assert Left.by(first).rows == expected.rows[:3]
    result = Trainer(run_config(models[dtype], data, tmp_path / "parts", 6, resume=True)).train()
    assert (result.global_step, result.report["first_step"]) == (6, 3)
    assert_same(Left.by(first), expected)


def test_resuming_a_finished_run_changes_nothing(models, data, tmp_path):
    config = run_config(models["float32"], data, tmp_path, 2)
    Trainer(config).train()
    before = Left.by(config)
    result = Trainer(run_config(models["float32"], data, tmp_path, 2, resume=True)).train()
    assert result.global_step == 2
    assert_same(Left.by(config), before)


def test_evaluating_in_the_middle_changes_nothing(models, data, tmp_path, capsys):
    plain = run_config(models["float32"], data, tmp_path / "plain", 4)
    Trainer(plain).train()
    capsys.readouterr()
    config = run_config(models["float32"], data, tmp_path / "evaluated", 4, eval_steps=2)
    Trainer(config.model_copy(update={"eval_data": data})).train()
    assert_same(Left.by(config), Left.by(plain))
    out, said = capsys.readouterr()
    assert not out  # which is the caller's
    assert [line.split(":")[0] for line in said.splitlines() if "evaluation: loss" in line] == ["step 2", "step 4"]


def test_resume_with_nothing_saved_starts_afresh(models, data, tmp_path):
    afresh = run_config(models["float32"], data, tmp_path / "afresh", 2)
    Trainer(afresh).train()
    resumed = run_config(models["float32"], data, tmp_path / "resumed", 2, resume=True)
    Trainer(resumed).train()
    assert_same(Left.by(resumed), Left.by(afresh))


def test_a_run_without_resume_leaves_no_rows_of_the_one_before(models, data, tmp_path):
    Trainer(run_config(models["float32"], data, tmp_path, 3)).train()
    config = run_config(models["float32"], data, tmp_path, 2)
    Trainer(config).train()
    assert [step for step, _, _ in Left.by(config).rows] == [1, 2]


def test_resume_with_other_settings_is_refused(models, data, tmp_path):
    Trainer(run_config(models["float32"], data, tmp_path, 2)).train()
    config = run_config(models["float32"], data, tmp_path, 4, resume=True, learning_rate=1e-3, seed=7)
    with pytest.raises(UserError) as refused:
        Trainer(config).train()
    message = str(refused.value)
    assert "learning_rate: 0.005 then, 0.001 now" in message and "seed: 42 then, 7 now" in message
    assert "Use the same settings, or another --output" in message
    assert [step for step, _, _ in Left.by(config).rows] == [1, 2]


def test_a_damaged_state_is_refused_and_the_one_before_serves(models, data, tmp_path):
    whole = run_config(models["float32"], data, tmp_path / "whole", 6)
    Trainer(whole).train()
    config = run_config(models["float32"], data, tmp_path / "parts", 6, resume=True, save_steps=2)
    Trainer(config, callbacks=[StopAfter(4)]).train()
    states = sorted((config.output / "state").iterdir())
    assert [state.name for state in states] == ["step-00000002", "step-00000004"]
    tensors = states[-1] / "tensors.safetensors"
    os.truncate(tensors, tensors.stat().st_size - 1)
    with pytest.raises(UserError, match="step-00000004 is damaged.*remove .*; --resume then goes on from step 2"):
        Trainer(config).train()
    for path in states[-1].iterdir():
        path.unlink()
    states[-1].rmdir()
    assert Trainer(config).train().report["first_step"] == 2
    assert_same(Left.by(config), Left.by(whole))


@pytest.fixture(scope="module")
def unbroken(models, data, tmp_path_factory) -> Left:
    config = run_config(models["float32"], data, tmp_path_factory.mktemp("unbroken"), LONG)
    with pytest.MonkeyPatch.context() as patch:
        data_prepared_here.__wrapped__(patch)
        Trainer(config).train()
    return Left.by(config)


def start(config: Config, folder: Path) -> subprocess.Popen[str]:
    """The same run by the real command, up to its first metrics."""
    (folder / "run.yaml").write_text(config.to_yaml())
    data = config.data
    preparation.prepare(data, model=config.model, cache_dir=config.output / "tokens", sequence_length=64)
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "run", str(folder / "run.yaml")],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = config.output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 12:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def test_a_killed_run_goes_on_from_what_was_committed(models, data, tmp_path, unbroken):
    config = run_config(models["float32"], data, tmp_path / "out", LONG)
    process = start(config, tmp_path)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # The last row may be half written, as a machine that dies leaves it.
    with (config.output / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": ')
    result = Trainer(config.model_copy(update={"resume": True})).train()
    assert 10 <= result.report["first_step"] < LONG and result.report["first_step"] % 5 == 0
    assert_same(Left.by(config), unbroken)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(models, data, tmp_path, unbroken):
    config = run_config(models["float32"], data, tmp_path / "out", LONG)
    process = start(config, tmp_path)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130, words
    reached = Left.by(config)
    step = reached.rows[-1][0]
    assert step < LONG and reached.rows == unbroken.rows[:step]
    assert f"the state after step {step} is saved" in words
    said = words.splitlines()
    command = shlex.split(said[said.index("Interrupted. Go on from the last committed step with:") + 1])
    assert command == ["finetune", "resume", str(config.output)]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {step}" in done.stderr
    assert_same(Left.by(config), unbroken)
