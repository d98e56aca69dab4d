"""Reinforcement from rewards, against a plain loop of PyTorch and PEFT with the papers' formulas (as TRL has them)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import prepare_in_this_process
from finetune.memory.errors import UserError
from safetensors.torch import load_file
from test_preferences import EPSILON, LORA, TRAINING, adapted, metrics_of, rows
from text_models import StopAfter, make_config, write_model
from transformers import AutoTokenizer

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.data import BatchPlan
from finetune.evaluate import evaluate
from finetune.objectives.completions import completion_seed

ENDS = {1}
MOST, COUNT = 7, 4
OPTIONS = {"max_completion_length": MOST, "num_generations": COUNT, "reward_funcs": []}


def many_letters(completions: list[str], references: list[str], **_: Any) -> list[float]:
    pairs = zip(completions, references, strict=True)
    return [len(set(one)) / 10 - abs(len(one) - len(reference)) / 50 for one, reference in pairs]


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in one)) for one in completions]


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    prepare_in_this_process(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model")


def data_of(count: int = 6) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(count)]


def config_of(model: Path, output: Path, data: Any, grpo: dict[str, Any], **changes: Any) -> Config:
    training = {**TRAINING, "batch_size": 3, "micro_batch_size": 2, "adam_epsilon": EPSILON, "objective": "grpo"}
    training |= changes.pop("training", {})
    grpo = {**OPTIONS, "reward_funcs": [many_letters, vowels], "reward_weights": [1.0, 0.5]} | grpo
    return make_config(model, output, data=data, training=training, lora=LORA, grpo=grpo, **changes)


def written(model: Any, prompt: list[int], seeds: list[int], temperature: float) -> list[list[int]]:
    """What the model says after a prompt, text by text and without a cache."""
    found = []
    for seed in seeds:
        generator, tokens = torch.Generator().manual_seed(seed), []
        while len(tokens) < MOST and not (tokens and tokens[-1] in ENDS):
            logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].float()
            tokens.append(int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)))
        found.append(tokens)
    return found


def token_log_probs(model: Any, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def loss_of(found: list, old: list, reference: list | None, given: list[float], ended: list[bool], options: dict) -> tuple:
    """TRL's formulas over the step's completions; (loss, what is logged)."""
    low, high = 1 - options.get("epsilon", 0.2), 1 + options.get("epsilon_high", options.get("epsilon", 0.2))
    beta, kind = options.get("beta", 0.0), options.get("loss_type", "dapo")
    sums, sizes, kls, below, above = [], [], [], [], []
    for i, (new, before, advantage) in enumerate(zip(found, old, given, strict=True)):
        difference = new - before
        if options.get("importance_sampling_level") == "sequence":
            difference = difference.mean() * torch.ones_like(new)
        ratio = torch.exp(difference)
        each = -torch.min(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
        if beta:
            kls.append(torch.exp(reference[i] - new) - (reference[i] - new) - 1)
            each = each + beta * kls[-1]
        counts = ended[i] or not options.get("mask_truncated_completions")
        sums.append(each.sum() * counts)
        sizes.append(len(new) * counts)
        below.append(((ratio < low) & (advantage < 0)).float())
        above.append(((ratio > high) & (advantage > 0)).float())
    if kind == "grpo":
        loss = sum(one / max(size, 1) for one, size in zip(sums, sizes, strict=True)) / len(sums)
    elif kind == "dr_grpo":
        loss = sum(sums) / (len(sums) * MOST)
    else:
        loss = sum(sums) / max(sum(sizes), 1)
    logged = {"clip_ratio/low_mean": torch.cat(below).mean(), "clip_ratio/high_max": max(one.mean() for one in above)}
    return loss, logged | ({"kl": torch.cat(kls).mean()} if beta else {})


def plain_run(model: Path, data: list[dict[str, str]], options: dict, steps: int) -> tuple[list[dict[str, float]], Any]:
    tokenizer, peft = AutoTokenizer.from_pretrained(model), adapted(model)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in data]
    plan = BatchPlan(len(data), 3, 2, 42, np.array([len(prompt) for prompt in prompts]), steps=steps)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], eps=EPSILON, weight_decay=0.0)
    temperature, updates, found = options.get("temperature", 1.0), options.get("num_iterations", 1), []
    for step in range(steps):
        lanes, rewards, names = [], [], []
        for row in (row[0] for group in plan.step(step) for row in group):
            with torch.no_grad():
                texts = written(peft, prompts[row], [completion_seed(42, step, row, i) for i in range(COUNT)], temperature)
            lanes += [(prompts[row], tokens) for tokens in texts]
            said = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in texts]
            both = many_letters(said, [data[row]["completion"]] * COUNT), vowels(said)
            rewards.append([a + 0.5 * b for a, b in zip(*both, strict=True)])
            names.append(both)
        rewards = torch.tensor(rewards)
        given = rewards - rewards.mean(dim=1, keepdim=True)
        scale = options.get("scale_rewards", "group")
        if scale != "none":
            given = given / ((rewards.std() if scale == "batch" else rewards.std(dim=1, keepdim=True)) + 1e-4)
        ended = [tokens[-1] in ENDS for _, tokens in lanes]
        with torch.no_grad():
            old = [token_log_probs(peft, *lane, temperature) for lane in lanes]
            with peft.disable_adapter():
                reference = [token_log_probs(peft, *lane, temperature) for lane in lanes]
        losses, logs = [], []
        for _ in range(updates):
            new = [token_log_probs(peft, *lane, temperature) for lane in lanes]
            loss, logged = loss_of(new, old, reference, given.flatten().tolist(), ended, options)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            logs.append({name: float(torch.as_tensor(value).detach()) for name, value in logged.items()})
        lengths = [len(tokens) for _, tokens in lanes]
        found.append({
            "loss": np.mean(losses), "reward": float(rewards.mean()), "reward_std": float(rewards.std()),
            "rewards/vowels/mean": np.mean([vowel for _, vowel in names]), "completions/mean_length": np.mean(lengths),
            "completions/clipped_ratio": 1 - np.mean(ended), **{name: np.mean([log[name] for log in logs]) for name in logs[0]},
        })  # fmt: skip
    return found, peft


CASES = [
    ({"scale_rewards": "none"}, 1),
    ({"beta": 0.3, "loss_type": "grpo", "num_iterations": 2, "epsilon": 0.01, "epsilon_high": 0.02, "temperature": 0.7}, 2),
    ({"loss_type": "dr_grpo", "scale_rewards": "batch", "importance_sampling_level": "sequence", "num_iterations": 2,
      "epsilon": 1e-3, "mask_truncated_completions": True}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("options", "steps"), CASES)
def test_steps_are_those_of_a_plain_loop(model, tmp_path, options, steps):
    """The same texts, rewards, losses and updates, with few prompts written at once, blocks on disk, and after a resume."""
    data = data_of()
    config = config_of(model, tmp_path / "out", data, options, training={"max_steps": steps})
    if steps > 1:
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"resident_blocks": 0, "kept_graphs": 0})})
        Trainer(config, callbacks=[StopAfter(1)]).train()
        config = config.model_copy(update={"resume": True})
    Trainer(config).train()
    expected, peft = plain_run(model, data, options, steps)
    for row, wanted in zip(metrics_of(config), expected, strict=True):
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name
    saved = load_file(config.output / "adapter" / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): p for name, p in peft.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, trained[name].detach(), rtol=2e-5, atol=2e-6)


def test_the_plan_counts_what_is_written(model, tmp_path):
    """Caches of all texts that are written at once: in a budget that is too small for them fewer prompts are, with the same
    bits; the words say how many passes that takes."""
    data, training = data_of(), {"max_steps": 1, "batch_size": 4}
    grpo = {"max_completion_length": 40, "num_generations": 64}
    whole = config_of(model, tmp_path / "whole", data, grpo, training=training)
    planned = Trainer(whole).plan()
    writing = planned.shape.writing
    assert writing.together == 4 and writing.passes == 40
    assert "64 texts of each of 4 prompts are written, 4 prompts at once: at most 40 passes" in planned.describe()
    key_bytes = 2 * 3 * 2 * 12 * 4 * 64  # keys and values of 3 blocks, 2 heads of 12, fp32, of every position and prompt
    fewer = Trainer(config_of(model, tmp_path / "out", data, grpo | {"num_generations": 2}, training=training)).plan()
    assert planned.plan.host_peak_bytes - fewer.plan.host_peak_bytes > 4 * 50 * key_bytes * 62 // 64 - (1 << 20)


def test_evaluation_is_of_the_likeliest_texts(model, tmp_path):
    data, held_out = data_of(3), data_of(6)[3:]
    config = config_of(model, tmp_path / "out", data, {}, training={"max_steps": 1}, eval_data=held_out)
    Trainer(config).train()
    row = metrics_of(config)[0]
    again = evaluate(config.model_copy(update={"output": tmp_path / "eval"}), config.output)
    tokenizer, peft = AutoTokenizer.from_pretrained(model), adapted(model).eval()
    saved = load_file(config.output / "adapter" / "adapter_model.safetensors")
    rewards = []
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name.replace(".default", "")])
        for one in held_out:
            prompt, tokens = tokenizer(one["prompt"])["input_ids"], []
            while len(tokens) < MOST and not (tokens and tokens[-1] in ENDS):
                tokens.append(int(peft(torch.tensor([prompt + tokens])).logits[0, -1].argmax()))
            said = [tokenizer.decode(tokens, skip_special_tokens=True)]
            rewards.append(many_letters(said, [one["completion"]])[0] + 0.5 * vowels(said)[0])
    assert again["reward"] == row["eval_reward"] == pytest.approx(np.mean(rewards), rel=1e-6)
    assert again["loss"] == -again["reward"] and again["examples"] == 3


def raises(**_: Any) -> list[float]:
    raise KeyError("answer")


@pytest.mark.parametrize(("rows_", "grpo", "message"), [
    ([{"text": "the cat"}], {}, "expected rows with a prompt and a completion"),
    ([{"prompt": "hello " * 9, "completion": "a"}], {"max_completion_length": 60}, "sequence_length: expected at least"),
    ([{"prompt": "a", "completion": "hello " * 90}], {}, "1 rows are cut at 64 tokens, with the references"),
    (None, {"reward_funcs": ["nowhere.py:one"], "reward_weights": None}, "grpo.reward_funcs: expected nowhere.py:one to name"),
    (None, {"reward_funcs": [raises], "reward_weights": None}, "raises failed: KeyError"),
])  # fmt: skip
def test_wrong_rows_and_rewards_are_refused(model, tmp_path, rows_, grpo, message):
    with pytest.raises(UserError) as caught:
        Trainer(config_of(model, tmp_path / "out", rows_ or data_of(2), grpo, training={"max_steps": 1})).train()
    assert message in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "full"}, "grpo is trained with method lora so far, found method full"),
    ({"grpo": {"reward_funcs": []}}, "expected what completions are worth"),
    ({"grpo": {"reward_funcs": ["no function"]}}, "FILE.py:FUNCTION"),
    ({"grpo": {"reward_weights": [1.0]}}, "expected as many reward_weights as reward_funcs, 2, found 1"),
    ({"grpo": {"max_completion_length": 64}}, "expected less than dataset.sequence_length"),
    ({"engine": {"sequence_chunk": 16}}, "engine.sequence_chunk: expected none with training.objective grpo"),
    ({"training": {"objective": "loss"}}, "expected only with training.objective grpo, found loss"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, tmp_path / "out", None, changes.pop("grpo", {}), **changes)
    assert message in str(caught.value)
