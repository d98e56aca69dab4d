"""Objectives that compare two answers, against a plain loop of PyTorch and PEFT with the papers' formulas (as TRL has them)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import CHATML, prepare_in_this_process
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from text_models import StopAfter, make_config, plain_model, write_model, write_prefix, write_rows
from torch.nn import functional
from transformers import AutoTokenizer

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.data import BatchPlan
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.memory.errors import UserError
from finetune.questions import compare_methods

WORDS = "the cat sat on mat hello there world what is it about user assistant was great terrible".split()
LORA = {"r": 3, "alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TRAINING = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3, "max_steps": 3, "lr_scheduler": "constant"}
EPSILON = 1e-3  # of AdamW: with a small one, the update of a gradient near 0 is its sign, which is rounding
NAMES = ("chosen", "rejected", "accuracies", "margins")


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    prepare_in_this_process(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model", CHATML)


def rows(count: int = 10) -> list[dict[str, str]]:
    generator = np.random.default_rng(8)

    def words(least: int, most: int) -> str:
        return " ".join(generator.choice(WORDS, int(generator.integers(least, most))))

    return [{"prompt": words(1, 9), "chosen": " " + words(1, 7), "rejected": " " + words(1, 12)} for _ in range(count)]


def config_of(model: Path, output: Path, data: Any, objective: str, **changes: Any) -> Config:
    training = {**TRAINING, "adam_epsilon": EPSILON, "objective": objective, **changes.pop("training", {})}
    return make_config(model, output, data=data, training=training, lora=changes.pop("lora", LORA), **changes)


def metrics_of(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def tokenised(model: Path, data: list[dict[str, str]]) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of each row."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answers = [tokenizer(row["prompt"] + row[key])["input_ids"] for key in ("chosen", "rejected")]
        assert all(ids[: len(prompt)] == prompt for ids in answers)
        found.append((prompt, *([*ids[len(prompt) :], tokenizer.eos_token_id] for ids in answers)))
    return found


def log_probs(model: Any, texts: list[tuple[list[int], list[int]]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each (prompt, answer), padded together: log-probabilities of all tokens but the first, and of the answer's."""
    ids = [prompt + answer for prompt, answer in texts]
    length = max(map(len, ids))
    padded = torch.tensor([one + [2] * (length - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in ids])
    logits = model(padded, attention_mask=mask).logits[:, :-1].float()
    scores = logits.log_softmax(-1).gather(2, padded[:, 1:, None]).squeeze(2)
    return [
        (row[: len(one) - 1], row[len(prompt) - 1 : len(one) - 1])
        for row, one, (prompt, _) in zip(scores, ids, texts, strict=True)
    ]


def reference_loss(model: Any, pairs: list, objective: str, loss_type: str, options: dict) -> tuple[torch.Tensor, dict]:
    """The formulas. model: PEFT's."""
    beta, smoothing = options.get("beta", 2.0 if objective == "simpo" else 0.1), options.get("label_smoothing", 0.0)
    texts = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    found, count = log_probs(model, texts), len(pairs)
    sums = torch.stack([answer.sum() for _, answer in found])
    lengths = torch.tensor([float(len(answer)) for _, answer in found])
    if objective == "dpo":
        with torch.no_grad(), model.disable_adapter():
            was_training = model.training
            model.eval()
            reference = torch.stack([answer.sum() for _, answer in log_probs(model, texts)])
            model.train(was_training)
        ratios = sums - reference
        rewards, shown = beta * ratios, sums
        compared = ratios / lengths if loss_type == "ipo" else ratios
    else:
        averages = objective in ("simpo", "orpo") or loss_type == "ipo"
        shown = compared = sums / lengths if averages else sums
        rewards = beta * shown
    h = compared[:count] - compared[count:]
    if objective == "orpo":
        p = shown.exp()
        odds = p / (1 - p)
        losses = -beta * functional.logsigmoid(torch.log(odds[:count] / odds[count:]))
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.clamp(1 - beta * h, min=0)
    else:
        margin = beta * h - (options.get("simpo_gamma", 0.5) if objective == "simpo" else 0)
        right, flipped = -torch.log(torch.sigmoid(margin)), -torch.log(torch.sigmoid(-margin))
        losses = (1 - smoothing) * right + smoothing * flipped
        if loss_type == "robust":
            losses = ((1 - smoothing) * right - smoothing * flipped) / (1 - 2 * smoothing)
    loss = losses.mean()
    alpha = {"orpo": 1.0, "cpo": 1.0}.get(objective, 0.0)
    alpha = options.get("cpo_alpha", alpha)
    if alpha:
        whole = objective == "orpo" and options.get("orpo_prompt_loss", True)
        tokens = torch.cat([text if whole else answer for text, answer in found[:count]])
        loss = loss - alpha * tokens.mean()
    chosen, rejected = rewards[:count].detach(), rewards[count:].detach()
    values = (chosen.mean(), rejected.mean(), (chosen > rejected).float().mean(), (chosen - rejected).mean())
    logged = dict(zip([f"rewards/{name}" for name in NAMES], values, strict=True))
    logged |= {"logps/chosen": shown[:count].detach().mean(), "logps/rejected": shown[count:].detach().mean()}
    return loss, {name: float(value) for name, value in logged.items()}


def adapted(model: Path) -> Any:
    plain = plain_model(model)
    torch.manual_seed(42)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = {{"alpha": "lora_alpha"}.get(key, key): value for key, value in LORA.items()}
        return get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **lora)).train()


