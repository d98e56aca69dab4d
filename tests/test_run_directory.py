"""A run owns its directory and nothing else in it; it goes on as the same run, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import data_prepared_here  # noqa: F401
from text_models import StopAfter, make_config, write_model, write_rows
from transformers import TrainerCallback

from finetune import Config, Trainer
from finetune.data.tensor_rows import TensorRows
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import read_checkpoint
from finetune.offload.files.lock import lock
from finetune.offload.files.new_directory import new_directory
from finetune.offload.files.sealed import unseal
from finetune.offload.weights.digest import model_digest
from finetune.runs.directory import RunDirectory, reading
from finetune.runs.identity import RunIdentity, model_name, settings
from finetune.runs.listing import describe_runs, find_runs

ROWS = [{"prompt": f"hello {i} there", "completion": " cat" if i % 3 else " was great"} for i in range(7)]
OTHER_METHODS = {"lora": "zo", "zo": "full", "full": "lora"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def config_of(model: Path | str, data: object, output: Path, method: str = "lora", **changes) -> Config:
    training = {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2, "save_steps": 1} | changes.pop("training", {})
    return make_config(model, output, data=data, method=method, training=training, **changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(model, data, tmp_path_factory) -> dict[str, Path]:
    """A run of each method after 2 of 4 steps; to be copied."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        data_prepared_here.__wrapped__(patch)
        for method in OTHER_METHODS:
            Trainer(config_of(model, data, folder / method, method), callbacks=[StopAfter(2)]).train()
    return {method: folder / method for method in OTHER_METHODS}


@pytest.fixture
def copied(stopped, tmp_path):
    def copy(method: str) -> Path:
        return Path(shutil.copytree(stopped[method], tmp_path / method))

    return copy


def test_runs_are_listed_and_compared(model, data, copied, tmp_path):
    copied("lora"), copied("zo")
    Trainer(config_of(model, data, tmp_path / "deep" / "er", training={"learning_rate": 3e-3}, eval_data=data)).train()
    shutil.rmtree(tmp_path / "zo" / "tokens")
    runs = find_runs([tmp_path])
    assert [(str(run.directory.relative_to(tmp_path)), run.step, run.state) for run in runs] == [
        ("deep/er", 4, "finished"), ("lora", 2, "finished"), ("zo", 2, "finished")
    ]  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "deep" / "er" / "metrics.jsonl").open()]
    assert runs[0].loss == rows[-1]["loss"] and runs[0].measured["loss"] == rows[-1]["eval_loss"]
    lines = describe_runs(runs).splitlines()
    assert lines[0].split()[:4] == ["run", "method", "model", "step"] and "accuracy" in lines[0]
    assert [line.split()[:4] for line in lines[2:4]] == [
        [str(tmp_path / method), method, "llama", "2/4"] for method in ("lora", "zo")
    ]
    assert "settings that differ:" in lines and any(
        line.split() == ["training.learning_rate", "0.003", "0.01", "0.01"] for line in lines
    )
    held = RunDirectory(tmp_path / "zo")
    held.take(config_of(model, data, tmp_path / "zo", "zo", resume=True))
    assert find_runs([tmp_path / "zo"])[0].state == "running"
    held.close()
    (tmp_path / "zo" / "report.json").unlink()
    assert find_runs([tmp_path / "zo"])[0].state == "stopped"
    assert "settings" not in describe_runs(runs[:1])
    with pytest.raises(UserError, match="expected the directory of a run, or one with runs in it, found none"):
        find_runs([tmp_path / "zo" / "state"])


