"""`max_writes`: what a run writes to disk in all, predicted, counted, and kept below its limit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from text_models import make_config, write_model, write_rows

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.config.sweep import check_together
from finetune.memory.errors import UserError
from finetune.runs import writes

ROWS = [{"prompt": f"hello {i} there", "completion": " cat" if i % 3 else " was great"} for i in range(8)]
STEP_BYTES, START_BYTES = 1000, 7_000_000  # of a process that counts in tests


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


def config_of(model: Path, output: Path, method: str, **more) -> Config:
    data = write_rows(output.parent / "rows.jsonl", ROWS)
    training = {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2, "save_steps": 1}
    return make_config(model, output, data=data, method=method, training=training, **more)


def metrics_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_what_is_written_is_in_the_metrics(model, tmp_path):
    Trainer(config_of(model, tmp_path / "run", "full")).train()
    rows = metrics_of(tmp_path / "run")
    moved = [row["disk_write_bytes"] for row in rows]
    assert min(moved) > 0
    for before, after in zip(rows, rows[1:], strict=False):
        assert after[writes.WRITTEN] >= before[writes.WRITTEN] + after["disk_write_bytes"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_would_write_more_is_refused_before_it_writes(model, tmp_path, method):
    config = config_of(model, tmp_path / "run", method, max_writes="10KB")
    for start in (Trainer(config).train, Trainer(config).plan)[: 2 if method == "full" else 1]:
        with pytest.raises(UserError, match=r"max_writes: 4 steps would write about .* a step; 9\.8 KiB are allowed"):
            start()
    assert not (tmp_path / "run" / "store").exists() and not (tmp_path / "run" / "state").exists()


def test_enough_steps_are_named(model, tmp_path):
    config = config_of(model, tmp_path / "run", "full")
    step_bytes = Trainer(config).plan().values["disk_write_bytes"]
    limited = config.model_copy(update={"max_writes": 3 * step_bytes + step_bytes // 2})
    with pytest.raises(UserError, match="enough for about 3 steps: lower --max-steps"):
        Trainer(limited).plan()
    Trainer(config.model_copy(update={"max_writes": 5 * step_bytes})).plan()


def test_a_run_stops_below_its_limit_and_goes_on_with_more(model, tmp_path, monkeypatch):
    """A counter that rises by more than was predicted of a step: three fit, since the next one and a save have to."""
    Trainer(config_of(model, tmp_path / "whole", "lora")).train()
    counted = [START_BYTES]
    monkeypatch.setattr(writes, "_written_by_process", lambda: counted[0])
    step = writes.WriteCount.check_next

    def check_next(self):
        step(self)
        counted[0] += STEP_BYTES

    monkeypatch.setattr(writes.WriteCount, "check_next", check_next)
    monkeypatch.setattr("finetune.one_run.check_writes", lambda *_: None)
    config = config_of(model, tmp_path / "run", "lora", max_writes=4 * STEP_BYTES)
    with pytest.raises(UserError, match="max_writes: .* are written, and a step writes up to .* raise --max-writes"):
        Trainer(config).train()
    assert [row[writes.WRITTEN] for row in metrics_of(tmp_path / "run")] == [STEP_BYTES, 2 * STEP_BYTES, 3 * STEP_BYTES]
    Trainer(config.model_copy(update={"max_writes": 9 * STEP_BYTES, "resume": True})).train()
    assert metrics_of(tmp_path / "run")[-1][writes.WRITTEN] == 4 * STEP_BYTES
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_was_written_and_lost_counts(model, tmp_path, monkeypatch):
    """Of three steps the second is the last that was saved."""
    Trainer(config_of(model, tmp_path / "run", "lora")).train()
    rows = [{"step": step, "loss": 1.0, writes.WRITTEN: 100 * step} for step in (1, 2, 3)]
    assert writes.WriteCount(config_of(model, tmp_path / "run", "lora"), rows).earlier_bytes == 300
    states = tmp_path / "run" / "state"
    for state in sorted(states.iterdir())[-1:]:
        shutil.rmtree(state)
    before = max(row[writes.WRITTEN] for row in metrics_of(tmp_path / "run"))
    Trainer(config_of(model, tmp_path / "run", "lora", resume=True)).train()
    assert metrics_of(tmp_path / "run")[-1][writes.WRITTEN] > before


def test_shares_mean_nothing(model, tmp_path):
    with pytest.raises(ConfigError, match="max_writes"):
        config_of(model, tmp_path / "run", "lora", max_writes="50%")


def test_a_sweep_has_none(model, tmp_path):
    with pytest.raises(ConfigError, match="expected no max_writes"):
        check_together({"one": config_of(model, tmp_path / "run", "lora", max_writes="1TB")})
