"""Tuning the scales of packed weights (QZO) from the outside: resumed runs, folds, what is left, clipping, memory, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from packed_checkpoints import edit, write_packed
from safetensors.torch import load_file
from test_resume import data, data_prepared_here, models  # noqa: F401  fixtures
from test_zeroth_order import assert_same_weights, damage, journal_bytes, weights
from text_models import StopAfter, make_config

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.generate import generate
from finetune.memory.errors import UserError
from finetune.offload.noise import noise
from finetune.offload.perturb.journal import Journal


@pytest.fixture(scope="module")
def packed(models, tmp_path_factory) -> Path:  # noqa: F811
    return write_packed(Path(models["float32"]), tmp_path_factory.mktemp("bases"), "nf4")[0]


def run_config(model: Path, rows: str, output: Path, steps: int, zo: dict[str, Any] | None = None, **changes: Any) -> Config:
    training = {"max_steps": steps, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-4, "warmup_steps": 2}
    zo = {"parameters": "scales", "fold_steps": 3} | (zo or {})
    training |= changes.pop("training", {})
    return make_config(model, output, data=rows, method="zo", zo=zo, training=training, **changes)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(packed, data, tmp_path):  # noqa: F811
    whole, parts = (run_config(packed, data, tmp_path / name, 11) for name in ("whole", "parts"))
    Trainer(whole).train()
    for stop in (2, 5, 9):
        Trainer(parts.model_copy(update={"resume": stop > 2}), callbacks=[StopAfter(stop)]).train()
    Trainer(parts.model_copy(update={"resume": True})).train()
    assert journal_bytes(parts) == journal_bytes(whole)
    for config in (parts, whole):
        export(config, tmp_path / f"{config.output.name}-tuned")
    assert_same_weights(tmp_path / "parts-tuned", tmp_path / "whole-tuned")


def test_folds_hold_scales_alone_and_are_only_a_shortcut(packed, data, tmp_path, capfd):  # noqa: F811
    config = run_config(packed, data, tmp_path / "out", 8)
    Trainer(config).train()
    (fold,) = (config.output / "weights").iterdir()
    before = weights(packed)
    scales = {name: value for name, value in before.items() if name.endswith(".absmax")}
    assert weights(fold).keys() == scales.keys()
    for step in (8, 6, 3, 0):
        export(config, tmp_path / f"with-{step}", at_step=step)
    damage(next(iter(sorted(fold.glob("*.safetensors")))))
    for step in (8, 6, 3, 0):
        export(config, tmp_path / f"without-{step}", at_step=step)
        assert_same_weights(tmp_path / f"with-{step}", tmp_path / f"without-{step}")
    assert f"{fold} is passed over" in capfd.readouterr().err
    assert_same_weights(tmp_path / "with-0", packed)
    found = weights(tmp_path / "with-8")
    assert all(found[name].equal(value) is (name not in scales) for name, value in before.items())
    assert json.loads((tmp_path / "with-8" / "config.json").read_text())["quantization_config"]["load_in_4bit"]


def test_what_a_run_has_tuned_is_measured_and_speaks(packed, data, tmp_path):  # noqa: F811
    """In the run, from its directory with and without folds, and once it is exported."""
    config = run_config(packed, data, tmp_path / "run", 7, eval_data=data)
    trainer = Trainer(config)
    inside = trainer.train().report["evaluation"]["loss"]
    base = make_config(packed, tmp_path / "eval", eval_data=data)
    assert evaluate(base)["loss"] != inside
    assert trainer.evaluate()["loss"] == pytest.approx(inside, rel=2e-6)
    export(config, tmp_path / "tuned")
    exported = base.model_copy(update={"model": str(tmp_path / "tuned")})
    assert evaluate(exported)["loss"] == trainer.evaluate()["loss"]
    said = ["".join(generate(*what, ["what is it"], max_new_tokens=4)) for what in ((base, config.output), (exported, None))]
    assert said[0] == said[1]
    for path in (config.output / "weights").glob("*/*"):
        path.unlink()
    assert trainer.evaluate()["loss"] == evaluate(exported)["loss"]


def test_a_model_that_is_quantised_here(models, data, tmp_path):  # noqa: F811
    """What a run over it has tuned is exported with the same words, and is the packed model with other scales."""
    quantization = {"nested": False, "cache": str(tmp_path / "cache")}
    config = run_config(Path(models["bfloat16"]), data, tmp_path / "run", 4, quantize="nf4", quantization=quantization)
    Trainer(config).train()
    export(config, tmp_path / "tuned")
    before, after = (weights(path) for path in (*(tmp_path / "cache").glob("*/"), tmp_path / "tuned"))
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) is not name.endswith(".absmax") for name, value in before.items())


def test_coefficients_are_clipped(packed, data, tmp_path):  # noqa: F811
    """At 100 where nothing is said; what other parameters are tuned with is not."""
    found = []
    for name, zo in (("default", {"epsilon": 1e-6}), ("clip", {"clip": 0.25}), ("none", {"clip": 1e9, "epsilon": 1e-6})):
        config = run_config(packed, data, tmp_path / name, 4, zo, training={"learning_rate": 1e-9})
        Trainer(config).train()
        found.append([abs(g) for record in Journal.read(config.output / "journal.zo").records for g in record.scalars])
    default, clip, none = map(max, found)
    assert (default, clip) == (100.0, 0.25) and none > 100
    of_all = Config(model="m", data="d", method="zo")
    assert of_all.zo.most_coefficient is None and of_all.learning_rate == 1e-6
    assert Config(model="m", data="d", method="zo", zo={"parameters": "scales"}).learning_rate == 1e-7


def test_what_groups_make_smaller_is_raised():
    """After each of them; the noise of a variant comes on top, and whether the passes write what they read is of no matter."""
    source = torch.tensor([0.5, 1e-3, 0.25, 2.0])
    groups = [noise.Group(1.0, (noise.Update(seed, 1.0),)) for seed in (3, 4)]
    target, other = torch.empty(4), torch.empty(4, dtype=torch.bfloat16)
    parameter = noise.Parameter(9, least=1e-7)
    noise.move(noise.Noise("gaussian"), parameter, source, groups, [noise.Target(target, 5, -0.5), noise.Target(other, 5, 0.5)])
    z = {seed: noise.sample("gaussian", seed, 9, 4) for seed in (3, 4, 5)}
    theta = source
    for seed in (3, 4):
        theta = (theta + z[seed]).clamp(min=1e-7)
    assert theta.min() == torch.tensor(1e-7) and target.equal(theta - 0.5 * z[5])
    assert other.equal((theta + 0.5 * z[5]).bfloat16())
    assert source.tolist() == torch.tensor([0.5, 1e-3, 0.25, 2.0]).tolist()


def test_other_settings_are_not_resumed(packed, data, tmp_path):  # noqa: F811
    Trainer(run_config(packed, data, tmp_path, 2)).train()
    with pytest.raises(UserError, match=r"other settings \(zo.clip: 100.0 then, 5.0 now\)"):
        Trainer(run_config(packed, data, tmp_path, 4, {"clip": 5}, resume=True)).train()


def test_nested_and_plain_weights_are_refused(models, data, tmp_path):  # noqa: F811
    (tmp_path / "bases").mkdir()
    nested, plain = write_packed(Path(models["float32"]), tmp_path / "bases", "nf4", nested=True)
    with pytest.raises(UserError, match="proj.weight is stored as bitsandbytes 4-bit without scales in fp32.*double_quant"):
        Trainer(run_config(nested, data, tmp_path / "out", 2)).train()
    with pytest.raises(UserError, match="expected linear layers whose weights are packed with scales, found none"):
        Trainer(run_config(plain, data, tmp_path / "out", 2)).train()


@pytest.mark.parametrize(
    ("zo", "message"),
    [
        ({"noise": "low_rank"}, "noise rademacher or gaussian and rounding exact with parameters scales.*found low_rank"),
        ({"rounding": "nearest"}, "with parameters scales.*found rademacher and nearest"),
        ({"perturb": "products", "noise": "low_rank"}, "parameters all with perturb products, found low_rank and scales"),
        ({"clip": 0}, "zo.clip"),
    ],
)
def test_options_that_do_not_go_together(zo, message):
    with pytest.raises(ConfigError, match=message):
        Config(model="m", data="d", output="o", method="zo", zo={"parameters": "scales"} | zo)


def test_a_damaged_scale_is_found(packed, data, tmp_path):  # noqa: F811
    """Infinity in a scale ends the run with the tensor's name."""
    model = copytree(packed, tmp_path / "model")
    name = "model.layers.1.self_attn.q_proj.weight.absmax"
    value = next(t[name] for t in map(load_file, model.glob("*.safetensors")) if name in t)
    edit(model, {name: value.index_fill(0, torch.tensor([0]), float("inf"))})
    with pytest.raises(UserError, match=f"infinity or NaN in {name}"):
        Trainer(run_config(model, data, tmp_path / "out", 2)).train()
