"""Objectives without a gradient, under several versions of the weights, against the plain model with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import noise_reference as reference
import numpy as np
import pytest
import torch
from test_evaluate import ONE_TOKEN, UNLIKE, data_prepared_here, pairs, token_losses  # noqa: F401  fixture
from text_models import make_config, plain_model, write_model, write_rows
from transformers import AutoTokenizer

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.data import BatchPlan
from finetune.export import export
from finetune.memory.errors import UserError
from finetune.methods.base import make_method
from finetune.objectives.base import Objective, check_gradient, make_objective
from finetune.objectives.registry import OBJECTIVES, ObjectiveEntry
from finetune.objectives.rewards import load_reward, token_f1
from finetune.objectives.token_loss import TokenLoss
from finetune.offload.noise.noise import parameter_key
from finetune.offload.perturb.variants import Variant
from finetune.offload.sizing.needs import STEP
from finetune.offload.streamed_model import StreamedModel
from finetune.one_run import take_rows
from finetune.runs.directory import RunDirectory
from finetune.session import Session

VARIANTS = [Variant(), Variant(7, 0.05), Variant(7, -0.05)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory) -> Path:
    return write_model(request.param, tmp_path_factory.mktemp(request.param) / "model")


def objective_config(model: Path, output: Path, rows: Any, objective: Any, **changes: Any) -> Config:
    training = {"batch_size": 5, "micro_batch_size": 2, "learning_rate": 1e-3, "max_steps": 4}
    zo = {"objective": objective, "epsilon": 1e-2, "fold_steps": 3, "max_new_tokens": 6}
    return make_config(model, output, data=rows, method="zo", zo=zo, training=training, **changes)


@contextmanager
def opened(config: Config) -> Iterator[tuple[Objective, StreamedModel]]:
    session, directory = Session(make_method(config)), RunDirectory(config.output)
    try:
        objective = make_objective(config, session, take_rows(session, directory, config.output, print))
        yield objective, session.open(session.plan(objective.shape(session)), config.output / "scratch")
    finally:
        session.close()
        directory.close()


def first_step(objective: Objective) -> tuple[list[list[tuple[int, ...]]], list[int]]:
    """The micro-batches of a step, and its rows in that order."""
    groups = BatchPlan(len(objective.lengths), 5, 2, 3, objective.lengths, steps=1).step(0)
    return groups, [row[0] for group in groups for row in group]


def versions(model: Path) -> Iterator[Any]:
    """The plain model with the weights of each variant."""
    for variant in VARIANTS:
        plain = plain_model(model)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if variant.coefficient:
                    z = reference.noise("rademacher", variant.seed, parameter_key(name), 0, parameter.numel())
                    parameter.add_(torch.from_numpy(z).view(parameter.shape), alpha=variant.coefficient)
        yield plain


@pytest.mark.parametrize("completions", [ONE_TOKEN, UNLIKE], ids=["one token", "unlike lengths"])
@pytest.mark.parametrize("objective", ["classification", "accuracy"])
def test_candidates_are_compared_by_their_likelihoods(model, completions, objective, tmp_path):
    rows = pairs(completions)
    with opened(objective_config(model, tmp_path, rows, objective)) as (found, streamed):
        groups, order = first_step(found)
        values, tokens = found.values(streamed, groups, VARIANTS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    candidates = sorted({row["completion"] for row in rows})
    expected = []
    for plain in versions(model):
        each = []
        for row in (rows[i] for i in order):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ends = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in candidates]
            likelihoods = torch.stack([-token_losses(plain, prompt + end)[len(prompt) - 1 :].sum() for end in ends])
            answer = candidates.index(row["completion"])
            if objective == "accuracy":
                each.append(float(likelihoods.argmax() != answer))
            else:
                each.append(-float(likelihoods.log_softmax(dim=0)[answer]))
        expected.append(np.mean(each))
    np.testing.assert_allclose(values, expected, rtol=2e-4, atol=1e-5)
    assert values.dtype == np.float32 and tokens > 0
    if objective == "classification":
        assert len(set(values.tolist())) == 3


def test_exact_match_is_what_greedy_decoding_gives(model, tmp_path):
    """Half of the rows have the completion that the unperturbed model gives."""
    tokenizer, plain = AutoTokenizer.from_pretrained(model), plain_model(model)
    rows = []
    for i, row in enumerate(pairs(ONE_TOKEN, 14)):
        said = tokenizer.decode(greedy(plain, tokenizer(row["prompt"])["input_ids"], 2))
        again = tokenizer(row["prompt"])["input_ids"] + tokenizer(said, add_special_tokens=False)["input_ids"]
        if i % 2 and again == tokenizer(row["prompt"])["input_ids"] + greedy(
            plain, tokenizer(row["prompt"])["input_ids"], 2
        ):
            row["completion"] = said
        rows.append(row)
    config = objective_config(model, tmp_path, rows, "exact_match")
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"append_eos": False})})
    with opened(config) as (found, streamed):
        groups, order = first_step(found)
        groups, order = [[(i,) for i in range(len(rows))]], range(len(rows))
        values, _ = found.values(streamed, groups, VARIANTS)
    expected = []
    for plain in versions(model):
        wrong = []
        for row in (rows[i] for i in order):
            ids = tokenizer(row["prompt"])["input_ids"]
            wanted = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            wrong.append(greedy(plain, ids, len(wanted)) != wanted)
        expected.append(np.mean(wrong))
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert 0 < values[0] < 1


def greedy(plain: Any, prompt: list[int], count: int) -> list[int]:
    out = plain.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=2, eos_token_id=1,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_a_function_sees_what_each_version_says(model, tmp_path):
    calls = []

    def reward(prompts, completions, references, **_):
        calls.append((prompts, completions, references))
        return [len(text) for text in completions]

    rows = pairs([" great cat", " terrible"])
    with opened(objective_config(model, tmp_path, rows, reward)) as (found, streamed):
        groups, order = first_step(found)
        values, _ = found.values(streamed, groups, VARIANTS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for (prompts, completions, references), plain, value in zip(calls, versions(model), values, strict=True):
        assert prompts == [tokenizer.decode(tokenizer(rows[i]["prompt"])["input_ids"][1:]) for i in order]
        assert references == [rows[i]["completion"] for i in order]
        ids = [tokenizer(rows[i]["prompt"])["input_ids"] for i in order]
        said = [tokenizer.decode(one + greedy(plain, one, 6), skip_special_tokens=True) for one in ids]
        assert [p + c for p, c in zip(prompts, completions, strict=True)] == said
        assert value == np.float32(-np.mean([len(text) for text in completions]))
    assert len(calls) == 3 and calls[0][1] != calls[1][1]


def test_f1_is_over_words():
    found = ["The cat, sat!", "a dog", "", "the", "cat cat dog"]
    wanted = ["cat sat down", "cat", "cat", "a", "cat dog dog"]
    assert token_f1(found, wanted) == pytest.approx([2 * 2 / (2 + 3), 0.0, 0.0, 1.0, 2 * 2 / 6])


@pytest.mark.parametrize("objective", ["classification", "accuracy", "exact_match", "f1", "file", "lora", "prefix"])
def test_runs_and_export(objective, tmp_path):
    model = write_model("llama", tmp_path / "model")
    (tmp_path / "rewards.py").write_text(
        "def short(prompts, completions, references):\n    return [1 / (1 + len(text)) for text in completions]\n"
    )
    adapter = objective in ("lora", "prefix")
    word = {"file": f"{tmp_path / 'rewards.py'}:short", "lora": "f1", "prefix": "f1"}.get(objective, objective)
    config = objective_config(model, tmp_path / "out", pairs(ONE_TOKEN), word)
    if adapter:
        config = config.model_copy(update={"zo": config.zo.model_copy(update={"parameters": objective})})
    result = Trainer(config).train()
    assert result.global_step == 4
    report = result.report
    assert report["measured"]["host_peak_bytes"] <= report["budget"]["host_peak_bytes"]
    if not adapter:
        assert export(config, tmp_path / "tuned") == 4


def test_refusals(tmp_path):
    model = write_model("llama", tmp_path / "model")

    def run(objective: Any, rows: Any = None, **changes: Any) -> None:
        rows = pairs(ONE_TOKEN) if rows is None else rows
        Trainer(objective_config(model, tmp_path / "out", rows, objective, **changes)).train()

    with pytest.raises(ConfigError, match="zo.objective: expected one of loss, classification.* found 'f2'"):
        run("f2")
    with pytest.raises(ConfigError, match="dataset.packing off"):
        run("accuracy", dataset={"packing": True})
    with pytest.raises(UserError, match="there is none at"):
        run(f"{tmp_path}/absent.py:reward")
    (tmp_path / "broken.py").write_text("x = 1 / 0\n")
    with pytest.raises(UserError, match="cannot be imported: ZeroDivisionError"):
        run(f"{tmp_path}/broken.py:reward")
    (tmp_path / "one.py").write_text("reward = 3\n")
    with pytest.raises(UserError, match="expected a function named reward"):
        run(f"{tmp_path}/one.py:reward")
    with pytest.raises(UserError, match="failed: KeyError"):
        run(lambda **_: {}["x"])
    with pytest.raises(UserError, match="expected 5 finite numbers"):
        run(lambda **_: [1.0])
    with pytest.raises(UserError, match="expected rows with a prompt and a completion"):
        run("f1", write_rows(tmp_path / "text.jsonl", [{"text": "the cat sat on the mat"}] * 3))
    with pytest.raises(UserError, match="tensors"):
        run("accuracy", [{"pixel_values": torch.zeros(3), "labels": torch.tensor(1)}] * 3)
    with pytest.raises(UserError, match="different"):
        run("accuracy", [{"prompt": "the cat", "completion": " sat"}] * 3)


def test_a_plan_without_data_counts_the_caches(tmp_path):
    model = write_model("llama", tmp_path / "model")
    sizes = []
    for new in (6, 106):
        config = objective_config(model, tmp_path / "out", None, "f1")
        config = config.model_copy(update={"zo": config.zo.model_copy(update={"max_new_tokens": new})})
        sizes.append(Trainer(config).plan().needs.bytes_of(STEP))
    layer = 2 * 2 * 12 * 4  # keys and values, 2 heads of 12 numbers, fp32: bytes a token
    # Three layers of 5 rows under 2 versions of the weights, and one in which the 2 heads are repeated for 4.
    assert sizes[1] - sizes[0] == 100 * layer * (3 * 10 + 2)


def test_functions_are_found_in_modules():
    assert load_reward("finetune.objectives.rewards:token_f1") is token_f1
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError"):
        load_reward("no_such_module:reward")


def test_each_objective_is_in_the_registry_and_only_the_loss_has_a_gradient():
    for name, entry in OBJECTIVES.items():
        kind = entry.load()
        assert issubclass(kind, Objective)
        assert kind.has_gradient == kind.takes_tensors == entry.packs == (name == "loss")
        assert kind.compares_choices == (name in ("classification", "accuracy"))


def test_a_method_with_gradients_refuses_an_objective_without(tmp_path):
    model = write_model("llama", tmp_path / "model")
    config = objective_config(model, tmp_path / "out", pairs(ONE_TOKEN), "exact_match")
    with opened(config) as (objective, _), pytest.raises(UserError, match="method lora: expected an objective with a gradient"):
        check_gradient(objective, "lora")


class Raised(TokenLoss):
    """The model's own loss and 1, of the last trained token of each row."""

    def lanes(self, groups, device):
        found = super().lanes(groups, device)
        for labels in found.labels:
            for row in labels:
                row[: int((row != -100).nonzero()[-1])] = -100
        return found

    def make_loss(self, model, head):
        own = super().make_loss(model, head)

        class OneMore:
            watch = staticmethod(own.watch)

            def backward(self, *args, **kwargs):
                return own.backward(*args, **kwargs) + 1

            def values(self, *args):
                found = own.values(*args)
                return found._replace(losses=found.losses + 1)

        return OneMore()


@pytest.mark.parametrize("method", ["lora", "full", "zo"])
def test_methods_with_and_without_gradients_take_the_same_objects(method, tmp_path, monkeypatch):
    model = write_model("llama", tmp_path / "model")
    monkeypatch.setitem(OBJECTIVES, "loss", ObjectiveEntry(f"{__name__}:Raised"))
    rows = pairs(ONE_TOKEN)
    training = {"batch_size": len(rows), "micro_batch_size": 2, "learning_rate": 0.0, "max_steps": 1, "seed": 3}
    zo = {"zo": {"epsilon": 1e-7}} if method == "zo" else {}
    config = make_config(
        model, tmp_path / "out", data=rows, method=method, training=training, dataset={"append_eos": False}, **zo
    )
    tokenizer, plain = AutoTokenizer.from_pretrained(model), plain_model(model)
    losses = [float(token_losses(plain, tokenizer(row["prompt"] + row["completion"])["input_ids"])[-1]) for row in rows]
    assert Trainer(config).train().training_loss == pytest.approx(np.mean(losses) + 1, rel=1e-5)
