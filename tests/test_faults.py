"""Faults in mid-run: files that cannot be written, signals, readers that go away. What is done is kept, and goes on.

A limit of the process on the size of files (RLIMIT_FSIZE) stands for a full disk: every way of writing meets it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_resume import ROOT, WORDS, data, models, run_config  # noqa: F401  fixtures
from test_resume import data_prepared_here as data_prepared_here_everywhere
from test_weight_runs import config_of
from test_zeroth_order import zo_config
from transformers import TrainerCallback

import finetune.adapters.peft_files
import finetune.methods.adapter_training
import finetune.offload.step.activations
import finetune.one_run
import finetune.runs.signals
from finetune import Config, Trainer
from finetune.memory.errors import UserError
from finetune.methods.zeroth_order import ZerothOrder
from finetune.offload.perturb.journal import Journal
from finetune.reporting.progress import Progress
from finetune.reporting.report import MetricsWriter

FULL = "File too large"  # strerror(EFBIG)


@contextmanager
def full_disk() -> Iterator[None]:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def fail_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, until: ExitStack | None = None) -> None:
    """The disk is full while `owner.name` runs for the `call`th time, or from then on until `until` is left."""
    function, calls = getattr(owner, name), []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) != call:
            return function(*arguments, **options)
        if until is not None:
            until.enter_context(full_disk())
            return function(*arguments, **options)
        with full_disk():
            return function(*arguments, **options)

    patch.setattr(owner, name, wrapped)


class FullFrom(TrainerCallback):
    """Nothing can be written any more once `step` steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.full = full_disk()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.full.__enter__()


def lora(model: Path, rows: str, output: Path, **training: Any) -> Config:
    return run_config(model, rows, output, 6, **{"save_steps": 2} | training)


def spilling(model: Path, rows: str, output: Path) -> Config:
    config = lora(model, rows, output)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"activations": "disk"})})


def zo(model: Path, rows: str, output: Path) -> Config:
    return zo_config(model, rows, output, 6, {"fold_steps": 2})


def full(model: Path, rows: str, output: Path) -> Config:
    return config_of(model, rows, output, steps=5)


FAULTS = {
    "metrics": (lora, MetricsWriter, "write", 4),
    "state": (lora, finetune.methods.adapter_training, "save_state", 2),
    "adapter": (lora, finetune.adapters.peft_files, "save", 1),
    "report": (lora, finetune.one_run, "write_report", 1),
    "block inputs": (spilling, finetune.offload.step.activations.SpillingActivations, "_spill", 9),
    "journal": (zo, Journal, "append", 4),
    "a new journal": (zo, Journal, "create", 1),
    "fold": (zo, ZerothOrder, "_fold", 2),
    "metrics beside the store": (full, MetricsWriter, "write", 4),
}


@pytest.fixture
def preparing_process() -> None:
    """This test is about it."""


@pytest.fixture(autouse=True)
def data_prepared_here(monkeypatch, request) -> None:
    if "preparing_process" not in request.fixturenames:
        data_prepared_here_everywhere.__wrapped__(monkeypatch)


