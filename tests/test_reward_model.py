"""Models that give texts scores, against a plain loop of PyTorch and PEFT with the papers' formulas (as TRL has them)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import CHATML, prepare_in_this_process
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_preferences import EPSILON, LORA, TRAINING, metrics_of, rows, tokenised
from text_models import StopAfter, make_config, write_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.data import BatchPlan
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.memory.errors import UserError

PAD = 2


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    prepare_in_this_process(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model", CHATML)


def config_of(model: Path, output: Path, data: Any, **changes: Any) -> Config:
    training = {**TRAINING, "adam_epsilon": EPSILON, "objective": "reward", **changes.pop("training", {})}
    return make_config(model, output, data=data, training=training, lora=changes.pop("lora", LORA), **changes)


def scorer(model: Path) -> Any:
    torch.manual_seed(42)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)


def adapted(model: Path) -> Any:
    plain = scorer(model)
    torch.manual_seed(42)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = {{"alpha": "lora_alpha"}.get(key, key): value for key, value in LORA.items()}
        return get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", **lora)).train()


def scores(model: Any, texts: list[list[int]]) -> torch.Tensor:
    length = max(map(len, texts))
    padded = torch.tensor([one + [PAD] * (length - len(one)) for one in texts])
    mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in texts])
    inputs = {"input_ids": padded} | ({} if bool(mask.all()) else {"attention_mask": mask})
    return model(**inputs, use_cache=False).logits[:, 0]


def loss_of(chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor, center: float) -> torch.Tensor:
    loss = torch.log(1 + torch.exp(-(chosen - rejected - margins))).mean()
    return loss + center * ((chosen + rejected) ** 2).mean()


def plain_run(
    model: Path, pairs: list, margins: list[float], center: float, lane_by_lane: bool
) -> list[tuple[float, dict, Any]]:
    """lane_by_lane: gradients of one lane after the other, as they are summed here."""
    peft = adapted(model)
    peft.config.pad_token_id = peft.base_model.model.config.pad_token_id = PAD
    plan = BatchPlan(len(pairs), 4, 2, 42, np.array([max(map(len, pair)) for pair in pairs]), steps=3)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], eps=EPSILON, weight_decay=0.0)
    found = []
    for step in range(3):
        groups = plan.step(step)
        batch = [row[0] for rows in groups for row in rows]
        wanted = torch.tensor([margins[i] for i in batch])
        lanes = [[pairs[row[0]][side] for row in rows] for rows in groups for side in (0, 1)]
        values = [scores(peft, lane) for lane in lanes]
        leaves = [one.detach().requires_grad_() if lane_by_lane else one for one in values]
        chosen, rejected = torch.cat(leaves[::2]), torch.cat(leaves[1::2])
        loss = loss_of(chosen, rejected, wanted, center)
        if lane_by_lane:
            loss = -torch.nn.functional.logsigmoid(chosen - rejected - wanted).mean()
            loss = loss + center * torch.mean((chosen + rejected) ** 2)
        loss.backward()
        for value, leaf in zip(values, leaves, strict=True):
            if lane_by_lane:
                value.backward(leaf.grad)
        logged = {
            "min_reward": torch.cat([chosen, rejected]).min(), "max_reward": torch.cat([chosen, rejected]).max(),
            "mean_reward": torch.cat([chosen, rejected]).mean(), "accuracy": (chosen > rejected).float().mean(),
            "margin": (chosen - rejected).mean(),
        }  # fmt: skip
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        logged = {name: float(value.detach()) for name, value in logged.items()}
        found.append((float(loss.detach()), logged | {"grad_norm": float(norm)}, peft))
        optimizer.step()
        optimizer.zero_grad()
    return found


def texts_of(model: Path, data: list[dict]) -> list[tuple[list[int], list[int]]]:
    return [(prompt + chosen, prompt + rejected) for prompt, chosen, rejected in tokenised(model, data)]


@pytest.mark.parametrize("center", [None, 0.3])
def test_three_steps_are_those_of_a_plain_loop(model, tmp_path, center):
    """Scores of padded and of lone texts, margins; the bits of a loop that sums gradients in the same order, also after a
    resume and wherever blocks are. What is left loads in Transformers and PEFT and gives the scores that were measured."""
    data = [row | ({"margin": i / 4} if center and i % 2 else {}) for i, row in enumerate(rows())]
    margins = [row.get("margin", 0.0) for row in data]
    held_out = rows(13)[10:]
    options = {} if center is None else {"center_rewards_coefficient": center}
    config = config_of(model, tmp_path / "out", data, reward=options, eval_data=held_out)
    if center:
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"kept_graphs": 0, "resident_blocks": 0})})
        Trainer(config, callbacks=[StopAfter(2)]).train()
        config = config.model_copy(update={"resume": True})
    Trainer(config).train()
    pairs = texts_of(model, data)
    steps = metrics_of(config)
    for row, (loss, logged, _) in zip(steps, plain_run(model, pairs, margins, center or 0.0, False), strict=True):
        assert row["loss"] == pytest.approx(loss, abs=1e-6)
        for name, value in logged.items():
            assert row[name] == pytest.approx(value, abs=1e-6, rel=1e-6), name
    peft = plain_run(model, pairs, margins, center or 0.0, True)[-1][2]
    saved = load_file(config.output / "adapter" / "adapter_model.safetensors")
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    expected = {name.replace(".default", "").replace(".modules_to_save", ""): p for name, p in trained.items()}
    assert saved.keys() == expected.keys() and any("score" in name for name in saved)
    assert all(value.equal(expected[name].detach()) for name, value in saved.items())
    loaded = PeftModel.from_pretrained(scorer(model), config.output / "adapter").eval()
    loaded.base_model.model.config.pad_token_id = PAD
    with torch.no_grad():
        found = [scores(loaded, list(pair)) for pair in texts_of(model, held_out)]
    wanted = loss_of(*torch.stack(found).T, torch.zeros(3), center or 0.0)
    again = evaluate(config.model_copy(update={"output": tmp_path / "eval"}), config.output)
    assert again["loss"] == pytest.approx(float(wanted), abs=1e-6) and again["examples"] == 3
    assert steps[-1]["eval_loss"] == pytest.approx(float(wanted), abs=1e-6)
    assert steps[-1]["eval_margin"] == pytest.approx(float(torch.stack(found).diff(dim=1).neg().mean()), abs=1e-6)


def test_the_models_own_weights_where_the_checkpoint_has_a_score(model, tmp_path):
    """The result is a classifier of Transformers."""
    with pytest.raises(UserError, match=r"expected a checkpoint with score.weight where the model's own weights are trained"):
        Trainer(config_of(model, tmp_path / "out", rows(4), method="full", disk="1GiB")).train()
    base, data = tmp_path / "scorer", rows(4)
    made = scorer(model)
    made.config.pad_token_id = PAD
    made.save_pretrained(base)
    AutoTokenizer.from_pretrained(model).save_pretrained(base)
    training = {"max_steps": 1, "learning_rate": 1e-2, "max_grad_norm": None, "batch_size": 4, "adam_epsilon": 1e-8}
    optimizer = {"name": "sgd", "momentum": 0.0}
    config = config_of(base, tmp_path / "full", data, method="full", disk="1GiB", optimizer=optimizer, training=training)
    Trainer(config).train()
    export(config, tmp_path / "exported")
    loss = loss_of(*torch.stack([scores(made, list(pair)) for pair in texts_of(model, data)]).T, torch.zeros(4), 0.0)
    loss.backward()
    assert metrics_of(config)[0]["loss"] == pytest.approx(float(loss), abs=1e-6)
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    for name, parameter in made.named_parameters():
        expected = parameter.detach() - 1e-2 * parameter.grad
        torch.testing.assert_close(tuned.get_parameter(name).detach(), expected, rtol=1e-6, atol=1e-6)


def test_rows_with_and_without_prompts(model, tmp_path):
    """A text counts as a whole; conversations go through the template, to its last token."""
    question, said = {"role": "user", "content": "hello there"}, {"role": "assistant", "content": "the cat"}
    other = {"role": "assistant", "content": "what is it about"}
    ways = [
        {"chosen": "hello there the cat", "rejected": "hello there"},
        {"prompt": "hello", "chosen": " there the cat", "rejected": " there"},
        {"chosen": [question, said], "rejected": [question, other]},
        {"prompt": [question], "chosen": [said], "rejected": [other], "margin": 1},
        {"chosen": [said], "rejected": [other]},
    ]
    tokenizer, plain = AutoTokenizer.from_pretrained(model), adapted(model).eval()
    plain.base_model.model.config.pad_token_id = PAD
    config = config_of(model, tmp_path / "out", ways, training={"max_steps": 1, "batch_size": 5, "micro_batch_size": 1})
    Trainer(config).train()
    pairs = []
    for way in ways:
        head = way.get("prompt", [] if isinstance(way["chosen"], list) else "")
        texts = [head + way[key] for key in ("chosen", "rejected")]
        if isinstance(texts[0], list):
            ids = [tokenizer.apply_chat_template(text, return_dict=False) for text in texts]
        else:
            ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        with torch.no_grad():
            pairs.append(scores(plain, ids))
    row, found = metrics_of(config)[0], torch.stack(pairs)
    assert row["margin"] == pytest.approx(float((found[:, 0] - found[:, 1]).mean()), abs=1e-6)
    assert row["min_reward"] == pytest.approx(float(found.min()), abs=1e-6)
    assert row["max_reward"] == pytest.approx(float(found.max()), abs=1e-6)


@pytest.mark.parametrize(("row", "message"), [
    ({"chosen": "a", "rejected": "b", "margin": "large"}, 'expected "margin" to be a finite number'),
    ({"chosen": "a", "rejected": ""}, '"rejected" is empty'),
    ({"prompt": "a", "completion": "b"}, 'expected rows with "chosen" and "rejected"'),
    ({"chosen": "hello " * 90, "rejected": "b"}, "no example is left of 1 rows"),
])  # fmt: skip
def test_wrong_rows_are_refused(model, tmp_path, row, message):
    with pytest.raises(UserError) as caught:
        Trainer(config_of(model, tmp_path / "out", [row])).train()
    assert message in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "zo"}, "training.objective"),
    ({"dataset": {"packing": True}}, "expected it off with training.objective reward"),
    ({"training": {"objective": "loss"}, "reward": {"center_rewards_coefficient": 0.1}}, "only with training.objective"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, tmp_path / "out", None, **changes)
    assert message in str(caught.value)


def test_a_model_of_several_labels_gives_no_score(model, tmp_path):
    folder = tmp_path / "model"
    AutoModelForSequenceClassification.from_config(scorer(model).config, dtype=torch.float32).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}))
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    with pytest.raises(UserError, match="expected a model with one label, which is its score, found 2 labels"):
        Trainer(config_of(folder, tmp_path / "out", rows(4))).plan()
