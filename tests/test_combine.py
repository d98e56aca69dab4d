"""Several adapters into one: PEFT's `add_weighted_adapter` on a model in memory, bit for bit, or a refusal."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import invoke
from test_merge import load, lora, save_adapter
from tiny_models import save_tiny

from finetune.combine import KINDS


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A model, and two adapters that differ, the second of other layers too."""
    folder = tmp_path_factory.mktemp("adapters")
    model = save_tiny("llama", folder / "model")
    save_adapter(model, folder / "one", lora("q_proj", "down_proj", "embed_tokens"))
    torch.manual_seed(1)
    save_adapter(model, folder / "two", peft.LoraConfig(
        r=3, lora_alpha=9, task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens", "up_proj"], init_lora_weights=False
    ))  # fmt: skip
    return model, folder / "one", folder / "two"


def by_peft(made: tuple[Path, Path, Path], weights: list[float], folder: Path, kind: str, **options: Any) -> dict[str, Any]:
    model, one, two = made
    adapted = peft.PeftModel.from_pretrained(load(model), one, adapter_name="a")
    adapted.load_adapter(two, "b")
    torch.manual_seed(7)
    adapted.add_weighted_adapter(["a", "b"], weights, "both", combination_type=kind, **options)
    adapted.save_pretrained(folder, selected_adapters=["both"], save_embedding_layers=False)
    return load_file(folder / "both" / "adapter_model.safetensors")


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_pefts(kind, made, tmp_path):
    options = {"density": 0.4} if kind.startswith(("ties", "dare", "magnitude")) else {}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    if kind == "svd":
        options, words = {"svd_rank": 5}, ["--rank", "5"]
    expected = by_peft(made, [0.7, -1.5], tmp_path / "peft", kind, **options)
    _, one, two = made
    found = invoke("combine", f"{one}=0.7", f"{two}=-1.5", "--kind", kind, "--seed", "7", "--to", str(tmp_path / "to"), *words)
    assert found.exit_code == 0 and "one adapter" in found.stdout, found.stderr
    values = load_file(tmp_path / "to" / "adapter_model.safetensors")
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name].equal(value), name
    config = peft.PeftConfig.from_pretrained(tmp_path / "to")
    assert config.lora_alpha == config.r and not config.use_rslora  # its scale is 1


@pytest.mark.parametrize("words, message", [
    (("{one}",), "expected two adapters or more"),
    (("{one}", "{two}=x"), "expected ADAPTER or ADAPTER=WEIGHT"),
    (("{one}", "{two}", "--kind", "mean"), "--kind: expected one of linear"),
    (("{one}", "{two}", "--kind", "ties"), "--density: expected the share of values to keep with ties"),
    (("{one}", "{two}", "--density", "0.3"), "--density: expected none with linear"),
    (("{one}", "{two}", "--rank", "3"), "--rank: expected a positive number, with kinds that end in svd"),
    (("{one}", "{dora}"), "has use_dora, and PEFT does not combine magnitudes"),
    (("{one}", "{other}"), "PEFT cannot combine these adapters: All adapters must have the same r value"),
    (("{one}", "{lacking}"), "an adapter lacks tensors that its configuration names, such as base_model.model."),
    (("{one}", "{nowhere}"), "is not an adapter"),
])  # fmt: skip
def test_what_cannot_be_combined(words, message, made, tmp_path):
    model, one, two = made
    names = ("dora", "other", "nowhere", "lacking")
    places = {"one": one, "two": two, **{name: tmp_path / name for name in names}}
    if "{dora}" in words:
        save_adapter(model, places["dora"], lora("q_proj", use_dora=True))
    if "{other}" in words:
        save_adapter(model, places["other"], peft.LoraConfig(r=5, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    if "{lacking}" in words:
        shutil.copytree(two, places["lacking"])
        values = load_file(two / "adapter_model.safetensors")
        values.pop(next(name for name in values if "lora_A" in name))
        save_file(values, places["lacking"] / "adapter_model.safetensors")
    found = invoke("combine", *(word.format(**places) for word in words), "--to", str(tmp_path / "to"))
    assert found.exit_code == 1 and message in " ".join(found.stderr.split()), found.stderr
    assert not (tmp_path / "to").exists()