class TestOneProcess:
    @pytest.mark.parametrize("method", OTHER_METHODS)
    def test_a_second_one_is_refused(self, method, model, data, tmp_path, copied):
        config = config_of(model, data, copied(method), method, resume=True)
        before = files(config.output)
        held = RunDirectory(config.output)
        held.take(config)
        with pytest.raises(UserError, match=rf"{method} is in use by another process \({os.getpid()}\): wait for it"):
            Trainer(config).train()
        held.close()
        assert files(config.output) == before
        assert Trainer(config).train().global_step == 4
        assert not (config.output / "run.lock").exists()

    def test_of_many_that_start_at_once_one_has_it(self, tmp_path):
        """The lock's file goes when its holder does: who has opened it before must not take it for the lock."""
        holders, most, had, mistakes = [], 0, [], []

        def hold_again_and_again(number: int) -> None:
            nonlocal most
            for _ in range(60):
                directory = RunDirectory(tmp_path / "out")
                try:
                    directory.take(Config(model="m"))
                    holders.append(number)
                    most = max(most, len(holders))
                    had.append(number)
                    holders.remove(number)
                except UserError as error:
                    if "in use by another process" not in str(error):
                        mistakes.append(error)
                finally:
                    directory.close()

        threads = [threading.Thread(target=hold_again_and_again, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not mistakes and most == 1 and len(had) > 1
        assert list((tmp_path / "out").iterdir()) == []

    def test_readers_share_and_keep_runs_out(self, model, data, copied):
        config = config_of(model, data, copied("zo"), "zo", resume=True)
        with reading(config.output) as first, reading(config.output) as second:
            assert first and second
            with pytest.raises(UserError, match="is in use by another process"):
                Trainer(config).train()
        assert Trainer(config).train().global_step == 4

    def test_a_lock_that_a_killed_process_left_is_none(self, model, data, copied):
        config = config_of(model, data, copied("lora"), resume=True)
        (config.output / "run.lock").write_text("12345\n")
        assert Trainer(config).train().global_step == 4


class TestAnEarlierRun:
    @pytest.mark.parametrize("method", ["lora", "zo"])
    def test_is_set_aside_whole(self, method, model, data, copied, capsys):
        output = copied(method)
        before = files(output)
        config = config_of(model, data, output, method, training={"seed": 9})
        Trainer(config, callbacks=[StopAfter(1)]).train()
        assert f"the earlier run in {output} was set aside in {output / 'previous' / '1'} (" in capsys.readouterr().err
        kept = files(output / "previous" / "1")
        assert kept == {name: content for name, content in before.items() if not name.startswith("tokens/")}
        # What goes on is the new run, though the earlier one had done more.
        report = Trainer(config.model_copy(update={"resume": True})).train().report
        assert (report["first_step"], report["steps"]) == (1, 4)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]

    def test_of_another_method_too(self, model, data, copied):
        output = copied("zo")
        Trainer(config_of(model, data, output, "lora")).train()
        assert (output / "previous" / "1" / "journal.zo").is_file() and not (output / "journal.zo").exists()
        with pytest.raises(UserError, match="found an adapter: .* needs no export"):
            export(config_of(model, data, output), output / "tuned")

    def test_of_the_size_of_the_model_is_refused(self, model, data, copied):
        output = copied("full")
        before = files(output)
        for method in ("full", "lora"):
            with pytest.raises(UserError, match="store holds a run of 2 steps: go on with --resume"):
                Trainer(config_of(model, data, output, method)).train()
        assert files(output) == before

    def test_counts_towards_the_disk(self, model, data, copied):
        config = config_of(model, data, copied("lora"), disk="1MB")
        with pytest.raises(UserError, match=r"allowed by --disk beside .* of earlier runs") as refused:
            Trainer(config).train()
        assert not (config.output / "previous").exists()
        needed = re.search(r"--disk (\d+MiB)", str(refused.value))[1]  # what is named helps
        Trainer(config.model_copy(update={"disk": needed})).train()
        with pytest.raises(UserError, match="allowed by --disk:"):
            Trainer(config.model_copy(update={"disk": "10KB"})).plan()

    def test_is_set_aside_even_if_the_first_attempt_was_killed(self, model, data, copied, monkeypatch):
        config = config_of(model, data, copied("lora"), training={"seed": 9})
        rename, calls = os.rename, []

        def killed(old, new):
            if Path(new).parent.name == "1":
                calls.append(new)
                if len(calls) == 2:
                    raise KeyboardInterrupt
            rename(old, new)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "rename", killed)
            Trainer(config).train()
        assert len(list((config.output / "previous" / "1").iterdir())) == 2  # run.json and one of the others
        with pytest.raises(UserError, match="killed before its first step"):
            export(config, config.output / "tuned")
        report = Trainer(config.model_copy(update={"resume": True})).train().report
        assert report["first_step"] == 0
        kept = {path.name for path in (config.output / "previous" / "1").iterdir()}
        assert kept == {"run.json", "config.yaml", "state", "adapter", "metrics.jsonl", "report.json", "report.html"}

    def test_is_not_moved_from_under_the_new_one(self, model, data, copied):
        output = copied("zo")
        shutil.copytree(model, output / "weights" / "step-00000002")
        with pytest.raises(UserError, match="belongs to the earlier run in .* which would be set aside"):
            Trainer(config_of(output / "weights" / "step-00000002", data, output, "zo")).train()


