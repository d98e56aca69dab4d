"""What a user does with `quantize`: plans, runs, evaluation and text over the cache, and the cache itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from data_tools import prepare_in_this_process
from packed_checkpoints import edit
from safetensors.torch import load_file
from test_cli import invoke
from text_models import StopAfter, make_config, write_model, write_rows

from finetune import Trainer
from finetune.config import Config, ConfigError
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.generate import generate
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.offload.files.lock import lock
from finetune.offload.files.sealed import seal, unseal
from finetune.quantization.cache import cache_home, cached_models, open_lock, partial_path, remove_cached

pytestmark = pytest.mark.every(3)

TRAINING = {"max_steps": 3, "batch_size": 2, "learning_rate": 5e-3}


@pytest.fixture(autouse=True)
def quick_data(monkeypatch, tmp_path):
    prepare_in_this_process(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache home"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture
def model(plain, tmp_path) -> Path:
    """Of the test's own, with the times of a model that was not touched."""
    return shutil.copytree(plain, tmp_path / "tiny")


@pytest.fixture
def rows(tmp_path) -> str:
    texts = [{"prompt": f"hello the {i} cat", "completion": " sat on the mat"} for i in range(5)]
    return write_rows(tmp_path / "rows.jsonl", texts)


def config(model: Path, output: Path, rows: str, **more: Any) -> Config:
    return make_config(model, output, data=rows, training=TRAINING, lora={"r": 3}, **more)


def only_model() -> Path:
    (found,) = cached_models(cache_home())
    assert found.is_whole
    return found.path


BITS = {"quantize": 6.5, "quantization": {"nested": False}}
"""That make both kinds of matrices."""