def plain_run(model: Path, pairs: list, objective: str, loss_type: str, options: dict) -> Iterator[tuple[Any, dict, Any]]:
    """(loss, what is logged, model) of each step, before its update."""
    peft = adapted(model)
    lengths = np.array([len(prompt) + max(len(a), len(b)) for prompt, a, b in pairs])
    plan = BatchPlan(len(pairs), 4, 2, 42, lengths, steps=3)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], eps=EPSILON, weight_decay=0.0)
    for step in range(3):
        batch = [pairs[row[0]] for group in plan.step(step) for row in group]
        loss, logged = reference_loss(peft, batch, objective, loss_type, options)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        yield float(loss.detach()), logged, peft
        optimizer.step()
        optimizer.zero_grad()


CASES = [
    ("orpo", "sigmoid", {}),
    ("orpo", "sigmoid", {"beta": 0.5, "orpo_prompt_loss": False}),
    ("simpo", "sigmoid", {"simpo_gamma": 1.0}),
    ("cpo", "sigmoid", {"label_smoothing": 0.1}),
    ("cpo", "hinge", {"cpo_alpha": 0.5}),
    ("cpo", "ipo", {"cpo_alpha": 0.0}),
    ("dpo", "sigmoid", {}),
    ("dpo", "sigmoid", {"beta": 0.3, "label_smoothing": 0.2}),
    ("dpo", "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ("dpo", "ipo", {}),
    ("dpo", "hinge", {"beta": 0.05}),
]


@pytest.mark.every(2)
@pytest.mark.parametrize("tile_vocab", [None, 100], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(("objective", "loss_type", "options"), CASES)
def test_three_steps_are_those_of_a_plain_loop(model, tmp_path, objective, loss_type, options, tile_vocab):
    if tile_vocab is not None and options:
        pytest.skip("chunks once for each loss")
    data = rows()
    engine = {"loss_tile_vocab": tile_vocab, "loss_tile_tokens": 16}
    preference = options | {"loss_type": loss_type} if loss_type != "sigmoid" else options
    config = config_of(model, tmp_path / "out", data, objective, preference=preference, engine=engine)
    Trainer(config).train()
    expected_run = list(plain_run(model, tokenised(model, data), objective, loss_type, options))
    for row, (loss, logged, _) in zip(metrics_of(config), expected_run, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=2e-6, abs=2e-6)
        for name, value in logged.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    saved = load_file(config.output / "adapter" / "adapter_model.safetensors")
    peft = expected_run[-1][2]  # the updates of all steps are in it
    expected = {name.replace(".default", ""): p for name, p in peft.named_parameters() if p.requires_grad}
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tile_vocab", [None, 100], ids=["one chunk", "chunks"])
def test_the_models_own_weights(model, tmp_path, tile_vocab):
    """A step of all weights, the head among them, of an objective without a reference."""
    data, training = rows(4), {"max_steps": 1, "learning_rate": 1e-2, "max_grad_norm": None, "adam_epsilon": 1e-8}
    engine = {"loss_tile_vocab": tile_vocab, "loss_tile_tokens": 16}
    config = config_of(
        model, tmp_path / "out", data, "orpo", training=training, method="full", disk="1GiB", engine=engine,
        optimizer={"name": "sgd", "momentum": 0.0},
    )  # fmt: skip
    Trainer(config).train()
    export(config, tmp_path / "exported")
    plain = plain_model(model)
    loss, logged = reference_loss(plain, tokenised(model, data), "orpo", "sigmoid", {})
    loss.backward()
    row = metrics_of(config)[0]
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=2e-6)
    assert row["rewards/margins"] == pytest.approx(logged["rewards/margins"], rel=1e-5, abs=1e-6)
    tuned = plain_model(tmp_path / "exported")
    for name, parameter in plain.named_parameters():
        expected = parameter.detach() - 1e-2 * parameter.grad
        torch.testing.assert_close(tuned.get_parameter(name).detach(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_placement_changes_no_bit_and_a_run_resumes(model, tmp_path, objective):
    data = rows()
    whole = config_of(model, tmp_path / "whole", data, objective)
    Trainer(whole).train()
    parts = config_of(model, tmp_path / "parts", data, objective, engine={"kept_graphs": 0, "resident_blocks": 0})
    Trainer(parts, callbacks=[StopAfter(2)]).train()
    Trainer(parts.model_copy(update={"resume": True})).train()
    graphs = config_of(model, tmp_path / "graphs", data, objective, engine={"kept_graphs": 3}, device="simulated")
    Trainer(graphs).train()
    values = [load_file(one.output / "adapter" / "adapter_model.safetensors") for one in (whole, parts, graphs)]
    for other in values[1:]:
        assert all(other[name].equal(value) for name, value in values[0].items())
    other = config_of(model, whole.output, data, objective, resume=True, preference={"beta": 0.7})
    with pytest.raises(UserError, match="preference.beta: 0.1 then, 0.7 now"):
        Trainer(other).train()


def test_the_base_is_read_as_often_as_by_supervised_steps(model, tmp_path):
    data = rows(8)
    same = [{"prompt": row["prompt"], "completion": row[key]} for row in data for key in ("chosen", "rejected")]
    engine = {"resident_blocks": 0, "kept_graphs": 0}
    compared = config_of(model, tmp_path / "dpo", data, "dpo", engine=engine)
    supervised = config_of(model, tmp_path / "sft", same, "loss", engine=engine, training={"batch_size": 8})
    read = []
    for config in (compared, supervised):
        Trainer(config).train()
        read.append(sum(row["disk_read_bytes"] for row in metrics_of(config)))
    assert 0 < read[0] <= 1.02 * read[1]


ADAPTERS = {
    "gpt2 with its own dropout": ("gpt2", {"dropout": 0.5, "target_modules": ["c_attn"]}),
    "head": ("llama", {"dropout": 0.5, "target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "dora": ("llama", {"use_dora": True, "target_modules": ["down_proj"]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "extra": {"modules_to_save": ["lm_head", "norm"]}}),
    "rows": ("llama", {"target_modules": ["q_proj"], "extra": {"trainable_token_indices": [5, 300]}}),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_reference_is_the_base_without_dropout(name, tmp_path):
    """Whatever the adapter is made of; it is another than the base's from the second step on."""
    kind, lora = ADAPTERS[name]
    model, data = write_model(kind, tmp_path / "model"), rows(4)
    config = config_of(model, tmp_path / "out", data, "dpo", lora={"r": 3, **lora})
    Trainer(config).train()
    assert abs(metrics_of(config)[-1]["rewards/margins"]) > 1e-3
    plain = plain_model(model)
    for side, key in ((1, "chosen"), (2, "rejected")):
        with torch.no_grad():
            expected = np.mean([float(log_probs(plain, [(one[0], one[side])])[0][1].sum()) for one in tokenised(model, data)])
        for row in metrics_of(config):  # every step has all rows
            assert row[f"logps/{key}"] - row[f"rewards/{key}"] / 0.1 == pytest.approx(expected, rel=1e-5)


WITHOUT_PROMPTS = {"orpo_prompt_loss": False}


@pytest.mark.every(2)
@pytest.mark.parametrize(("objective", "options"), [("dpo", {}), ("orpo", {}), ("orpo", WITHOUT_PROMPTS), ("cpo", {})])
def test_evaluation(model, tmp_path, objective, options):
    """In mid-run, and of what the run has left, whatever the rows are computed together with."""
    data, held_out = rows(6), rows(13)[6:]
    path = write_rows(tmp_path / "rows.jsonl", held_out)
    config = config_of(model, tmp_path / "out", data, objective, eval_data=path, preference=options)
    Trainer(config).train()
    again = evaluate(config.model_copy(update={"output": tmp_path / "eval"}), config.output)
    peft = adapted(model).eval()
    saved = load_file(config.output / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name.replace(".default", "")])
        loss, logged = reference_loss(peft, tokenised(model, held_out), objective, "sigmoid", options)
    row = metrics_of(config)[-1]
    for name, value in {"loss": float(loss), **logged}.items():
        assert row[f"eval_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert again[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert again["examples"] == 7


def labelled(count: int) -> list[dict[str, Any]]:
    made = rows(count)
    return [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 != 1} for i, row in enumerate(made)]


def kto_loss(model: Any, batch: list[tuple[list[int], list[int], bool]]) -> tuple[torch.Tensor, dict[str, float]]:
    """Equations 7 and 8 of Ethayarajh et al. 2024, with the answers of a batch one row further for the other pairs."""
    matched = [(prompt, answer) for prompt, answer, _ in batch]
    others = [(prompt, answer) for (prompt, _, _), (_, answer, _) in zip(batch, [batch[-1], *batch[:-1]], strict=True)]

    def sums(texts: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        return torch.stack([answer.sum() for _, answer in log_probs(model, texts)])

    with torch.no_grad(), model.disable_adapter():
        reference, other_reference = sums(matched), sums(others)
    with torch.no_grad():
        z = (sums(others) - other_reference).mean().clamp(min=0)
    found = sums(matched)
    ratios, wanted = found - reference, torch.tensor([label for _, _, label in batch])
    losses = torch.where(
        wanted, 1.5 * (1 - torch.sigmoid(0.2 * (ratios - z))), 0.5 * (1 - torch.sigmoid(0.2 * (z - ratios)))
    )
    logged = {"kl": z}
    for name, here in (("chosen", wanted), ("rejected", ~wanted)):
        if here.any():
            logged |= {f"rewards/{name}": 0.2 * ratios.detach()[here].mean(), f"logps/{name}": found.detach()[here].mean()}
    return losses.mean(), {name: float(value) for name, value in logged.items()}


def test_kto(model, tmp_path):
    """Three steps and evaluations against a plain loop; the same bits after a resume."""
    data, held_out, weights = labelled(9), labelled(13)[9:], {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.2}
    config = config_of(model, tmp_path / "out", data, "kto", preference=weights, eval_data=held_out)
    Trainer(config).train()
    pairs = [
        [(prompt, answer, row["label"]) for (prompt, answer, _), row in zip(
            tokenised(model, [{**row, "chosen": row["completion"], "rejected": " a"} for row in some]), some, strict=True
        )] for some in (data, held_out)
    ]  # fmt: skip
    peft = adapted(model)
    plan = BatchPlan(len(data), 4, 2, 42, np.array([len(a) + len(b) for a, b, _ in pairs[0]]), steps=3)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], eps=EPSILON, weight_decay=0.0)
    found = metrics_of(config)
    for step, row in enumerate(found):
        loss, logged = kto_loss(peft, [pairs[0][one[0]] for group in plan.step(step) for one in group])
        for name, value in {"loss": float(loss.detach()), **logged}.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss, logged = kto_loss(peft.eval(), pairs[1])
    for name, value in {"loss": float(loss), **logged}.items():
        assert found[-1][f"eval_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    parts = config.model_copy(update={"output": tmp_path / "parts", "eval_data": None})
    Trainer(parts, callbacks=[StopAfter(2)]).train()
    Trainer(parts.model_copy(update={"resume": True})).train()
    one, other = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (config.output, parts.output))
    assert all(other[name].equal(value) for name, value in one.items())


def test_without_an_adapter_the_model_is_its_own_reference(model, tmp_path):
    config = config_of(model, tmp_path / "out", rows(3), "dpo")
    found = evaluate(config)
    assert found["loss"] == pytest.approx(np.log(2)) and found["rewards/margins"] == 0


def test_a_model_that_has_no_reference_is_not_measured_against_one(model, tmp_path):
    data, text = rows(3), [{"text": "the cat sat on the mat"}] * 2
    full = {"method": "full", "training": {"max_steps": 1, "batch_size": 1}, "disk": "1GiB"}
    whole = {"r": 3, "target_modules": ["q_proj"], "extra": {"modules_to_save": ["norm"]}}
    Trainer(make_config(model, tmp_path / "full", data=text, **full)).train()
    Trainer(make_config(model, tmp_path / "saved", data=text, lora=whole, training={"max_steps": 1})).train()
    adapters = {"full": "own weights were tuned", "saved": "without modules_to_save", "prefix": "with a prefix"}
    for name, message in adapters.items():
        place = write_prefix(model, tmp_path / "prefix") if name == "prefix" else tmp_path / name
        with pytest.raises(UserError, match=message):
            evaluate(config_of(model, tmp_path / "eval", data, "dpo"), place)


def test_routers_have_no_loss_of_their_own(tmp_path):
    """Nor are they asked for it where the model's configuration has it."""
    model, data = write_model("mixtral", tmp_path / "model"), rows(4)
    values = json.loads((model / "config.json").read_text()) | {"output_router_logits": True}
    (model / "config.json").write_text(json.dumps(values))
    lora = {"r": 3, "target_modules": ["q_proj"]}
    with pytest.raises(UserError, match="training.router_loss: expected without with training.objective cpo"):
        Trainer(config_of(model, tmp_path / "out", data, "cpo", lora=lora)).train()
    config = config_of(model, tmp_path / "out", data, "dpo", lora=lora, training={"max_steps": 1, "router_loss": "without"})
    Trainer(config).train()
    assert metrics_of(config)[0]["loss"] == pytest.approx(np.log(2))


def test_messages_with_and_without_a_prompt(model, tmp_path):
    """The same tokens in three ways to write them."""
    question, answers = {"role": "user", "content": "hello there"}, ["the cat", "what is it"]
    said = [[{"role": "assistant", "content": text}] for text in answers]
    ways = [
        {"prompt": [question], "chosen": said[0], "rejected": said[1]},
        {"chosen": [question, *said[0]], "rejected": [question, *said[1]]},
        {"prompt": "hello there", "chosen": [question, *said[0]], "rejected": [question, *said[1]], "messages": [question]},
    ]
    found = []
    for index, way in enumerate(ways):
        config = config_of(model, tmp_path / f"out{index}", [way] * 4, "simpo", training={"max_steps": 1})
        Trainer(config).train()
        found.append(metrics_of(config)[0])
    assert found[0]["loss"] == found[1]["loss"] == found[2]["loss"]
    tokenizer, peft = AutoTokenizer.from_pretrained(model), adapted(model)
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    whole = [tokenizer.apply_chat_template([question, *one], return_dict=False) for one in said]
    assert all(tokenizer.decode(ids[-2:]) == "<|im_end|>\n" for ids in whole)  # of which the last is not the model's to write
    whole = [ids[:-1] for ids in whole]
    means = [log_probs(peft, [(prompt, ids[len(prompt) :])])[0][1].mean() for ids in whole]
    assert found[0]["logps/chosen"] == pytest.approx(float(means[0].detach()), rel=1e-5)
    assert found[0]["logps/rejected"] == pytest.approx(float(means[1]), rel=1e-5)


ASKED = [{"role": "user", "content": "a"}]
SAID = [{"role": "assistant", "content": "the cat"}]


@pytest.mark.parametrize(("objective", "row", "message"), [
    ("dpo", {"chosen": "a", "rejected": "b"}, 'expected "prompt", found "chosen", "rejected"'),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": SAID}, 'expected "rejected" to be a string, found a list'),
    ("dpo", {"prompt": "a", "chosen": "", "rejected": "b"}, '"chosen" is empty'),
    ("dpo", {"prompt": [{"role": "user", "content": "a"}], "chosen": SAID, "rejected": [{"role": "user", "content": "b"}]},
     '"rejected" has no message of the assistant'),
    ("dpo", {"chosen": SAID, "rejected": [{"role": "user", "content": "b"}, *SAID]}, "to begin with the same messages"),
    ("dpo", {"prompt": "b", "chosen": ASKED + SAID, "rejected": ASKED + SAID}, "in the column of this name"),
    ("dpo", {"prompt": "a", "completion": "b"}, 'expected rows with "prompt", "chosen" and "rejected"'),
    ("dpo", {"prompt": "hello " * 80, "chosen": "b", "rejected": "a"}, "no example is left of 1 rows"),
    ("kto", {"prompt": "a", "completion": "b"}, 'expected "label" to be true (wanted) or false, found none'),
    ("kto", {"prompt": "a", "completion": "b", "label": 1}, 'expected "label" to be true (wanted) or false, found a number'),
    ("kto", {"text": "a"}, 'expected rows with "prompt", "completion" and "label", found the form text'),
])  # fmt: skip
def test_wrong_rows_are_refused(model, tmp_path, objective, row, message):
    with pytest.raises(UserError) as caught:
        Trainer(config_of(model, tmp_path / "out", [row], objective)).train()
    assert message in str(caught.value)


def test_pairs_are_not_trained_on_as_text(model, tmp_path):
    with pytest.raises(UserError, match="found pairs of a chosen and a rejected answer: train on them with training.objective"):
        Trainer(config_of(model, tmp_path / "out", rows(2), "loss")).train()


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "full"}, "dpo is trained with method lora so far, found method full"),
    ({"dataset": {"packing": True}}, "expected it off with training.objective dpo"),
    ({"dataset": {"completion_only": False}}, "expected it on with training.objective dpo"),
    ({"preference": {"simpo_gamma": 1.0}}, "expected only with training.objective simpo, found dpo"),
    ({"preference": {"loss_type": "ipo", "label_smoothing": 0.1}}, "expected 0 with loss_type ipo"),
    ({"preference": {"label_smoothing": 0.5}}, "label_smoothing"),
    ({"training": {"objective": "kto", "batch_size": 1}}, "expected at least 2 with training.objective kto"),
    ({"training": {"router_loss": "micro_batch"}}, "expected only with objective loss"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, tmp_path / "out", None, "dpo", **changes)
    assert message in str(caught.value)


def test_the_plan_counts_the_reference(model, tmp_path):
    planned = {word: Trainer(config_of(model, tmp_path / "out", None, word)).plan() for word in ("dpo", "cpo")}
    assert planned["cpo"].shape.micro_batches == planned["dpo"].shape.micro_batches == 4
    assert planned["dpo"].shape.forward_lanes == 4 and planned["cpo"].shape.forward_lanes == 0
    assert "and 4 that only go forward" in planned["dpo"].describe()
    assert planned["dpo"].plan.host_peak_bytes > planned["cpo"].plan.host_peak_bytes
    costs = compare_methods(config_of(model, tmp_path / "out", None, "dpo"), planned["dpo"])
    assert [cost.planned is not None for cost in costs] == [cost.method == "lora" for cost in costs]
