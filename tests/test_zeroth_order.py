"""Zeroth-order runs from the outside: resume, kills, export, what is written, estimators and their refusals."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import kill_again_and_again
from safetensors.torch import load_file
from test_resume import ROOT, data, data_prepared_here, models  # noqa: F401  fixtures
from text_models import StopAfter, make_config

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.data import preparation
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.methods.zeroth_order import clipped, probe_seed, projected_gradients, variants
from finetune.methods.zeroth_order_options import ZerothOrderOptions
from finetune.offload.perturb.journal import Journal
from finetune.offload.perturb.variants import Variant
from finetune.offload.residency.io import IOEngine, IOFailure
from finetune.offload.streamed_model import StreamedModel


def zo_config(
    model: Path, rows: str, output: Path, steps: int, zo: dict[str, Any] | None = None, **changes: Any
) -> Config:
    training = {"max_steps": steps, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 2}
    zo = {"fold_steps": 3, "epsilon": 1e-2} | (zo or {})
    return make_config(
        model, output, data=rows, method="zo", zo=zo, lora={"r": 3} if zo.get("parameters") == "lora" else {},
        training=training | changes.pop("training", {}), engine={"dtype": model.name}, **changes,
    )  # fmt: skip


def journal_bytes(config: Config) -> bytes:
    return (config.output / "journal.zo").read_bytes()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        assert b[name].equal(value), name


SETTINGS = {
    "exact": {},
    "nearest": {"rounding": "nearest", "fold_steps": 1},
    "stochastic": {"rounding": "stochastic", "noise": "gaussian"},
    "momentum": {"momentum": 0.9, "momentum_window": 4, "clip_quantile": 0.5, "update": "sign"},
    "fzoo": {"estimator": "fzoo", "perturbations": 3},
    "lozo": {"noise": "low_rank", "rank": 2},
    "products": {"noise": "low_rank", "rank": 16, "perturb": "products"},
    "lora": {"parameters": "lora"},
    "prefix": {"parameters": "prefix", "epsilon": 0.1},
}


@pytest.mark.every(3)
@pytest.mark.parametrize("zo", SETTINGS.values(), ids=SETTINGS)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(zo, models, data, tmp_path):  # noqa: F811
    model = models["bfloat16"]
    whole = zo_config(model, data, tmp_path / "whole", 11, zo)
    Trainer(whole).train()
    parts = zo_config(model, data, tmp_path / "parts", 11, zo)
    for stop in (2, 5, 9):
        Trainer(parts.model_copy(update={"resume": stop > 2}), callbacks=[StopAfter(stop)]).train()
    result = Trainer(parts.model_copy(update={"resume": True})).train()
    assert (result.global_step, result.report["first_step"]) == (11, 9)
    assert journal_bytes(parts) == journal_bytes(whole)
    if "parameters" in zo:
        found, expected = (load_file(c.output / "adapter" / "adapter_model.safetensors") for c in (parts, whole))
        assert all(found[name].equal(value) for name, value in expected.items()) and found.keys() == expected.keys()
    else:
        export(parts, tmp_path / "a")
        export(whole, tmp_path / "b")
        assert_same_weights(tmp_path / "a", tmp_path / "b")
        assert not all(value.equal(weights(model)[name]) for name, value in weights(tmp_path / "a").items())


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.every(3)
@pytest.mark.parametrize("zo", [SETTINGS["exact"], SETTINGS["stochastic"]], ids=["exact", "stochastic"])
def test_folded_weights_are_only_a_shortcut(zo, models, data, tmp_path, capfd):  # noqa: F811
    """Export, and a resumed run, give the same weights with and without what was folded."""
    config = zo_config(models["bfloat16"], data, tmp_path / "out", 8, zo)
    Trainer(config).train()
    assert [path.name for path in (config.output / "weights").iterdir()] == ["step-00000006"]
    for step in (8, 6, 4, 0):
        export(config, tmp_path / f"with-{step}", at_step=step)
    folded = config.output / "weights" / "step-00000006"
    capfd.readouterr()
    for number, path in enumerate(sorted(folded.iterdir())):
        damage(path)
        export(config, tmp_path / f"damaged-{number}")
        assert_same_weights(tmp_path / f"damaged-{number}", tmp_path / "with-8")
        assert f"{folded} is passed over" in capfd.readouterr().err
    for path in folded.iterdir():
        path.unlink()
    for step in (8, 6, 4, 0):
        export(config, tmp_path / f"without-{step}", at_step=step)
        assert_same_weights(tmp_path / f"with-{step}", tmp_path / f"without-{step}")
    assert_same_weights(tmp_path / "with-0", Path(config.model))


def test_products_meet_the_weights_of_the_last_fold_even_if_they_were_lost(models, data, tmp_path):  # noqa: F811
    """Where what is folded and what is pending round differently, a resumed run folds what an unbroken one has folded."""
    whole, parts = (zo_config(models["bfloat16"], data, tmp_path / n, 11, SETTINGS["products"]) for n in ("whole", "parts"))
    assert whole.zo.steps_between_folds == 6
    Trainer(whole).train()
    Trainer(parts, callbacks=[StopAfter(8)]).train()
    for path in (parts.output / "weights" / "step-00000006").iterdir():
        path.unlink()
    Trainer(parts.model_copy(update={"resume": True})).train()
    assert journal_bytes(parts) == journal_bytes(whole)


def test_products_of_a_run_that_has_done_more_steps_than_are_asked_for(models, data, tmp_path):  # noqa: F811
    zo = {"noise": "low_rank", "rank": 3, "perturb": "products"}
    config = zo_config(models["float32"], data, tmp_path / "out", 11, zo, eval_data=data)
    evaluation = Trainer(config).train().report["evaluation"]
    fewer = config.model_copy(update={"resume": True, "training": config.training.model_copy(update={"max_steps": 3})})
    assert Trainer(fewer).train().report["evaluation"]["loss"] == evaluation["loss"]


@pytest.mark.slow
def test_a_killed_run_goes_on(models, data, tmp_path):  # noqa: F811
    """Killed at random moments until it is done, folds included."""
    steps = 60
    whole = zo_config(models["bfloat16"], data, tmp_path / "whole", steps)
    Trainer(whole).train()
    config = zo_config(models["bfloat16"], data, tmp_path / "killed", steps, resume=True)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    preparation.prepare(data, model=config.model, cache_dir=config.output / "tokens", sequence_length=64)
    journal = config.output / "journal.zo"
    kills = kill_again_and_again(
        tmp_path / "run.yaml", lambda: journal.stat().st_size if journal.exists() else 0, 4, 0.1
    )
    assert kills >= 2
    Trainer(config).train()
    assert journal_bytes(config) == journal_bytes(whole)
    export(config, tmp_path / "a")
    export(whole, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    left = {path.name for path in (config.output / "weights").iterdir()}
    assert left == {"step-00000057"}


def test_a_short_run_writes_no_weights(models, data, tmp_path):  # noqa: F811
    config = zo_config(models["float32"], data, tmp_path, 5, {"fold_steps": 5})
    Trainer(config).train()
    assert not (config.output / "weights").exists()
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert all(row["disk_write_bytes"] == 0 for row in rows)
    assert (config.output / "journal.zo").stat().st_size < 5 * 100 + 4096


def test_a_short_run_needs_no_room_for_folding(models, data, tmp_path):  # noqa: F811
    """The smallest budget of a run that never folds is smaller than that of one that does, and it runs within it."""

    def smallest(steps: int) -> int:
        config = zo_config(models["bfloat16"], data, tmp_path / "refused", steps, host_memory="1MiB")
        with pytest.raises(PlanRefused) as refused:
            Trainer(config).train()
        return refused.value.smallest_bytes

    short, long = smallest(3), smallest(4)
    assert long - short > 20 << 20  # the buffers of folding alone
    budget = short + (8 << 20)  # what this process has grown by since
    Trainer(zo_config(models["bfloat16"], data, tmp_path / "runs", 3, host_memory=budget)).train()


def test_more_perturbations_read_no_more(models, data, tmp_path):  # noqa: F811
    read = []
    for q in (1, 4):
        config = zo_config(models["float32"], data, tmp_path / str(q), 4, {"perturbations": q, "fold_steps": 9})
        Trainer(config).train()
        rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
        read.append([row["disk_read_bytes"] for row in rows])
    assert read[0] == read[1]


def test_evaluation_in_the_run_is_that_of_the_exported_model(models, data, tmp_path):  # noqa: F811
    config = zo_config(models["float32"], data, tmp_path / "out", 7, eval_data=data, training={"eval_steps": 2})
    plain = zo_config(models["float32"], data, tmp_path / "plain", 7)
    report = Trainer(config).train().report
    Trainer(plain).train()
    assert journal_bytes(config) == journal_bytes(plain)
    export(config, tmp_path / "tuned")
    found = evaluate(make_config(tmp_path / "tuned", tmp_path / "eval", eval_data=data))
    assert report["evaluation"]["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_resume_with_other_settings_is_refused(models, data, tmp_path):  # noqa: F811
    Trainer(zo_config(models["float32"], data, tmp_path, 3)).train()
    with pytest.raises(UserError, match=r"other settings \(zo.epsilon: 0.01 then, 0.5 now\)"):
        Trainer(zo_config(models["float32"], data, tmp_path, 5, {"epsilon": 0.5}, resume=True)).train()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_journal(models, data, tmp_path, monkeypatch):  # noqa: F811
    config = zo_config(models["float32"], data, tmp_path, 9)
    losses = StreamedModel.step_losses
    calls = []

    def third_is_infinite(self, *arguments):
        calls.append(1)
        found = losses(self, *arguments)
        return found._replace(losses=found.losses / (0 if len(calls) == 3 else 1))

    monkeypatch.setattr(StreamedModel, "step_losses", third_is_infinite)
    with pytest.raises(UserError, match="loss of step 3 is not finite"):
        Trainer(config).train()
    assert Journal.read(config.output / "journal.zo").steps == 2


def test_dora_is_refused(models, data, tmp_path):  # noqa: F811
    config = zo_config(models["float32"], data, tmp_path, 2, {"parameters": "lora"})
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"use_dora": True})})
    with pytest.raises(UserError, match="use_dora cannot be combined with method zo"):
        Trainer(config).train()


def test_a_journal_that_is_started_again_is_kept(models, data, tmp_path):  # noqa: F811
    config = zo_config(models["float32"], data, tmp_path, 3)
    Trainer(config).train()
    before = journal_bytes(config)
    Trainer(zo_config(models["float32"], data, tmp_path, 2)).train()
    assert (tmp_path / "previous" / "1" / "journal.zo").read_bytes() == before
    assert Journal.read(tmp_path / "journal.zo").steps == 2


def test_a_full_disk_while_folding_loses_nothing(models, data, tmp_path, monkeypatch):  # noqa: F811
    config = zo_config(models["float32"], data, tmp_path, 5)
    whole = zo_config(models["float32"], data, tmp_path / "whole", 5)
    Trainer(whole).train()
    with monkeypatch.context() as patch:
        sync = IOEngine.sync

        def full(self, file):
            sync(self, file)
            raise IOFailure("weights", 0, 1, 0, errno.ENOSPC)

        patch.setattr(IOEngine, "sync", full)
        with pytest.raises(UserError, match="No space left"):
            Trainer(config).train()
    assert Journal.read(config.output / "journal.zo").steps == 3 and not list((config.output / "weights").iterdir())
    Trainer(config.model_copy(update={"resume": True})).train()
    assert journal_bytes(config) == journal_bytes(whole)


def test_weights_that_another_run_has_folded_are_not_taken(models, data, tmp_path, capfd):  # noqa: F811
    one, other = (zo_config(models["float32"], data, tmp_path / str(i), 7, training={"learning_rate": i}) for i in (1, 2))
    Trainer(one).train()
    export(one, tmp_path / "before")
    Trainer(other).train()
    (one.output / "weights").rename(tmp_path / "held")
    (other.output / "weights").rename(one.output / "weights")
    export(one, tmp_path / "after")
    assert_same_weights(tmp_path / "after", tmp_path / "before")
    assert "made of other steps than this journal's" in capfd.readouterr().err


def test_a_journal_whose_end_is_lost_is_not_exported_for_the_whole(models, data, tmp_path):  # noqa: F811
    config = zo_config(models["float32"], data, tmp_path / "out", 4)
    Trainer(config).train()
    export(config, tmp_path / "before")
    journal = config.output / "journal.zo"
    content = journal.read_bytes()
    size = len(Journal.read(journal).records[-1].pack())
    for kept in (content[:-size], content[:-1], content[:-1] + b"?"):
        journal.write_bytes(kept)
        with pytest.raises(UserError, match=r"has 3 whole steps, .* with --at-step 3"):
            export(config, tmp_path / "after")
    export(config, tmp_path / "three", at_step=3)
    Trainer(config.model_copy(update={"resume": True})).train()
    assert journal.read_bytes() == content
    export(config, tmp_path / "after")
    assert_same_weights(tmp_path / "after", tmp_path / "before")


class TestExportRefuses:
    @pytest.fixture
    def config(self, models, data, tmp_path) -> Config:  # noqa: F811
        config = zo_config(models["float32"], data, tmp_path / "out", 2)
        Trainer(config).train()
        return config

    def test_what_would_be_overwritten(self, config, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").touch()
        with pytest.raises(UserError, match="exists: name a directory"):
            export(config, tmp_path / "full")

    @pytest.mark.parametrize("step", [-1, 3])
    def test_steps_that_are_not_there(self, step, config, tmp_path):
        with pytest.raises(UserError, match="expected 0 to 2"):
            export(config, tmp_path / "tuned", at_step=step)

    def test_another_model(self, config, models, tmp_path):  # noqa: F811
        with pytest.raises(UserError, match="tuned .*/float32, --model names .*/bfloat16, whose weights"):
            export(config.model_copy(update={"model": str(models["bfloat16"])}), tmp_path / "tuned")

    def test_a_run_without_a_journal(self, config, tmp_path):
        with pytest.raises(UserError, match="expected a run that has tuned .*found none of these"):
            export(config.model_copy(update={"output": tmp_path}), tmp_path / "tuned")


def test_the_command_exports_what_transformers_loads(models, data, tmp_path):  # noqa: F811
    import transformers as tf

    config = zo_config(models["bfloat16"], data, tmp_path / "out", 3)
    Trainer(config).train()
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "export", "--model", config.model, "--output", str(config.output),
         "--to", str(tmp_path / "tuned"), "--at-step", "2"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'tuned'}: the model after 2 steps\n"
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert model.dtype == torch.bfloat16
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "tuned").get_vocab()
    assert {p.name for p in (tmp_path / "tuned").iterdir()} == {
        "README.md", *(p.name for p in Path(config.model).iterdir())
    }  # fmt: skip


class TestEstimators:
    def test_spsa(self):
        options = ZerothOrderOptions(perturbations=2, epsilon=0.5)
        assert variants(options, [7, 8]) == [Variant(7, 0.5), Variant(7, -0.5), Variant(8, 0.5), Variant(8, -0.5)]
        assert projected_gradients(options, np.float32([3, 1, 1, 2])).tolist() == [2.0, -1.0]

    def test_fzoo(self):
        options = ZerothOrderOptions(estimator="fzoo", perturbations=3, epsilon=0.5)
        assert variants(options, [7, 8, 9]) == [Variant(0, 0.0), *(Variant(seed, 0.5) for seed in (7, 8, 9))]
        found = projected_gradients(options, np.float32([2, 3, 1, 5]))
        assert found == pytest.approx(np.array([1, -1, 3]) / 2.0)  # the standard deviation of 3, 1, 5 is 2
        assert projected_gradients(options, np.float32([2, 3, 3, 3])).tolist() == [0, 0, 0]
        with pytest.raises(ConfigError, match="perturbations of at least 2"):
            Config(model="m", zo={"estimator": "fzoo"})

    def test_evolution_strategies(self):
        """Scores are those of Qiu et al. 2025: of losses, less is better."""
        options = ZerothOrderOptions(estimator="es", perturbations=4, epsilon=0.5)
        assert variants(options, [7, 8, 9, 6]) == [Variant(seed, 0.5) for seed in (7, 8, 9, 6)] and options.variants == 4
        found = projected_gradients(options, np.float32([1, 3, 1, 3]))  # of mean 2 and standard deviation 1
        assert found.tolist() == [-1, 1, -1, 1]
        assert projected_gradients(options, np.float32([2, 2, 2, 2])).tolist() == [0, 0, 0, 0]
        options = ZerothOrderOptions(estimator="es_antithetic", perturbations=2, epsilon=0.5)
        assert variants(options, [7, 8]) == [Variant(7, 0.5), Variant(7, -0.5), Variant(8, 0.5), Variant(8, -0.5)]
        assert projected_gradients(options, np.float32([1, 3, 3, 3])) == pytest.approx(np.array([-2, 0]) / 2 / np.sqrt(0.75))
        with pytest.raises(ConfigError, match="at least 2 for es_antithetic"):
            Config(model="m", zo={"estimator": "es_antithetic"})

    def test_low_rank_noise_refuses_what_needs_other_columns(self):
        for wrong in ({"momentum": 0.9}, {"rounding": "stochastic"}):
            with pytest.raises(ConfigError, match="with low_rank noise"):
                Config(model="m", zo={"noise": "low_rank", **wrong})
        with pytest.raises(ConfigError, match="rank with low_rank noise only"):
            Config(model="m", zo={"rank": 3})

    def test_clipping(self):
        history = [float(i) for i in range(1, 11)]
        assert clipped(np.float32([7, -9, 3]), history, 0.5).tolist() == [5.5, -5.5, 3]
        assert clipped(np.float32([7]), history[:9], 0.5).tolist() == [7]
        assert clipped(np.float32([7]), history, None).tolist() == [7]

    def test_momentum_is_a_window_of_past_seeds(self, models, data, tmp_path):  # noqa: F811
        config = zo_config(
            models["float32"], data, tmp_path, 6, {"momentum": 0.5, "momentum_window": 3}, training={"warmup_steps": 0}
        )
        Trainer(config).train()
        records = Journal.read(config.output / "journal.zo").records
        for step, record in enumerate(records):
            expected = [
                (probe_seed(42, past, 0), -record.learning_rate * 0.5 ** (step - past) * records[past].scalars[0])
                for past in range(step, max(-1, step - 3), -1)
            ]
            assert [seed for seed, _ in record.updates] == [seed for seed, _ in expected]
            assert [c for _, c in record.updates] == pytest.approx([c for _, c in expected], rel=1e-6)


def test_it_learns(models, data, tmp_path):  # noqa: F811
    """A quadratic's worth of sense: with many perturbations the loss on the training data goes down."""
    config = zo_config(
        models["float32"], data, tmp_path, 40, {"perturbations": 8, "fold_steps": 8},
        training={"learning_rate": 2e-4, "batch_size": 17, "micro_batch_size": 17, "warmup_steps": 0},
    )  # fmt: skip
    Trainer(config).train()
    losses = [json.loads(line)["loss"] for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(losses[-1]) and np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
