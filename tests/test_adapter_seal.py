"""Adapters carry checksums: what was damaged, or put beside other weights, is refused; others load them as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from finetune.adapters import peft_files as adapters
from finetune.adapters import saved as saved_adapter
from finetune.adapters.seal import CONFIG, WEIGHTS
from finetune.memory.errors import UserError
from finetune.offload.weights.parts import cut


def base() -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_config(
        tf.LlamaConfig(
            vocab_size=17, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PeftModel:
    options = {"target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"}
    return get_peft_model(base(), LoraConfig(r=3, **options))


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    adapters.save(model, tmp_path / "adapter", {"model": {"name": "org/base", "digest": "7" * 32}, "run": "8" * 32})
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base().save_pretrained(path := tmp_path_factory.mktemp("base"))
    return path


@pytest.fixture
def load(folder) -> Callable[[Path], PeftModel]:
    return lambda adapter: saved_adapter.load(cut(folder), adapter)[0]


def values(model: PeftModel) -> dict:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def test_peft_and_we_load_what_was_saved(model, adapter, load):
    plain = adapter.parent / "plain"
    model.save_pretrained(plain)
    assert {path.name for path in adapter.iterdir()} == {path.name for path in plain.iterdir()}
    config, others = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, plain))
    assert config["target_modules"] == ["q_proj", "v_proj"] == sorted(others["target_modules"])
    assert config == others | {"target_modules": config["target_modules"]}
    expected, found = load_file(plain / WEIGHTS), load_file(adapter / WEIGHTS)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    for loaded in (PeftModel.from_pretrained(base(), adapter), load(adapter)):
        assert all(value.equal(values(model)[name]) for name, value in values(loaded).items())


@pytest.mark.parametrize("at", [0, 7, 300, -1, -500])
def test_flipped_bits_of_the_weights(at, adapter, load):
    content = bytearray((adapter / WEIGHTS).read_bytes())
    content[at] ^= 2
    (adapter / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="the same command with --resume|does not fit this model"):
        load(adapter)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_files_that_are_none(content, adapter, load):
    for name in (CONFIG, WEIGHTS):
        kept = (adapter / name).read_bytes()
        (adapter / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load(adapter)
        (adapter / name).write_bytes(kept)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"expected {WEIGHTS} in it"):
        load(adapter)


def test_the_configuration_belongs_to_the_weights(adapter, load):
    assert b'"lora_alpha": 8' in (adapter / CONFIG).read_bytes()
    change(adapter / CONFIG, b'"lora_alpha": 8', b'"lora_alpha": 9')
    with pytest.raises(UserError, match=f"{CONFIG} is not the one that was saved.*load the adapter with PEFT"):
        load(adapter)
    PeftModel.from_pretrained(base(), adapter).save_pretrained(adapter)
    loaded = load(adapter)
    assert loaded.peft_config["default"].lora_alpha == 9


def test_where_the_base_is_may_be_changed(adapter, load):
    expected = values(load(adapter))
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere", "revision": "main"}))
    found = values(load(adapter))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
