"""Training of a model's own weights from the outside: resume, kills, damage, full disks, patterns, export."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import kill_again_and_again
from safetensors.torch import save_file
from test_resume import data, data_prepared_here, models  # noqa: F401  fixtures
from test_zeroth_order import assert_same_weights, weights
from text_models import StopAfter, make_config
from tiny_models import keep_at_most
from transformers import TrainerCallback

import finetune.offload.step.engine
import finetune.offload.streamed_model
import finetune.offload.update.trained_weights
import finetune.offload.update.units
import finetune.session
from finetune import Config, Trainer
from finetune.data import preparation
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.offload.residency.io import FaultPlan, IOEngine
from finetune.offload.update.store import StoredPiece, WorkingStore, read_manifest


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(finetune.offload.update.units, "PIECE_BYTES", 8192)


def config_of(model: Path, rows: str, output: Path, method: str = "full", steps: int = 9, **changes: Any) -> Config:
    training = {"max_steps": steps, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2}
    selection = {} if method == "full" else {"interval": 2, "layers": 1}
    values = {"selection": selection, "engine": {"dtype": model.name}} | changes
    return make_config(model, output, data=rows, method=method, training=training | values.pop("training", {}), **values)


SETTINGS = {
    "full": ("full", {}),
    "exact clipping": ("full", {"optimizer": {"clipping": "exact"}}),
    "no master, 8 bit": ("full", {"optimizer": {"master": "none", "state": "8bit"}}),
    "bf16 state": ("full", {"optimizer": {"state": "bfloat16"}}),
    "one version": ("full", {"optimizer": {"versions": 1}}),
    "lion": ("full", {"optimizer": {"name": "lion"}, "training": {"learning_rate": 1e-3}}),
    "sgd": ("full", {"optimizer": {"name": "sgd"}}),
    "lamb": ("full", {"optimizer": {"name": "lamb", "state": "bfloat16"}, "training": {"weight_decay": 0.1}}),
    "adafactor": ("full", {"optimizer": {"name": "adafactor"}}),
    "apollo": ("full", {"optimizer": {"name": "apollo", "rank": 4, "refresh_steps": 3}}),
    "beside an accelerator": ("full", {"device": "simulated", "optimizer": {"clipping": "exact"}}),
    "lisa": ("lisa", {}),
    "lisa, adafactor": ("lisa", {"optimizer": {"name": "adafactor"}}),
    "frugal, adafactor": ("frugal", {"optimizer": {"name": "adafactor"}}),
    "badam": ("badam", {"selection": {"interval": 2, "layers": 1, "order": "alternating"}}),
    "slimfit": ("slimfit", {}),
    "frugal": ("frugal", {"selection": {"interval": 2, "layers": 1, "sign_scale": 0.1}}),
    "frugal, projection": (
        "frugal", {"selection": {"interval": 2, "subspace": "projection", "sign_scale": 0.1}, "optimizer": {"rank": 4}}
    ),
    "frugal, columns, ends by lion": (
        "frugal",
        {
            "selection": {"interval": 4, "subspace": "columns", "sign_scale": 0.1},
            "optimizer": {"rank": 4, "name": "lion"}, "training": {"learning_rate": 1e-3},
        },
    ),
}  # fmt: skip


@pytest.mark.every(4)
@pytest.mark.parametrize(("method", "changes"), SETTINGS.values(), ids=SETTINGS)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(method, changes, models, data, tmp_path):  # noqa: F811
    model = models["bfloat16"]
    whole = config_of(model, data, tmp_path / "whole", method, **changes)
    losses = [json.loads(line)["loss"] for line in _metrics(whole)]
    assert losses[-1] < losses[0]
    parts = config_of(model, data, tmp_path / "parts", method, **changes)
    for stop in (2, 5):
        Trainer(parts.model_copy(update={"resume": stop > 2}), callbacks=[StopAfter(stop)]).train()
    # A run's directory can be moved and goes on elsewhere.
    shutil.move(parts.output, tmp_path / "moved")
    parts = parts.model_copy(update={"output": tmp_path / "moved", "resume": True})
    result = Trainer(parts).train()
    assert (result.global_step, result.report["first_step"]) == (9, 5)
    export(whole, tmp_path / "a")
    export(parts, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert not all(value.equal(weights(model)[name]) for name, value in weights(tmp_path / "a").items())


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_state_that_is_kept_is_not_read(name, models, data, tmp_path, monkeypatch):  # noqa: F811
    def read_in_last_step(output: str) -> int:
        config = config_of(models["bfloat16"], data, tmp_path / output, optimizer={"name": name})
        return json.loads(_metrics(config)[-1])["disk_read_bytes"]

    all_kept = read_in_last_step("all")
    keep_at_most(0, monkeypatch)
    none_kept = read_in_last_step("none")
    keep_at_most(1, monkeypatch)
    pieces = [StoredPiece(*values) for _, _, *values in read_manifest(tmp_path / "none" / "store")["pieces"]]
    times = 2 if name == "lamb" else 1
    assert none_kept - all_kept == times * sum(piece.master_bytes + piece.state_bytes for piece in pieces)
    assert all_kept < read_in_last_step("some") < none_kept


def used_bytes(config: Config) -> int:
    """Of the store's data file, up to the last byte that the newest step has there."""
    pieces = [StoredPiece(*values) for _, _, *values in read_manifest(config.output / "store")["pieces"]]
    return max(sum(place) for piece in pieces for place in piece.ranges)