@pytest.mark.parametrize("kind", ["nf4", "int8", 8.7])
def test_a_run_is_that_over_the_published_checkpoint(kind, model, rows, tmp_path):
    """Trained, stopped and resumed, evaluated, asked; the adapter names the model that the user named."""
    here = config(model, tmp_path / "here", rows, quantize=kind)
    Trainer(here, callbacks=[StopAfter(2)]).train()
    made = only_model()
    assert all(path.stat().st_mode & 0o077 == 0 for path in (made, *made.iterdir()))
    assert not (made / "progress.json").exists() and {path.name for path in made.parent.iterdir()} == {
        made.name, f".{made.name}.lock",
    }  # fmt: skip
    times = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    Trainer(config(model, tmp_path / "here", rows, quantize=kind, resume=True)).train()
    there = config(shutil.copytree(made, tmp_path / "published"), tmp_path / "there", rows)
    Trainer(there).train()
    found, expected = (load_file(c.output / "adapter" / "adapter_model.safetensors") for c in (here, there))
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in found)
    assert json.loads((here.output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    results = [evaluate(c, c.output)["loss"] for c in (here, there)]
    assert results[0] == results[1] != evaluate(config(model, tmp_path / "bare", rows))["loss"]
    texts = ["".join(generate(c, c.output, ["the cat"], max_new_tokens=5)) for c in (here, there)]
    assert texts[0] == texts[1]
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == times
    with pytest.raises(UserError, match="and --quantize as then"):
        evaluate(config(model, tmp_path / "here", rows), here.output)
    with pytest.raises(UserError, match=f"quantize: {kind!r} then, None now"):
        Trainer(config(model, tmp_path / "here", rows, resume=True)).train()


@pytest.mark.parametrize("quantize", [{"quantize": "nf4"}, BITS], ids=str)
def test_zeroth_order_steps_move_an_adapter_over_it(quantize, model, rows, tmp_path):
    losses = []
    for name, more in (("here", quantize), ("there", {})):
        base = model if more else only_model()
        zo = make_config(
            base, tmp_path / name, data=rows, method="zo", training=TRAINING, zo={"parameters": "lora"}, lora={"r": 3}, **more
        )
        losses.append(Trainer(zo).train().training_loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("parameters", ["scales", "all"])
@pytest.mark.parametrize("kind", ["nf4", BITS["quantize"]])
def test_what_is_tuned_of_it_is_exported(kind, parameters, model, rows, tmp_path):
    """Scales into the same formats, noise in products into plain weights."""
    zo = {"parameters": parameters} | ({} if parameters == "scales" else {"perturb": "products", "noise": "low_rank"})
    written = []
    quantize = BITS | {"quantize": kind}
    for name, more in (("here", quantize), ("there", {})):
        base = model if more else only_model()
        training = TRAINING | {"learning_rate": 1e-3}
        tuned = make_config(base, tmp_path / name, data=rows, method="zo", training=training, zo=zo, **more)
        Trainer(tuned).train()
        export(tuned, tmp_path / f"{name}-exported")
        files = sorted((tmp_path / f"{name}-exported").glob("*.safetensors"))
        written.append({key: value for file in files for key, value in load_file(file).items()})
        if more:
            with pytest.raises(UserError, match="and --quantize as then"):
                export(make_config(model, tmp_path / name, method="zo"), tmp_path / "wrong")
    assert written[0].keys() == written[1].keys() and all(written[0][key].equal(written[1][key]) for key in written[0])
    original = {key: value for file in only_model().glob("*.safetensors") for key, value in load_file(file).items()}
    scales = {key for key in original if key.endswith((".absmax", ".SCB"))}
    assert {key.rpartition(".")[2] for key in scales} == ({"absmax"} if kind == "nf4" else {"absmax", "SCB"})
    assert scales & written[0].keys() == (scales if parameters == "scales" else set())
    key = "model.layers.1.mlp.up_proj.weight"
    keys = scales if parameters == "scales" else {key}
    assert all(not written[0][key].equal(original[key]) for key in keys)


@pytest.mark.parametrize("quantize", [{"quantize": "nf4"}, BITS], ids=str)
def test_the_plan_before_is_the_plan_after(quantize, model, rows, tmp_path):
    here = config(model, tmp_path / "out", rows, **quantize)
    before = Trainer(here).plan()
    words = "to nf4" if quantize is not BITS else "to 6.5 bits: matrices with 6."
    assert not cache_home().exists() and f"to be quantised first, {words}" in before.describe()
    assert "free there" in before.describe()
    evaluate(here)
    after = Trainer(here).plan()
    assert after.plan.slots == before.plan.slots and after.streamed == before.streamed
    process = "process (interpreter, libraries, model skeleton)"
    parts = [{name: size for name, size in p.plan.host_parts.items() if name != process} for p in (before, after)]
    assert parts[0] == parts[1]
    assert f"kept in {only_model()}" in after.describe() and "relative RMS error" in after.describe()
    for planned in (before, after):
        assert (re.search(r"\(\d+ in nf4, \d+ in int8\); ", planned.describe()) is not None) == (quantize is BITS)


def test_what_cannot_run_is_refused_before_it_is_quantised(model, rows, tmp_path):
    with pytest.raises(PlanRefused):
        Trainer(config(model, tmp_path / "out", rows, quantize="nf4", host_memory="64MiB")).train()
    with pytest.raises(UserError, match="stored as bitsandbytes"):
        Trainer(make_config(model, tmp_path / "out", data=rows, method="full", quantize="nf4")).train()
    assert not cache_home().exists()


def test_a_budget_that_quantising_exceeds_is_refused(model, rows, tmp_path, monkeypatch):
    """By what the process takes, or by the buffers alone."""
    for budget in ("64MiB", "1MiB"):
        with pytest.raises(UserError, match="quantising takes .* allowed: raise --host-memory"):
            evaluate(config(model, tmp_path / "out", rows, quantize="nf4", host_memory=budget))
        monkeypatch.setattr("finetune.quantization.base.host_bytes", lambda: 0)


def test_a_small_disk_is_refused(model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.quantization.base.free_bytes", lambda directory: 1 << 20)
    with pytest.raises(UserError, match="are to be written there and 64.0 MiB left free, 1.0 MiB are free: make room"):
        evaluate(config(model, tmp_path / "out", rows, quantize="nf4"))
    assert not cached_models(cache_home())


def test_a_changed_model_is_quantised_again(model, rows, tmp_path):
    """Also where the sample of its weights is the same."""
    here = config(model, tmp_path / "out", rows, quantize="nf4", quantization={"cache": str(tmp_path / "kept")})
    evaluate(here)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = next(tensors[name] for path in model.glob("*.safetensors") if name in (tensors := load_file(path)))
    weight[:, ::2] *= -1
    edit(model, {name: weight})
    loss = evaluate(here)["loss"]
    assert len(cached_models(tmp_path / "kept")) == 2 and not cached_models(cache_home())
    shutil.rmtree(tmp_path / "kept")
    assert evaluate(here)["loss"] == loss
    (model / "tokenizer_config.json").touch()
    evaluate(here)
    assert len(cached_models(tmp_path / "kept")) == 2


def test_one_of_a_model_that_changes_meanwhile_is_not_kept(model, rows, tmp_path, monkeypatch):
    here = config(model, tmp_path / "out", rows, quantize="nf4")
    with monkeypatch.context() as patch:
        touch = (model / "tokenizer_config.json").touch
        patch.setattr("finetune.reporting.progress.Ticker.__call__", lambda self, done, total: touch())
        with pytest.raises(UserError, match="files have changed while they were quantised: start again"):
            evaluate(here)
    assert not cached_models(cache_home())


def test_scales_that_are_not_nested_are_another_model(model, rows, tmp_path):
    for nested in (True, False):
        evaluate(config(model, tmp_path / "out", rows, quantize="nf4", quantization={"nested": nested}))
    small, large = sorted(found.num_bytes for found in cached_models(cache_home()))
    assert len(cached_models(cache_home())) == 2 and small < large


DAMAGES = {
    "cut": ("model-00002-of-00003.safetensors", lambda content: content[:-1]),
    "changed": ("model-00002-of-00003.safetensors", lambda content: content[:-20] + bytes(20)),  # a tensor's end: of the sample
    "config": ("config.json", lambda content: content.replace(b'"num_hidden_layers": 3', b'"num_hidden_layers": 2')),
    "note": ("quantized.json", lambda content: content.replace(b'"kind": "int8"', b'"kind": "int9"')),
    "format": ("quantized.json", lambda content: json.dumps(seal(unseal(json.loads(content)) | {"format": 0})).encode()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_made_again(damage, model, rows, tmp_path):
    here = config(model, tmp_path / "out", rows, quantize="int8")
    loss, made = evaluate(here)["loss"], only_model()
    name, change = DAMAGES[damage]
    content = (made / name).read_bytes()
    (made / name).write_bytes(change(content))
    assert (made / name).read_bytes() != content
    assert evaluate(here)["loss"] == loss
    assert only_model() == made and (made / name).read_bytes() == content


def test_an_interrupted_one_is_listed_and_goes_on(model, rows, tmp_path, monkeypatch):
    here = config(model, tmp_path / "out", rows, quantize="nf4")

    def stop(self, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finetune.reporting.progress.Ticker.__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(here)
    (found,) = cached_models(cache_home())
    assert not found.is_whole and found.num_bytes and "unfinished" in invoke("cache").output
    assert "are there from an earlier process" in Trainer(here).plan().describe()
    evaluate(here)
    assert not list(cache_home().glob(".*.partial")) and only_model().name == found.name


def test_each_number_of_bits_is_another_model(model, rows, tmp_path):
    for bits in ("6.5", 6.5, 7, 7.25):
        evaluate(config(model, tmp_path / "out", rows, **(BITS | {"quantize": bits})))
    found = cached_models(cache_home())
    assert [one.about["bits"] for one in sorted(found, key=lambda one: one.num_bytes)] == [6.5, 7.0, 7.25]
    assert all(one.about["matrix_bits"] <= one.about["bits"] and "bits-" in one.name for one in found)
    with pytest.raises(UserError, match="tiny: 8.5 bits a weight are too few: its matrices take at least 8.683, with scales"):
        Trainer(config(model, tmp_path / "out", rows, quantize=8.5)).plan()


def test_the_cache_is_listed_and_emptied(model, rows, tmp_path):
    evaluate(config(model, tmp_path / "out", rows, quantize="nf4"))
    made = only_model()
    assert all(path.stat().st_mode & 0o077 == 0 for path in (made, *made.rglob("*")))
    name = made.name
    listed = invoke("cache", "list").output
    assert name in listed and f"of {model}" in listed and str(cache_home()) in listed
    assert invoke("cache", "--cache", str(tmp_path / "none")).output.split()[0] == "0"
    assert invoke("cache", "remove").exit_code == 1
    assert "expected list or remove" in invoke("cache", "delete").output
    wrong = invoke("cache", "remove", "other")
    assert wrong.exit_code == 1 and "found 'other'; there are: " in wrong.output
    descriptor = open_lock(cache_home(), name)
    lock(descriptor, shared=True)
    with pytest.raises(UserError, match="in use by another process"):
        remove_cached(cache_home(), name)
    os.close(descriptor)
    left = partial_path(cache_home(), f"{name}.removed")  # by a process that was killed while it removed
    left.mkdir()
    (left / "model.safetensors").touch()
    removed = invoke("cache", "remove", name)
    assert removed.exit_code == 0 and "removed" in removed.output and not cached_models(cache_home())


def test_two_at_once_make_one(model, rows, tmp_path, capsys):
    results: list[float] = []

    def work(name: str) -> None:
        results.append(evaluate(config(model, tmp_path / name, rows, quantize="nf4"))["loss"])

    threads = [threading.Thread(target=work, args=(f"out-{i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert capsys.readouterr().err.count("quantised in ") == 1
    only_model()


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"quantize": "nf5"}, "quantize: expected nf4, int8, or bits a weight above 4 .* and below 16 .*, found 'nf5'"),
        *(({"quantize": value}, "quantize: expected nf4, int8, or bits") for value in (4, 16, "nan", True, -5, [5], "")),
        ({"quantize": "int8", "quantization": {"nested": False}}, "nested only with quantize nf4 or bits"),
        ({"quantization": {"cache": "x"}}, "cache only with quantize"),
    ],
)
def test_keys_that_say_nothing_are_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        Config(model="m", **keys)