@pytest.fixture(scope="module")
def whole(models, data, tmp_path_factory) -> dict[Any, list[tuple[int, float]]]:  # noqa: F811
    """Steps and losses of unbroken runs."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        data_prepared_here_everywhere.__wrapped__(patch)
        for make in (lora, zo, full):
            config = make(models["float32"], data, tmp_path_factory.mktemp("whole"))
            Trainer(config).train()
            found[make] = rows(config)
    found[spilling] = found[lora]
    return found


def rows(config: Config) -> list[tuple[int, float]]:
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_written_ends_the_run_in_a_sentence(fault, whole, models, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    make, owner, name, call = FAULTS[fault]
    monkeypatch.setattr(finetune.offload.step.activations, "SPILL_MIN_BYTES", 64)
    config = make(models["float32"], data, tmp_path)
    with monkeypatch.context() as patch, ExitStack() as mended:
        fail_at(patch, owner, name, call, mended)
        with pytest.raises(UserError) as failed:
            Trainer(config).train()
    said = f"{failed.value} {capsys.readouterr().err}"
    assert FULL in str(failed.value) and str(tmp_path) in said and "\n" not in str(failed.value)
    assert "--resume" in said or fault == "a new journal"
    Trainer(config.model_copy(update={"resume": True})).train()
    lost = 4 if fault == "metrics beside the store" else None  # the step itself is kept
    assert rows(config) == [row for row in whole[make] if row[0] != lost]


def test_the_state_is_saved_where_that_is_possible(models, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    config = lora(models["float32"], data, tmp_path, save_steps=100)
    with monkeypatch.context() as patch:
        fail_at(patch, MetricsWriter, "write", 4)
        with pytest.raises(UserError, match="metrics.jsonl: File too large.*state is .*step-00000004: go on with --resume"):
            Trainer(config).train()
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 3
    assert Trainer(config.model_copy(update={"resume": True})).train().report["first_step"] == 4


def test_a_full_disk_that_stays_full(whole, models, data, tmp_path, capsys):  # noqa: F811
    config, fills = lora(models["float32"], data, tmp_path), FullFrom(5)
    try:
        with pytest.raises(UserError, match="File too large.*newest saved state is .*step-00000004: go on with --resume"):
            Trainer(config, callbacks=[fills]).train()
    finally:
        fills.full.__exit__(None, None, None)
    Trainer(config.model_copy(update={"resume": True})).train()
    assert rows(config) == whole[lora]


class SignalAt(TrainerCallback):
    """Sends signals at an event: at `on_step_begin` of the step after `step` steps, or before the first one."""

    def __init__(self, event: str, numbers: list[int], step: int = 0) -> None:
        self.numbers, self.step = numbers, step
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


@pytest.fixture
def no_signal_yet(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(finetune.runs.signals, "_last_seconds", float("-inf"))
    # A shell's background jobs ignore some.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_sent_twice_stops_in_order(no_signal_yet, number, whole, models, data, tmp_path, capsys):  # noqa: F811
    config = lora(models["float32"], data, tmp_path, save_steps=100)
    with pytest.raises(finetune.runs.signals.Stopped) as stopped:
        Trainer(config, callbacks=[SignalAt("on_step_begin", [number, number], 3)]).train()
    assert (stopped.value.number, stopped.value.step) == (number, 3)
    assert signal.getsignal(number) is signal.default_int_handler
    assert "stopped; the state after step 3 is saved" in capsys.readouterr().err
    Trainer(config.model_copy(update={"resume": True})).train()
    assert rows(config) == whole[lora]


def test_a_second_signal_after_a_moment_stops_at_once(no_signal_yet, models, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(finetune.runs.signals, "REPEAT_SECONDS", 0)
    config = lora(models["float32"], data, tmp_path)
    with pytest.raises(finetune.runs.signals.StoppedAtOnce) as stopped:
        Trainer(config, callbacks=[SignalAt("on_step_begin", [signal.SIGINT] * 2, 3)]).train()
    assert stopped.value.step == 2
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000002"]


def test_a_signal_before_the_first_step_claims_nothing(no_signal_yet, models, data, tmp_path, capsys):  # noqa: F811
    config = lora(models["float32"], data, tmp_path)
    with pytest.raises(finetune.runs.signals.Stopped) as stopped:
        Trainer(config, callbacks=[SignalAt("on_train_begin", [signal.SIGINT])]).train()
    assert stopped.value.step == 0 and "saved in" not in capsys.readouterr().err
    assert not (tmp_path / "state").exists() and not (tmp_path / "adapter").exists()


def test_nohup_is_respected(no_signal_yet):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with finetune.runs.signals.stop_requests():
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(finetune.runs.signals.Stopped):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_data_is_prepared_leaves_nothing(no_signal_yet, preparing_process, number, models, tmp_path):  # noqa: F811
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": " ".join(WORDS)}) + "\n" for _ in range(100_000)))
    tokens = tmp_path / "out" / "tokens"

    def send() -> None:
        deadline = time.monotonic() + 60
        while not list(tokens.glob(".preparing-*/*/*/tokens.int32")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(finetune.runs.signals.Stopped):
        Trainer(run_config(models["float32"], str(rows), tmp_path / "out", 2)).train()
    thread.join()
    assert list(tokens.iterdir()) == [] and psutil.Process().children() == []


def test_the_preparing_process_dies_with_its_parent():
    child = "from finetune.data.worker import _die_with_parent as f; import time; f(); print(flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "\n"  # the child lives
    process.kill()
    process.communicate(timeout=30)  # the pipe ends when its last writer, the child, does


def test_a_reader_that_goes_away_loses_nothing_else():
    reader, writer = os.pipe()
    stream = open(writer, "w")  # noqa: SIM115
    progress = Progress(3, host_budget_bytes=1, stream=stream)
    progress.message("seen")
    assert os.read(reader, 99) == b"seen\n"
    os.close(reader)
    for _ in range(2):
        progress.message("not seen")
    stream.close()
