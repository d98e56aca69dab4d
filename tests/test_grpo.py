"""Reinforcement from rewards, against a plain loop of PyTorch and PEFT with the papers' formulas (as TRL has them)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import prepare_in_this_process
from safetensors.torch import load_file
from test_preferences import EPSILON, LORA, TRAINING, adapted, metrics_of, rows
from text_models import StopAfter, make_config, write_model, write_rows
from transformers import AutoTokenizer

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.data import BatchPlan
from finetune.data.preparation import prepare_for
from finetune.evaluate import evaluate, open_rows, plan_with_evaluation
from finetune.memory.errors import UserError
from finetune.merge import merge
from finetune.methods.base import make_method
from finetune.objectives.base import make_objective
from finetune.objectives.completions import completion_seed
from finetune.planner import Planner
from finetune.session import Session

ENDS = {1, *range(30, 345, 9)}  # so that many texts end, and some do not
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
    place = write_model("llama", tmp_path_factory.mktemp("llama") / "model")
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ENDS)}))
    return place


def data_of(count: int = 6) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(count)]


def config_of(model: Path, output: Path, data: Any, grpo: dict[str, Any], **changes: Any) -> Config:
    training = {**TRAINING, "batch_size": 3, "micro_batch_size": 2, "adam_epsilon": EPSILON, "objective": "grpo"}
    training |= changes.pop("training", {})
    grpo = {**OPTIONS, "reward_funcs": [many_letters, vowels], "reward_weights": [1.0, 0.5]} | grpo
    return make_config(model, output, data=data, training=training, lora=changes.pop("lora", LORA), grpo=grpo, **changes)


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
    by_sequence, masks = options.get("importance_sampling_level") == "sequence", options.get("mask_truncated_completions")
    sums, sizes, kls, below, above = [], [], [], [], []
    mask = torch.zeros(len(found), max(map(len, found)))
    for i, (new, before, advantage) in enumerate(zip(found, old, given, strict=True)):
        difference = new - before
        if by_sequence:
            difference = difference.mean() * torch.ones_like(new)
        ratio = torch.exp(difference)
        each = -torch.min(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
        if beta:
            kls.append(torch.exp(reference[i] - new) - (reference[i] - new) - 1)
            each = each + beta * kls[-1]
        counts = ended[i] or not masks
        mask[i, : len(new)] = counts
        sums.append(each.sum() * counts)
        sizes.append(len(new) * counts)
        tokens = slice(1) if by_sequence else slice(None)
        below.append(((ratio < low) & (advantage < 0) & (counts or not by_sequence)).float()[tokens])
        above.append(((ratio > high) & (advantage > 0) & (counts or not by_sequence)).float()[tokens])
    if kind == "grpo":
        loss = sum(one / max(size, 1) for one, size in zip(sums, sizes, strict=True)) / len(sums)
    elif kind == "dr_grpo":
        loss = sum(sums) / (len(sums) * MOST)
    else:
        loss = sum(sums) / max(sum(sizes), 1)
    below, above, kls = (padded(one, mask.shape[1]) for one in (below, above, kls))
    logged = {
        "clip_ratio/low_mean": masked_mean(below, mask), "clip_ratio/high_max": np.nanmax(means_of_rows(above, mask).numpy()),
        "clip_ratio/low_min": np.nanmin(means_of_rows(below, mask).numpy()),
    }  # fmt: skip
    return loss, logged | ({"kl": masked_mean(kls, mask)} if beta else {})


def padded(parts: list[torch.Tensor], length: int) -> torch.Tensor:
    """[completions, length], or [completions, 1] of one value each."""
    length = 1 if parts and all(len(one) == 1 for one in parts) else length
    return torch.stack([torch.nn.functional.pad(one.detach(), (0, length - len(one))) for one in parts]) if parts else None


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Over all tokens that count; over all rows where each has one value."""
    return values.mean() if values.shape[1] == 1 else (values * mask).sum() / mask.sum().clamp(min=1)