class TestWhatNoRunHasMade:
    @pytest.mark.parametrize(
        ("method", "name", "kind"),
        [
            ("lora", "adapter/notes.txt", "file"), ("lora", "state/step-00000001/mine.bin", "file"), ("lora", "state", "file"),
            ("lora", "adapter", "link"), ("zo", "weights/model.safetensors", "file"), ("zo", "journal.zo", "file"),
            ("zo", "weights/step-00000003/mine.bin", "file"), ("full", "store/data", "file"), ("lora", "metrics.jsonl", "link"),
            ("lora", "run.json", "file"), ("full", "scratch", "file"), ("lora", "run.lock", "file"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("resume", [False, True])
    def test_is_refused_and_stays(self, method, name, kind, resume, tmp_path):
        output = tmp_path / "out"
        path = output / name
        path.parent.mkdir(parents=True)
        if kind == "link":
            (tmp_path / "elsewhere").mkdir()
            (tmp_path / "elsewhere" / "mine.bin").write_text("mine")
            path.symlink_to(tmp_path / "elsewhere")
        else:
            path.write_text("mine")
        before = sorted(output.rglob("*"))
        config, directory = Config(model="m", method=method, output=output, resume=resume), RunDirectory(output)
        with pytest.raises(UserError, match=rf"{path.parts[len(output.parts)]}.*(no run has made|is not the journal)"):
            directory.take(config)
        directory.close()
        assert sorted(output.rglob("*")) == before
        assert (path / "mine.bin" if kind == "link" else path).read_text() == "mine"

    def test_beside_an_earlier_run_too(self, model, data, copied):
        output = copied("lora")
        (output / "adapter" / "tokenizer.json").write_text("mine")
        with pytest.raises(UserError, match=r"adapter/tokenizer\.json would be in the way"):
            Trainer(config_of(model, data, output)).train()

    def test_stays_where_it_is_in_nobodys_way(self, model, data, copied, tmp_path):
        output = copied("lora")
        mine = ["weights/step-00000001/mine", "store/mine", "scratch/mine", "tokens/mine", "mine", ".mine.1.tmp"]
        mine += ["adapter/mine", "adapter/.git/mine", "state/mine"]  # in the way of a new run alone
        for name in mine:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text(name)
        assert Trainer(config_of(model, data, output, resume=True)).train().global_step == 4
        assert {name: (output / name).read_text() for name in mine} == {name: name for name in mine}
        whole = config_of(model, data, tmp_path / "whole")
        Trainer(whole).train()
        found, expected = (load_file(x / "adapter" / "adapter_model.safetensors") for x in (output, whole.output))
        assert found.keys() == expected.keys() and all(found[name].equal(value) for name, value in expected.items())

    def test_directories_may_be_links_to_other_disks(self, model, data, tmp_path):
        output = tmp_path / "out"
        output.mkdir()
        for name in ("state", "tokens"):
            (tmp_path / "disk" / name).mkdir(parents=True)
            (output / name).symlink_to(tmp_path / "disk" / name)
        Trainer(config_of(model, data, output)).train()
        assert [path.name for path in (tmp_path / "disk" / "state").iterdir()] == ["step-00000003", "step-00000004"]

    def test_an_output_that_cannot_be_one(self, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
        for name in ("file", "file/below", "nowhere"):
            with pytest.raises(UserError, match="cannot write to .*name another --output"):
                RunDirectory(tmp_path / name).take(Config(model="m"))

    def test_a_new_directory_keeps_files_of_other_names(self, tmp_path):
        (tmp_path / "a").mkdir()
        for name, text in {"kept": "old", "replaced": "old"}.items():
            (tmp_path / "a" / name).write_text(text)
        with new_directory(tmp_path / "a") as temporary:
            (temporary / "replaced").write_text("new")
        assert {p.name: p.read_text() for p in (tmp_path / "a").iterdir()} == {"kept": "old", "replaced": "new"}
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_a_new_directory_takes_away_what_killed_processes_left_of_it(self, tmp_path):
        """Not what a process still has, here or in another container, nor what is another directory's."""
        gone = 1 << 22  # no process has such a number
        stay = [f".a.{os.getppid()}.tmp", f".a.{gone + 1}.tmp", f".a.b.{gone}.tmp", ".a.mine.tmp"]
        for name in (f".a.{gone}.tmp", *stay):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x").touch()
        descriptor = os.open(tmp_path / stay[1], os.O_RDONLY)
        lock(descriptor)
        with new_directory(tmp_path / "a") as temporary, new_directory(tmp_path / "b"):
            assert temporary.is_dir()
        os.close(descriptor)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*stay, "a", "b"])


def test_what_killed_processes_left_is_gone_after_the_next_run(model, data, copied):
    output = copied("lora")
    left = [
        "state/.step-00000005.99999.tmp/x", ".adapter.99999.tmp/x", "tokens/.preparing-abc/x", ".metrics.jsonl.4.tmp",
        "scratch/activations-99.scratch", "scratch/gradients", "weights/.step-00000032.7.tmp/x", ".run.json.tmp",
    ]  # fmt: skip
    others = ["state/.step-5.tmp", ".adapter.tmp.mine", "scratch/activations.scratch", "weights/.mine.7.tmp"]
    for name in left + others:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("half")
    Trainer(config_of(model, data, output, resume=True)).train()
    assert not [name for name in left if (output / name).exists() or "x" in name and (output / name).parent.exists()]
    assert all((output / name).exists() for name in others)


class TestTheSameRun:
    CHANGES = {
        "training.weight_decay": {"training": {"weight_decay": 0.5}},
        "training.lr_scheduler": {"training": {"lr_scheduler": "cosine"}},
        "training.warmup_steps": {"training": {"warmup_steps": 1}},
        "training.adam_beta2": {"training": {"adam_beta2": 0.5}},
        "training.max_grad_norm": {"training": {"max_grad_norm": 0.1}},
        "dataset.append_eos": {"dataset": {"append_eos": False}},
        "dataset.completion_only": {"dataset": {"completion_only": False}},
        "engine.dtype": {"engine": {"dtype": "bfloat16"}},
        "engine.loss_tile_tokens": {"engine": {"loss_tile_tokens": 3}},
    }

    @pytest.mark.parametrize("method", OTHER_METHODS)
    def test_other_settings_are_named(self, method, model, data, stopped, tmp_path):
        found = unseal(json.loads((stopped[method] / "run.json").read_text()))
        for key, change in self.CHANGES.items():
            if method == "zo" and key in ("training.adam_beta2", "training.max_grad_norm"):
                continue  # which it does not read
            config = config_of(model, data, tmp_path, method, **change)
            digest = "other tokens" if key.startswith("dataset") else found["data"]["digest"]
            dtype = getattr(torch, config.engine.dtype)
            identity = RunIdentity(config, str(model), found["model"]["digest"], digest, 7, dtype)
            with pytest.raises(UserError, match=rf"started with other settings .*{key}: .* then, .* now"):
                identity.check(tmp_path, found)
        same = config_of(model, data, tmp_path, method, dataset={"append_eos": True})  # as is usual for this form
        RunIdentity(same, str(model), found["model"]["digest"], found["data"]["digest"], 7, torch.float32).check(
            tmp_path, found
        )

    def test_all_differences_at_once(self, model, data, copied, tmp_path):
        rows = write_rows(tmp_path / "other.jsonl", [row | {"prompt": row["prompt"].upper()} for row in ROWS])
        changed = config_of(model, rows, copied("lora"), resume=True, training={"seed": 1}, lora={"r": 3})
        before = files(changed.output / "state") | files(changed.output / "adapter")
        with pytest.raises(UserError) as refused:
            Trainer(changed).train()
        for words in ("data: 7 examples (", "training.seed: 42 then, 1 now", "lora.r: 16 then, 3 now"):
            assert words in str(refused.value)
        assert files(changed.output / "state") | files(changed.output / "adapter") == before
        other = config_of(model, data, changed.output, OTHER_METHODS["lora"], resume=True)
        with pytest.raises(UserError, match=r"settings \(method: 'lora' then, 'zo' now\)"):
            Trainer(other).train()

    def test_what_changes_no_number_may_change(self, model, data, copied, tmp_path):
        rows = shutil.copy(data, tmp_path / "moved.jsonl")
        link = tmp_path / "link"
        link.symlink_to(model)
        copy = shutil.copytree(model, tmp_path / "copy" / "of-it")
        for step, name in enumerate([f"{link}/", f"{copy}/../of-it", str(model)], start=3):
            config = config_of(
                name, rows, tmp_path / "lora" if step > 3 else copied("lora"), resume=True, eval_data=rows, disk="1GB",
                training={"max_steps": step, "save_steps": 2, "lr_scheduler": "linear"},
                engine={"resident_blocks": 1, "activations": "disk", "num_threads": 1},
            )  # fmt: skip
            assert Trainer(config).train().report["first_step"] == step - 1

    def test_a_schedule_that_gets_longer_is_said(self, model, data, copied, capsys):
        config = config_of(model, data, copied("lora"), resume=True, training={"max_steps": 5})
        Trainer(config).train()
        assert "are from here on those of a run of 5 steps; they were those of 4" in capsys.readouterr().err

    def test_another_model_of_the_same_name(self, model, data, copied, tmp_path):
        other = Path(shutil.copytree(model, tmp_path / "models" / model.name))
        for path in other.glob("*.safetensors"):
            tensors = load_file(path)
            save_file({name: value + 1e-3 if "q_proj" in name else value for name, value in tensors.items()}, path)
        for method in OTHER_METHODS:
            output = copied(method)
            with pytest.raises(UserError, match=r"model: .*/llama \(\w{8}\) then, .*/models/llama \(\w{8}\) now"):
                Trainer(config_of(other, data, output, method, resume=True)).train()
            if method != "lora":
                with pytest.raises(UserError, match="whose weights or configuration are others"):
                    export(config_of(other, data, output, method), tmp_path / "tuned")
        assert not (tmp_path / "tuned").exists()
        adapter = shutil.copytree(tmp_path / "lora" / "adapter", tmp_path / "elsewhere")
        with pytest.raises(UserError, match=r"elsewhere was trained on .*/llama, --model names .*/models/llama, whose weights"):
            evaluate(config_of(other, data, tmp_path / "eval"), adapter)

    def test_every_key_counts_that_is_not_listed(self):
        """Keys that no list names are compared: what is left out is what is known to change nothing."""
        config = Config(model="m", method="full")
        kept = settings(config, torch.float32)
        assert kept["training"].keys() == config.training.model_dump().keys() - {
            "max_steps", "epochs", "eval_steps", "save_steps", "report_to", "compute_metrics", "save_total_limit",
            "metric_for_best_model",
            "greater_is_better", "load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold",
        }  # fmt: skip
        assert kept["dataset"].keys() == config.dataset.model_dump().keys() - {"evaluation_stride"}
        assert kept["optimizer"].keys() == config.optimizer.model_dump().keys() - {"versions"}
        assert kept["engine"].keys() == {"dtype", "loss_tile_tokens", "loss_tile_vocab", "sequence_chunk"}
        assert "lora" not in kept and "zo" not in kept
        assert settings(Config(model="m"), torch.float32)["training"]["learning_rate"] == 2e-4

    def test_a_key_that_is_new_had_its_default(self, tmp_path):
        config = Config(model="m", data="d")
        now = RunIdentity(config, "m", "1" * 32, "2" * 32, 7, torch.float32)
        found = now.about()
        del found["settings"]["lora"]["use_rslora"]
        now.check(tmp_path, found)
        changed = Config(model="m", data="d", lora={"use_rslora": True})
        with pytest.raises(UserError, match="lora.use_rslora: False then, True now"):
            RunIdentity(changed, "m", "1" * 32, "2" * 32, 7, torch.float32).check(tmp_path, found)

    @pytest.mark.parametrize("method", OTHER_METHODS)
    def test_goes_on_without_its_run_json(self, method, model, data, copied):
        config = config_of(model, data, copied(method), method, resume=True)
        (config.output / "run.json").unlink()
        with pytest.raises(UserError, match="training.seed: 42 then, 7 now"):
            Trainer(config_of(model, data, config.output, method, resume=True, training={"seed": 7})).train()
        assert Trainer(config).train().report["first_step"] == 2

    def test_a_damaged_run_json_is_refused(self, model, data, copied):
        config = config_of(model, data, copied("lora"), resume=True)
        path = config.output / "run.json"
        path.write_text(path.read_text().replace("7", "8", 1))
        with pytest.raises(UserError, match=r"run\.json is damaged, or no run has made it"):
            Trainer(config).train()

    def test_a_state_of_another_run_is_refused(self, model, data, copied, tmp_path):
        other = config_of(model, data, tmp_path / "other", training={"seed": 7})
        Trainer(other, callbacks=[StopAfter(3)]).train()
        config = config_of(model, data, copied("lora"), resume=True)
        shutil.copytree(other.output / "state" / "step-00000003", config.output / "state" / "step-00000003")
        with pytest.raises(UserError, match="step-00000003 belongs to another run than the rest"):
            Trainer(config).train()


class TestRunsOfEarlierVersions:
    """What they said of themselves stood in the state, and was less."""

    @pytest.fixture
    def output(self, model, copied) -> Path:
        output = copied("lora")
        (output / "run.json").unlink()
        for state in (output / "state").iterdir():
            found = json.loads((state / "state.json").read_text())
            about = {
                "step": found["step"], "model": model.name, "method": "lora", "seed": 42, "batch_size": 2,
                "micro_batch_size": 1, "learning_rate": 0.01, "packing": False, "examples": 7,
                "lora": {
                    "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "use_rslora": False,
                    "use_dora": False, "init_lora_weights": True,
                },
            }  # fmt: skip
            (state / "state.json").write_text(json.dumps(about, indent=2))
        return output

    def test_go_on(self, output, model, data):
        config = config_of(model, data, output, resume=True)
        assert Trainer(config, callbacks=[StopAfter(3)]).train().report["first_step"] == 2
        assert Trainer(config).train().report["first_step"] == 3

    def test_are_compared_by_what_they_said(self, output, model, data):
        changed = config_of(model, data, output, resume=True, training={"seed": 7}, lora={"r": 3})
        with pytest.raises(UserError, match=r"other settings \(lora.r: 16 then, 3 now; seed: 42 then, 7 now\)"):
            Trainer(changed).train()
        with pytest.raises(UserError, match=r"settings \(method: 'lora' then, 'zo' now\)"):
            Trainer(config_of(model, data, output, "zo", resume=True)).train()

    def test_are_set_aside(self, output, model, data):
        Trainer(config_of(model, data, output)).train()
        assert (output / "previous" / "1" / "state" / "step-00000002" / "state.json").is_file()


class TestDigests:
    def test_of_a_model(self, model, tmp_path):
        digest = model_digest(read_checkpoint(model))
        copy = Path(shutil.copytree(model, tmp_path / "copy"))
        whole = {name: value for path in sorted(copy.glob("*.safetensors")) for name, value in load_file(path).items()}
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": "x", "transformers_version": "0"}, indent=7))
        for path in [*copy.glob("*.safetensors"), *copy.glob("*.index.json")]:
            path.unlink()
        save_file(whole, copy / "model.safetensors")
        assert model_digest(read_checkpoint(copy)) == digest  # in one file
        for name, value in whole.items():
            save_file(whole | {name: value + 1}, copy / "model.safetensors")
            assert model_digest(read_checkpoint(copy)) != digest, name
        save_file(whole, copy / "model.safetensors")
        (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
        assert model_digest(read_checkpoint(copy)) != digest

    def test_of_rows_of_tensors(self):
        rows = [{"pixel_values": torch.arange(6.0) + i, "labels": torch.tensor(i)} for i in range(3)]

        class Lazy:
            def __init__(self, make):
                self._make = make

            def __len__(self):
                return 3

            def __getitem__(self, index):
                return self._make(index)

        found = [
            TensorRows(rows).digest,
            TensorRows(rows[::-1]).digest,
            TensorRows(rows[:2]).digest,
            TensorRows([row | {"labels": row["labels"].int()} for row in rows]).digest,
            TensorRows([*rows[:2], rows[2] | {"pixel_values": torch.arange(6.0)}]).digest,
        ]
        assert len(set(found)) == len(found) and TensorRows(tuple(rows)).digest == found[0]
        assert TensorRows(Lazy(lambda index: rows[index])).digest == found[0]
        random = TensorRows(Lazy(lambda index: {"pixel_values": torch.rand(6), "labels": rows[index]["labels"]}))
        assert random.digest == random.digest


class TestTheNameOfTheModel:
    def test_is_what_was_typed(self, model, monkeypatch):
        monkeypatch.chdir(model.parent)
        assert model_name("llama") == model_name("./llama/") == str(model)
        assert model_name("org/name") == "org/name"

    def test_leads_from_anywhere_to_the_base(self, model, data, tmp_path, monkeypatch):
        from peft import AutoPeftModelForCausalLM

        monkeypatch.chdir(model.parent)
        Trainer(config_of(model.name, data, tmp_path / "out")).train()
        monkeypatch.chdir(tmp_path)
        assert AutoPeftModelForCausalLM.from_pretrained("out/adapter").get_base_model().name_or_path == str(model)
        card = (tmp_path / "out" / "adapter" / "README.md").read_text()
        assert f"- Base model: {model.name}\n" in card and str(model) not in card  # the hub takes no path for a model

    def test_a_hub_id_stays_one(self, model, data, tmp_path, monkeypatch):
        """From the hub's cache, where the directory is named after a commit."""
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(model))
        for method in ("lora", "full", "zo"):
            config = config_of("org/tiny", data, tmp_path / method, method, training={"max_steps": 1})
            Trainer(config).train()
            if method != "lora":
                export(config, tmp_path / f"{method}-tuned")
        adapter = json.loads((tmp_path / "lora" / "adapter" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "org/tiny"
        assert unseal(json.loads((tmp_path / "lora" / "run.json").read_text()))["model"]["name"] == "org/tiny"


def test_moments_are_there_before_the_first_step(model, data, tmp_path):
    """Made later they would lie between gradients, and the places of those would be too small for anything else."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **more):
            seen.append([sorted(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]])

    Trainer(config_of(model, data, tmp_path / "run"), callbacks=[Watch()]).train()
    assert seen[0] == seen[-1] and {"exp_avg", "exp_avg_sq", "step"} == set(seen[0][0]) and all(seen[0])
