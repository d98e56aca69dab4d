"""Checkpoints as savers leave them: tied tables stored twice or under one name only, fp16, tokenizers that have grown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from test_resume import data, data_prepared_here  # noqa: F401  fixtures
from test_zeroth_order import weights
from text_models import VOCAB, make_config, write_model, write_rows

from finetune import Config, Trainer
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.generate import generate
from finetune.memory.errors import UserError

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="session")
def tied(tmp_path_factory) -> Path:
    """gemma2, whose head is its embedding, in one file."""
    folder = write_model("gemma2", tmp_path_factory.mktemp("tied") / "float32")
    return rewrite(folder, weights(folder))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], *shards: set[str], **index: str) -> Path:
    """The checkpoint now holds these tensors, in one file, or in shards of these names and one of the rest; index: more that
    the index is to name, with "__" for a dot."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    groups = [tensors]
    if shards:
        groups = [{name: tensors[name] for name in names} for names in shards]
        groups.append({name: value for name, value in tensors.items() if not any(name in names for names in shards)})
        files = [f"a part {i + 1}, of #{len(groups)}.safetensors" for i in range(len(groups))]
        places = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        places |= {name.replace("__", "."): files[int(place)] for name, place in index.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        files = ["model.safetensors"]
    for file, group in zip(files, groups, strict=True):
        save_file({name: value.clone() for name, value in group.items()}, folder / file, metadata={"format": "pt"})
    return folder


def changed(model: Path, folder: Path, *shards: set[str], index: dict[str, str] | None = None, **tensors: Any) -> Path:
    """A copy of `model` with other tensors; None takes one away."""
    shutil.copytree(model, folder)
    values = weights(folder) | {name.replace("__", "."): value for name, value in tensors.items()}
    return rewrite(folder, {name: value for name, value in values.items() if value is not None}, *shards, **(index or {}))


def run_config(model: Path, rows: str, output: Path, method: str, **changes: Any) -> Config:
    training = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2 if method != "zo" else 1e-3}
    of_method = {"zo": {"zo": {"fold_steps": 1, "epsilon": 1e-2}}, "lisa": {"selection": {"interval": 2, "layers": 1}}}
    values = of_method.get(method, {}) | changes
    values["engine"] = {"loss_tile_vocab": 100} | values.get("engine", {})
    return make_config(model, output, data=rows, method=method, training=training, **values)


def tuned(model: Path, rows: str, output: Path, method: str, **changes: Any) -> dict[str, torch.Tensor]:
    """The exported tensors of a short run of `model`."""
    config = run_config(model, rows, output, method, **changes)
    Trainer(config).train()
    export(config, output / "exported")
    return weights(output / "exported")


@pytest.mark.parametrize("method", ["full", "zo"])
def test_a_tied_table_is_one_weight_however_it_is_stored(method, tied, data, tmp_path):  # noqa: F811
    table = weights(tied)[TABLE]
    expected = tuned(tied, data, tmp_path / "once", method)
    assert not expected[TABLE].equal(table) and HEAD not in expected
    forms = {"twice": changed(tied, tmp_path / "m1", {HEAD}, lm_head__weight=table)}
    if method == "full":  # noise is another where a parameter has another home
        named = {"model__embed_tokens__weight": "1"}
        head_only = {"lm_head__weight": table, "model__embed_tokens__weight": None}
        forms["as the head only"] = changed(tied, tmp_path / "m2", {HEAD}, index=named, **head_only)
    for form, model in forms.items():
        found = tuned(model, data, tmp_path / form, method)
        assert found.keys() == weights(model).keys()
        for name, value in found.items():
            assert value.equal(expected[TABLE if name == HEAD else name]), (form, name)
        plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / form / "exported")
        assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_ends_of_a_tie_with_unlike_values_are_two_weights(tied, data, tmp_path, capsys):  # noqa: F811
    """As Transformers loads them."""
    head = weights(tied)[TABLE] + 0.01
    model = changed(tied, tmp_path / "model", lm_head__weight=head)
    plain = tf.AutoModelForCausalLM.from_pretrained(model)
    assert plain.lm_head.weight.equal(head) and not plain.model.embed_tokens.weight.equal(head)
    found = tuned(model, data, tmp_path / "out", "full")
    assert not found[HEAD].equal(found[TABLE]) and not found[HEAD].equal(head)
    assert "ties lm_head.weight to model.embed_tokens.weight" in capsys.readouterr().err


def test_a_table_stored_in_two_dtypes(tied, data, tmp_path):  # noqa: F811
    """The numbers are the same, so it is one table; to change both needs a conversion."""
    values = {name: value.bfloat16() for name, value in weights(tied).items()}
    model = changed(tied, tmp_path / "model", **{name.replace(".", "__"): value for name, value in values.items()})
    rewrite(model, values | {HEAD: values[TABLE].float()})
    for method in ("full", "zo"):
        with pytest.raises(UserError, match="stored twice, as bfloat16 and as float32"):
            Trainer(run_config(model, data, tmp_path / method, method)).plan()
    lora = run_config(model, data, tmp_path / "lora", "lora")
    Trainer(lora).train()
    assert load_file(lora.output / "adapter" / "adapter_model.safetensors")


def test_one_table_without_a_tie_is_refused(tied, data, tmp_path):  # noqa: F811
    """Transformers would begin with a random head."""
    model = changed(tied, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"lm_head\.weight.*set tie_word_embeddings to true"):
        Trainer(run_config(model, data, tmp_path / "out", "lora")).plan()