def _metrics(config: Config) -> list[str]:
    Trainer(config).train()
    return (config.output / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lisa"])
def test_a_killed_run_goes_on(method, models, data, tmp_path, monkeypatch):  # noqa: F811
    """Killed at random moments of its steps and commits."""
    monkeypatch.undo()  # the other processes cut pieces as usual
    steps = 25
    whole = config_of(models["bfloat16"], data, tmp_path / "whole", method, steps)
    Trainer(whole).train()
    config = config_of(models["bfloat16"], data, tmp_path / "killed", method, steps).model_copy(update={"resume": True})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    preparation.prepare(data, model=config.model, cache_dir=config.output / "tokens", sequence_length=64)
    manifest = config.output / "store" / "manifest.json"
    kills = kill_again_and_again(
        tmp_path / "run.yaml", lambda: manifest.stat().st_mtime_ns if manifest.exists() else 0, 3, 0.15
    )
    assert kills >= 2
    Trainer(config).train()
    export(config, tmp_path / "a")
    export(whole, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.every(3)
@pytest.mark.parametrize("part", ["weights", "master", "state"])
def test_a_flipped_bit_is_found(part, models, data, tmp_path):  # noqa: F811
    config = config_of(models["bfloat16"], data, tmp_path / "out")
    Trainer(config, callbacks=[StopAfter(3)]).train()
    store = config.output / "store"
    pieces = [piece for piece in read_manifest(store)["pieces"] if ".layers.1" in piece[0]]
    _, _, offset, weights_bytes, master_bytes, state_offset, state_bytes, *_ = pieces[len(pieces) // 2]
    at = {"weights": offset + 77, "master": offset + weights_bytes + 78, "state": state_offset + 79}[part]
    assert master_bytes and state_bytes
    with open(store / "data", "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 16]))
    with pytest.raises(UserError, match="checksum"):
        Trainer(config.model_copy(update={"resume": True})).train()
    assert read_manifest(store)["step"] == 3
    if part == "weights":
        with pytest.raises(UserError, match="checksum"):
            export(config, tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_a_failing_disk_leaves_the_last_committed_step(models, data, tmp_path, monkeypatch):  # noqa: F811
    config = config_of(models["float32"], data, tmp_path / "out")
    whole = config_of(models["float32"], data, tmp_path / "whole")
    Trainer(whole).train()
    monkeypatch.setattr(
        finetune.offload.streamed_model, "IOEngine", lambda *args: IOEngine(*args, inject=FaultPlan(eio_at=700))
    )
    with pytest.raises(UserError, match=r"Input/output error.*Step \d+ is the last committed one"):
        Trainer(config).train()
    monkeypatch.setattr(finetune.offload.streamed_model, "IOEngine", IOEngine)
    step = read_manifest(config.output / "store")["step"]
    assert 0 < step < 9
    result = Trainer(config.model_copy(update={"resume": True})).train()
    assert result.report["first_step"] == step
    export(whole, tmp_path / "a")
    export(config, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_only_what_matches_is_trained(models, data, tmp_path):  # noqa: F811
    model = models["bfloat16"]
    config = config_of(model, data, tmp_path / "out").model_copy(update={"train": [r"layers\.1\..*mlp", "norm.weight"]})
    Trainer(config).train()
    export(config, tmp_path / "model")
    before, after = weights(model), weights(tmp_path / "model")
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert changed and all("layers.1." in name and "mlp" in name or name.endswith("norm.weight") for name in changed)
    assert any("mlp" in name for name in changed) and any("norm" in name for name in changed)


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield
    os.umask(old)


def test_the_trainer_saves_the_model(models, data, tmp_path, umask):  # noqa: F811
    model = shutil.copytree(models["bfloat16"], tmp_path / "bfloat16")
    beside = {
        "LICENSE": b"free", "modeling_own.py": b"", "additional_chat_templates/rag.jinja": b"RAG", "a/b/c.txt": b"\0\xff",
        "onnx/config.json": b"{}",
    }  # fmt: skip
    others = ("onnx/model.onnx", "pytorch_model.bin", "pytorch_model.bin.index.json", ".cache/lock", "original/c.00.pth")
    for name, content in (beside | dict.fromkeys(others, b"x")).items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    kept = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()} - set(others)
    trainer = Trainer(config_of(model, data, model / "out", "lisa", 3))
    trainer.train()
    with pytest.raises(UserError, match="expected a directory"):
        trainer.save_model()
    export(trainer.config, tmp_path / "exported")
    saved = trainer.save_model(tmp_path / "saved")
    assert_same_weights(saved, tmp_path / "exported")
    assert {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()} == kept | {"README.md"}
    assert all((saved / name).read_bytes() == content for name, content in beside.items())
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in (saved, *saved.rglob("*"))}
    assert modes == {(True, 0o750), (False, 0o640)}
    result = evaluate(Config(model=str(tmp_path / "saved"), data=data, host_memory="4GiB"))
    assert 0 < result["loss"] < 20


def test_one_version_is_not_left_within_a_step(models, data, tmp_path):  # noqa: F811
    """Ctrl-C in a step waits for its end, where a store of one version would be lost."""
    config = config_of(models["bfloat16"], data, tmp_path / "out", optimizer={"versions": 1})

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(config, callbacks=[Interrupt()]).train()
    manifest = read_manifest(config.output / "store")
    assert (manifest["step"], manifest["writing"]) == (5, False)
    assert Trainer(config.model_copy(update={"resume": True})).train().report["first_step"] == 5


def test_patterns_that_match_nothing_are_refused(models, data, tmp_path):  # noqa: F811
    config = config_of(models["bfloat16"], data, tmp_path / "out")
    for pattern, words in (("layers.99", "matches no parameter"), ("(", "is not a regular expression")):
        with pytest.raises(UserError, match=words):
            Trainer(config.model_copy(update={"train": [pattern]})).train()


def test_the_store_of_another_run_is_refused(models, data, tmp_path):  # noqa: F811
    config = config_of(models["bfloat16"], data, tmp_path / "out")
    Trainer(config, callbacks=[StopAfter(2)]).train()
    with pytest.raises(UserError, match="holds a run of 2 steps"):
        Trainer(config).train()
    other = config_of(models["bfloat16"], data, tmp_path / "out", optimizer={"state": "8bit"})
    with pytest.raises(UserError, match="other settings .*optimizer.state"):
        Trainer(other.model_copy(update={"resume": True})).train()


def test_a_store_that_is_open_is_refused(models, data, tmp_path):  # noqa: F811
    config = config_of(models["bfloat16"], data, tmp_path / "out")
    Trainer(config, callbacks=[StopAfter(1)]).train()
    config = config.model_copy(update={"resume": True})
    with IOEngine() as io:
        store = WorkingStore(config.output / "store", io, {}, resume=True)
        for use in (Trainer(config).train, partial(export, config, tmp_path / "model")):
            with pytest.raises(UserError, match="open in another process"):
                use()
        store.close()
    export(config, tmp_path / "model")


def test_a_store_is_given_up_when_the_model_cannot_be_opened(models, data, tmp_path, monkeypatch):  # noqa: F811
    config = config_of(models["bfloat16"], data, tmp_path / "out", steps=2)

    def fail(*args):
        raise UserError("no head today")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no head today"):
        patch.setattr(finetune.offload.update.trained_weights, "StreamedParts", fail)
        Trainer(config).train()
    Trainer(config).train()


def test_weights_that_a_model_uses_twice_are_refused(models, data, tmp_path, monkeypatch):  # noqa: F811
    config = config_of(models["bfloat16"], data, tmp_path / "out")
    cut = finetune.session.cut

    def tied(*args, **options):
        parts = cut(*args, **options)
        one, other = (f"{parts.prefixes[i]}.mlp.up_proj.weight" for i in (0, 1))
        parts.sources[one] = parts.sources[other]
        return parts

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"one weight at several places .*up_proj"):
        patch.setattr(finetune.session, "cut", tied)
        Trainer(config).train()

    run = finetune.offload.step.engine.Engine._run_forward

    def twice(engine, *args):
        run(engine, *args)
        engine.order = [*engine.order, 1]

    with monkeypatch.context() as patch, pytest.raises(UserError, match="2 times in a pass"):
        patch.setattr(finetune.offload.step.engine.Engine, "_run_forward", twice)
        Trainer(config).train()


def test_too_little_disk_is_refused_before_the_first_step(models, data, tmp_path):  # noqa: F811
    config = config_of(models["bfloat16"], data, tmp_path / "out").model_copy(update={"disk": "100KiB"})
    with pytest.raises(UserError, match="working store"):
        Trainer(config).train()
    assert not (config.output / "store").exists()


def test_too_little_memory_is_refused(models, data, tmp_path):  # noqa: F811
    config = config_of(models["bfloat16"], data, tmp_path / "out", host_memory="100MiB")
    with pytest.raises(PlanRefused, match="buffers for optimizer state"):
        Trainer(config).train()


def test_the_store_stays_as_large_as_was_planned(models, data, tmp_path):  # noqa: F811
    """Of every method, over several changes of blocks."""
    for method in ("full", "lisa", "badam", "frugal"):
        config = config_of(models["bfloat16"], data, tmp_path / method, method)
        planned = Trainer(config).plan()
        Trainer(config).train()
        assert 0 < used_bytes(config) <= planned.store.num_bytes


def test_a_tight_disk_takes_half(models, data, tmp_path):  # noqa: F811
    sizes = {}
    for versions in (1, 2):
        config = config_of(models["bfloat16"], data, tmp_path / str(versions), steps=8, optimizer={"versions": versions})
        Trainer(config).train()
        sizes[versions] = used_bytes(config)
        assert sizes[versions] <= Trainer(config).plan().store.num_bytes
    assert sizes[1] * 2 == sizes[2]


def test_a_copy_of_the_model_in_other_files_is_refused(models, data, tmp_path):  # noqa: F811
    """Pieces of the store follow the files: read by another order of the same tensors they would be other weights."""
    config = config_of(models["bfloat16"], data, tmp_path / "out", steps=2)
    Trainer(config).train()
    copy = tmp_path / "bfloat16"
    shutil.copytree(config.model, copy)
    for path in [*copy.glob("*.safetensors"), *copy.glob("*.index.json")]:
        path.unlink()
    save_file(weights(Path(config.model)), copy / "model.safetensors", {"format": "pt"})
    moved = config.model_copy(update={"model": str(copy), "resume": True})
    for use in (lambda: Trainer(moved).train(), lambda: export(moved, tmp_path / "tuned")):
        with pytest.raises(UserError, match="in these files the same tensors lie otherwise"):
            use()
    export(config, tmp_path / "tuned")
