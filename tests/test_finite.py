"""Numbers that are not finite: found in files, and never kept from a step, in any method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from text_models import make_config, write_model, write_rows
from transformers import AutoTokenizer

import finetune.offload.weights.finite
from finetune import Trainer
from finetune.data import preparation, worker
from finetune.evaluate import evaluate
from finetune.generate import generate
from finetune.memory.errors import UserError
from finetune.methods import zeroth_order
from finetune.objectives.token_loss import TokenLoss
from finetune.offload.files.checkpoint import read_header
from finetune.offload.streamed_model import StreamedModel
from finetune.offload.weights.finite import first_not_finite

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def data_prepared_here(monkeypatch) -> None:
    """Without a process for each data set, which costs seconds; other tests hold that."""
    monkeypatch.setattr(worker, "_load_tokenizer", lambda job: AutoTokenizer.from_pretrained(job.tokenizer))
    monkeypatch.setattr(
        preparation, "_run_worker", lambda job, _: worker.run(worker.Job(**job), lambda rows, tokens: None)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    folder = write_model("llama", tmp_path_factory.mktemp("faulty") / "model")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if NAME in tensors:
            tensors[NAME][3, 5] = float("inf")
            save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    rows = [{"prompt": "the cat sat", "completion": f" {word}"} for word in ("on", "mat", "there", "world")]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", [None, 0, 33, 70])
def test_the_tensor_is_found(dtype, place, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.finite, "PIECE_BYTES", 64)
    tensors = {"a": torch.arange(9), "b": torch.linspace(-1e4, 1e4, 71).to(dtype), "c": torch.full((3,), float("nan"))}
    if place is not None:
        tensors["b"][place] = float("-inf")
    save_file(tensors, tmp_path / "x.safetensors")
    entries = sorted(read_header(tmp_path / "x.safetensors"), key=lambda entry: entry.name)
    assert first_not_finite(entries).name == ("c" if place is None else "b")
    assert first_not_finite(entries[:1]) is None


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 3}},
    "full": {"method": "full"},
    "lisa": {"method": "lisa"},
    "zo": {"method": "zo"},
    "zo-lora": {"method": "zo", "zo": {"parameters": "lora"}, "lora": {"r": 3}},
}


def config(model: Path, data: str, output: Path, method: str, **training: Any) -> Any:
    steps = {"max_steps": 5, "batch_size": 2, "micro_batch_size": 2, "save_steps": 50, "learning_rate": 1e-3}
    return make_config(model, output, data=data, training=steps | training, **METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_a_faulty_weight_is_named_before_anything_is_trained(method, faulty, data, tmp_path):
    with pytest.raises(UserError, match=rf"Nothing was trained\. .*holds infinity or NaN in {NAME}") as refused:
        Trainer(config(faulty, data, tmp_path, method)).train()
    assert "step 1" in str(refused.value) or "first step" in str(refused.value)
    assert not (tmp_path / "adapter").exists() and not list((tmp_path / "state").glob("step-*"))


class Spoiled:
    """The third training step's loss, or its gradients, as if the model's numbers had overflowed."""

    def __init__(self, monkeypatch: Any, what: str) -> None:
        self.steps = 0
        plain = StreamedModel.train_step

        def train_step(streamed: StreamedModel, *arguments: Any) -> torch.Tensor:
            loss = plain(streamed, *arguments)
            self.steps += 1
            if self.steps != 3:
                return loss
            if what == "gradients":
                next(p for p in streamed.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
            return loss * (float("nan") if what == "loss" else 1.0)

        monkeypatch.setattr(StreamedModel, "train_step", train_step)


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_the_last_good_step_is_saved_and_goes_on(what, model, data, tmp_path, monkeypatch):
    whole = config(model, data, tmp_path / "whole", "lora")
    Trainer(whole).train()
    parts = config(model, data, tmp_path / "parts", "lora")
    with monkeypatch.context() as spoiled:
        Spoiled(spoiled, what)
        with pytest.raises(UserError, match=r"the (loss|norm of the gradients) of step 3 is (nan|inf), so it is not kept"):
            Trainer(parts).train()
    assert [path.name for path in (parts.output / "state").iterdir()] == ["step-00000002"]
    rows = [json.loads(line) for line in (parts.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    kept = load_file(parts.output / "adapter" / "adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in kept.values())

    Trainer(parts.model_copy(update={"resume": True})).train()
    found, expected = (load_file(c.output / "adapter" / "adapter_model.safetensors") for c in (parts, whole))
    assert all(found[name].equal(value) for name, value in expected.items())
    assert not all(kept[name].equal(value) for name, value in expected.items())


def test_an_update_that_spoils_the_adapter_is_not_saved(model, data, tmp_path):
    """AdamW divides 0 by 0 where gradients are zero and what is added to their root is zero in fp32."""
    with pytest.raises(UserError, match=r"update of step 1 made .*lora_A.* infinite or NaN: .*training\.adam_epsilon"):
        Trainer(config(model, data, tmp_path, "lora", adam_epsilon=1e-300)).train()
    assert not (tmp_path / "adapter").exists() and not list((tmp_path / "state").glob("step-*"))


@pytest.mark.parametrize("spoiled", ["losses", "gradients"])
def test_the_journal_ends_with_the_last_good_step(spoiled, model, data, tmp_path, monkeypatch):
    plain = zeroth_order.projected_gradients
    calls = []

    def gradients(options, losses):
        calls.append(losses)
        return plain(options, losses) * np.float32(np.inf if spoiled == "gradients" and len(calls) == 3 else 1)

    monkeypatch.setattr(zeroth_order, "projected_gradients", gradients)
    made = config(model, data, tmp_path, "zo-lora")
    if spoiled == "losses":
        whole = TokenLoss.values
        factor = {2: np.float32(np.nan)}
        monkeypatch.setattr(TokenLoss, "values", lambda *args: (whole(*args)[0] * factor.get(len(calls), 1), 1))
    with pytest.raises(UserError, match=r"(the loss|the update) of step 3 is not finite.*last good step"):
        Trainer(made).train()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in kept.values())


def test_measuring_and_writing_say_so(faulty, data, tmp_path):
    with pytest.raises(UserError, match=rf"loss on the evaluation data is nan\. .*NaN in {NAME}"):
        evaluate(make_config(faulty, tmp_path, eval_data=data))
    with pytest.raises(UserError, match="outputs are NaN: look for a faulty weight"):
        list(generate(make_config(faulty, tmp_path), None, ["the cat"], max_new_tokens=2, chat=False))