@pytest.mark.parametrize("values", [{"pad_token_id": 9999}, {"hidden_size": -4}, {"num_attention_heads": 0}])
def test_a_configuration_of_which_no_model_can_be_made_is_named(values, tied, data, tmp_path):  # noqa: F811
    model = changed(tied, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(UserError, match=r"config\.json: Transformers cannot make|cannot read the model's configuration"):
        Trainer(run_config(model, data, tmp_path / "out", "lora")).plan()


@pytest.mark.parametrize("name", ["model.norm.weight", None])
def test_fp16_weights_train_without_gradients(name, tied, data, tmp_path):  # noqa: F811
    """All of them, or one among bf16; they are exported in fp16."""
    values = weights(tied)
    values = {n: v.half() if name in (None, n) else v.bfloat16() for n, v in values.items()}
    model = changed(tied, tmp_path / "model", **{n.replace(".", "__"): v for n, v in values.items()})
    found = tuned(model, data, tmp_path / "out", "zo")
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in values.items()}
    assert all(not value.equal(values[n]) for n, value in found.items())


RANDOM_ROUNDING = {"full": {"optimizer": {"master": "none"}}, "zo": {"zo": {"rounding": "stochastic"}}}


@pytest.mark.parametrize("method", RANDOM_ROUNDING)
def test_what_fp16_weights_cannot_is_refused(method, tied, data, tmp_path):  # noqa: F811
    key = "model__layers__1__mlp__up_proj__weight"
    model = changed(tied, tmp_path / "model", **{key: weights(tied)[key.replace("__", ".")].half()})
    with pytest.raises(UserError, match=r"up_proj\.weight is stored as float16, which .* cannot round stochastically"):
        Trainer(run_config(model, data, tmp_path / "out", method, **RANDOM_ROUNDING[method])).plan()


@pytest.mark.parametrize("method", ["full", "zo"])
def test_fp64_weights(method, tied, data, tmp_path):  # noqa: F811
    """No kernel moves them; beneath an adapter they are converted."""
    model = changed(tied, tmp_path / "model", model__norm__weight=weights(tied)["model.norm.weight"].double())
    with pytest.raises(UserError, match=r"model\.norm\.weight is stored as float64"):
        Trainer(run_config(model, data, tmp_path / "out", method)).plan()
    if method == "full":
        Trainer(run_config(model, data, tmp_path / "lora", "lora")).train()


@pytest.fixture(scope="session")
def grown(tied, tmp_path_factory) -> Path:
    """The tokenizer has more tokens than the model's table has rows, and pads with one of them."""
    model = changed(tied, tmp_path_factory.mktemp("grown") / "model")
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<more {i}>" for i in range(VOCAB - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"], "pad_token": "<|padding|>"})
    config = (model / "config.json").read_text()
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text(config)
    assert VOCAB <= min(tokenizer.convert_tokens_to_ids("<|call|>"), tokenizer.pad_token_id)
    return model


def test_tokens_beyond_the_embedding_are_refused(grown, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.offload.streamed_model.StreamedModel.__init__", None)  # before weights are read
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a word", "completion": " and <|call|> me"}])
    config = run_config(grown, rows, tmp_path / "out", "lora")
    prompts = generate(config, None, ["words", "and <|call|> me"])
    for use in (Trainer(config).train, lambda: evaluate(config), lambda: next(prompts)):
        with pytest.raises(UserError, match=rf"'<\|call\|>' has id \d+.*has {VOCAB} rows"):
            use()


def test_padding_beyond_the_embedding_is_no_matter(grown, tied, data, tmp_path):  # noqa: F811
    """Padded positions are masked: the losses are those of a tokenizer that was not grown."""
    for model in (grown, tied):
        Trainer(run_config(model, data, tmp_path / model.name, "lora")).train()
    metrics = [(tmp_path / model.name / "metrics.jsonl").read_text().splitlines() for model in (grown, tied)]
    grown_losses, losses = ([json.loads(line)["loss"] for line in lines] for lines in metrics)
    assert grown_losses == losses


@pytest.mark.parametrize("scale", [None, "model__layers__0__mlp__up_proj__weight_scale_inv"])
def test_quantised_weights_that_config_json_says_nothing_of_are_refused(scale, tied, data, tmp_path):  # noqa: F811
    name = "model.layers.0.mlp.up_proj.weight"
    stored = weights(tied)[name].to(torch.int8 if scale is None else torch.float8_e4m3fn)
    values = {name.replace(".", "__"): stored} | ({scale: torch.ones(1, 1)} if scale else {})
    model = changed(tied, tmp_path / "m", **values)
    with pytest.raises(UserError, match=f"{name}' is stored as .*quantised, use the original"):
        Trainer(run_config(model, data, tmp_path / "out", "lora")).train()


def test_model_type_says_which_model_it_is_whatever_class_saved_it(tied, data, tmp_path):  # noqa: F811
    """As in AutoModelForCausalLM, which reads no architectures."""
    losses = {}
    for name in ("Gemma2ForCausalLM", "LlamaForCausalLM"):
        model = changed(tied, tmp_path / name)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        losses[name] = evaluate(Config(model=str(model), eval_data=data, output=tmp_path / f"out-{name}", device="cpu"))["loss"]
    assert losses["LlamaForCausalLM"] == losses["Gemma2ForCausalLM"]
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["ViTModel"], "model_type": "vit_mae"}))
    with pytest.raises(UserError, match="model_type is vit_mae, but architectures names ViTModel"):
        evaluate(Config(model=str(model), eval_data=data, output=tmp_path / "refused", device="cpu"))