def means_of_rows(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """NaN of a row of which nothing counts."""
    return values[:, 0] if values.shape[1] == 1 else (values * mask).sum(1) / mask.sum(1)


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
    ({"beta": 0.3, "loss_type": "grpo", "num_iterations": 2, "epsilon": 0.01, "epsilon_high": 0.02, "temperature": 0.7,
      "mask_truncated_completions": True}, 2),
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


def test_an_evaluation_leaves_steps_what_they_keep_in_memory(model, tmp_path, monkeypatch):
    """As many prompts at once as fit beside the blocks that a step finds in memory, though more would fit without these."""
    changes = {"eval_data": data_of(64), "engine": {"kept_graphs": 0}}
    config = config_of(model, tmp_path / "out", data_of(3), {"max_completion_length": 40}, **changes)
    monkeypatch.setattr(Planner, "process_bytes", 1 << 28)
    session = Session(make_method(config))
    try:
        rows, directory = open_rows(session, config), session.parts.directory
        data = prepare_for(config, config.data, directory, choices=False, append_eos=None)
        shape = make_objective(config, session, data).shape(session)
        planned, held_out = plan_with_evaluation(session, rows, shape, 64)
        everything = held_out.shape
        assert everything.micro_batches == 64
        budget_bytes = planned.plan.host_peak_bytes
        while not planned.read_bytes:
            budget_bytes -= 1 << 14
            session.settle(config.model_copy(update={"host_memory": budget_bytes}))
            planned = session.plan(shape, everything)
        assert not session.plan(shape).read_bytes
        planned, held_out = plan_with_evaluation(session, rows, shape, 64)
        assert not planned.read_bytes and held_out.shape.micro_batches == 32
    finally:
        session.close()


def test_a_reference_is_met_only_where_it_counts(model, tmp_path):
    """Without one, the base under the adapter may be another model, and an adapter may have modules of its own."""
    lora = LORA | {"init_lora_weights": "pissa", "extra": {"modules_to_save": ["norm"]}}
    changes = {"training": {"max_steps": 1}, "lora": lora, "eval_data": data_of(2)}
    config = config_of(model, tmp_path / "out", data_of(3), {}, **changes)
    Trainer(config).train()
    found = evaluate(config.model_copy(update={"output": tmp_path / "eval"}), config.output)
    assert found["reward"] == pytest.approx(metrics_of(config)[0]["eval_reward"], rel=1e-5)
    with pytest.raises(UserError, match="grpo compares with the model without its adapter"):
        Trainer(config_of(model, tmp_path / "refused", data_of(3), {"beta": 0.1}, **changes)).train()


def test_functions_of_python_have_names(model, tmp_path):
    """The run goes on with equal ones; its settings can be read, and say what is missing where the functions are needed."""

    def config(**more: Any) -> Config:
        functions = [partial(many_letters, weight=2), lambda completions, **_: [0.5] * len(completions), partial(many_letters)]
        grpo = {"reward_funcs": functions, "reward_weights": None}
        return config_of(model, tmp_path / "out", data_of(3), grpo, training={"max_steps": 2}, **more)

    Trainer(config(), callbacks=[StopAfter(1)]).train()
    Trainer(config(resume=True)).train()
    names = {"rewards/many_letters/mean", "rewards/<lambda>/mean", "rewards/many_letters_2/mean"}
    assert all(names <= row.keys() for row in metrics_of(config()))
    again = Config.load(tmp_path / "out")
    assert again.grpo.reward_funcs == ["<python>:many_letters", "<python>:lambda", "<python>:many_letters"]
    with pytest.raises(UserError, match=r"grpo.reward_funcs: the run was started in Python.*\(many_letters\).*pass it again"):
        evaluate(again.model_copy(update={"data": write_rows(tmp_path / "rows.jsonl", data_of(2))}), tmp_path / "out")
    merge(again, tmp_path / "merged", "plain")
    assert (tmp_path / "merged" / "config.json").is_file()


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
