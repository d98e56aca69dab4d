"""Routers that are asked ahead, how far they are believed, and in which order experts are taken."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from data_tools import write_tokenizer
from mixtures import MIXTURES, MORE
from peft import LoraConfig, get_peft_model
from text_models import VOCAB
from text_models import make_config as text_config
from tiny_models import CONFIGS, make_config

from finetune.decoding import decode
from finetune.generate import generate
from finetune.memory.expert_guesses import ExpertGuesses
from finetune.methods.results import find_result
from finetune.offload.residency.expert_tiers import HostExperts
from finetune.offload.weights.routers import Routers
from finetune.offload.weights.streamed_experts import StreamedExperts
from finetune.planned_run import BatchShape
from finetune.session import Session

ALL = {**MIXTURES, **MORE}
WITHOUT = {"llama4", "minimax"}
"""Whose experts are not given indices; which wants a cache of its own."""
PROMPTS = [[5, 9, 17], [33, 4]]


@pytest.fixture
def model(checkpoint, monkeypatch) -> Callable[[str], Path]:
    def get(name: str) -> Path:
        monkeypatch.setitem(CONFIGS, name, ALL[name])
        return checkpoint(name)

    return get


@pytest.fixture
def opened(monkeypatch) -> list[StreamedExperts]:
    """What brings experts near, of every model that was opened."""
    found: list[StreamedExperts] = []
    begin = StreamedExperts.begin
    monkeypatch.setattr(StreamedExperts, "begin", lambda one, order: found.append(one) or begin(one, order))
    return found


def logits_of(config: Any, tokens: int, adapter: Path | None = None) -> list[torch.Tensor]:
    """Of all tokens that are decoded greedily after `PROMPTS`."""
    found: list[torch.Tensor] = []
    session = Session(find_result(config, adapter))
    try:
        planned = session.plan(BatchShape.of_text(1, 3, len(PROMPTS), train=False))
        streamed = session.open(planned, config.output / "scratch")

        def choose(logits: torch.Tensor) -> int:
            found.append(logits.clone())
            return int(logits.argmax())

        for _ in decode(streamed, PROMPTS, [choose] * len(PROMPTS), frozenset(), tokens):
            pass
    finally:
        session.close()
    return found


@pytest.fixture
def answers(monkeypatch) -> list[tuple[int, set[int], set[int]]]:
    """Of every question: the block asked about, what its router says to the input that it had in the last pass, and what was
    chosen then."""
    said: list[tuple[int, set[int], set[int]]] = []
    had: dict[int, list[Any]] = {}
    last: dict[int, tuple[list[Any], set[int]]] = {}
    take_input, ask, begin = Routers.take_input, Routers.ask, StreamedExperts.begin

    def take(routers: Routers, block: int) -> Any:
        inputs = take_input(routers, block)
        if inputs is not None:
            own = routers._found[block].own
            args, kwargs = inputs
            without = tuple(None if i in own else value for i, value in enumerate(args))
            had.setdefault(block, []).append((without, {k: None if k in own else v for k, v in kwargs.items()}))
        return inputs

    def asked(routers: Routers, block: int, inputs: Any, following: int) -> Any:
        if following in last:
            past, chosen = last.pop(following)
            rows = [row for one in past for row in ask(routers, block, one, following)]
            if rows:
                said.append((following, {expert for row in rows for expert in row}, chosen))
        return ask(routers, block, inputs, following)

    def begin_pass(experts: StreamedExperts, order: Any) -> None:
        last.clear()
        for block, inputs in had.items():
            if len(inputs) == len(PROMPTS):
                last[block] = inputs, {*experts._chosen[experts._of_block[block][0]]}
        had.clear()
        begin(experts, order)

    monkeypatch.setattr(Routers, "take_input", take)
    monkeypatch.setattr(Routers, "ask", asked)
    monkeypatch.setattr(StreamedExperts, "begin", begin_pass)
    return said


@pytest.mark.parametrize("name", sorted({*ALL} - WITHOUT))
def test_a_router_that_is_asked_says_what_it_will_choose(name, model, tmp_path, answers, opened):
    config = make_config(model(name), [], tmp_path / "out", engine={"expert_slots": 9})
    logits_of(config, 4)
    experts = opened[-1]
    assert {*experts._routers._found} == {*experts._of_block}
    if len(experts._of_block) > 1:
        assert answers
    for block, said, chosen in answers:
        assert said == chosen, block


@pytest.mark.parametrize(
    "lora",
    [{"target_parameters": ["mlp.gate.weight"]}, {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"]}],
    ids=["adapted", "saved"],
)
def test_a_router_is_asked_with_its_adapter(lora, model, tmp_path, answers):
    base = model("qwen3-next")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    logits_of(make_config(base, [], tmp_path / "out", engine={"expert_slots": 9}), 4, tmp_path / "adapter")
    assert len(answers) > 3
    for block, said, chosen in answers:
        assert said == chosen, block


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("name", ["qwen3-next", "gpt-oss", "deepseek-v3", "lfm2-moe"])
def test_guesses_change_no_number(name, device, model, tmp_path, monkeypatch):
    """Right ones, wrong ones and none."""
    make = partial(make_config, model(name), [], device=device)
    expected = logits_of(make(tmp_path / "one slot", engine={"expert_slots": 1, "lookahead": 0}), 6)
    fetched: list[int] = []
    extents = HostExperts._extents
    monkeypatch.setattr(HostExperts, "_extents", lambda tier, unit, lease: fetched.append(unit) or extents(tier, unit, lease))
    ask, counts = Routers.ask, []
    for shift in (0, 1, 2):

        def ask_wrong(routers: Routers, *question: Any, by: int = shift) -> list[list[int]]:
            return [[(expert + by) % 4 for expert in row] for row in ask(routers, *question)]

        monkeypatch.setattr(Routers, "ask", ask_wrong)
        monkeypatch.setattr(ExpertGuesses, "_share_right", lambda *_: 1.0)
        fetched.clear()
        found = logits_of(make(tmp_path / str(shift), engine={"expert_slots": 5}), 6)
        assert all(mine.equal(other) for mine, other in zip(found, expected, strict=True))
        counts.append(len(fetched))
    assert len({*counts}) > 1, "guesses were fetched"


def test_nothing_is_guessed_while_a_model_trains(model, tmp_path, tokens, monkeypatch, opened):
    from finetune.trainer import Trainer

    monkeypatch.setattr(Routers, "ask", lambda *_: pytest.fail("asked"))
    Trainer(make_config(model("mixtral"), tokens, tmp_path / "out", training={"max_steps": 2})).train()
    assert opened and not json.loads((tmp_path / "out" / "report.json").read_text())["experts"]


@pytest.fixture
def alike(tmp_path) -> Path:
    """Blocks that add next to nothing, and the same router in all: each is given what the one before it was given."""
    torch.manual_seed(3)
    config = MIXTURES["olmoe"]()
    config.vocab_size = VOCAB
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.zero_()
            elif name.endswith("gate.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "model")
    kept = (tmp_path / "model" / "config.json").read_text()
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(kept)
    return tmp_path / "model"


def test_guesses_that_were_right_are_fetched_and_reported(alike, tmp_path, capsys, opened):
    config = text_config(alike, tmp_path / "out", engine={"expert_slots": 12})
    "".join(generate(config, None, ["the cat"], max_new_tokens=40, temperature=3.0))
    guesses = opened[-1]._guesses
    assert guesses.share_right == 1.0
    assert guesses.used == guesses.guessed > 30
    line = next(line for line in capsys.readouterr().err.splitlines() if "a second" in line)
    assert f"{guesses.guessed} experts were expected on that, 100% of them used" in line


def test_only_as_many_are_believed_as_may_be_wrong():
    guesses = ExpertGuesses()
    for visit in range(99):
        guesses.add(1, [[4, 5, 6]])
        assert guesses.worthwhile(1) == ([] if visit < 8 else [4])  # 1 - 8/9 is within 0.04 x 3
        guesses.compare(1, [4, 5] if visit % 2 else [4])
    guesses.add(1, [[7, 4, 5], [5, 8, 9]])
    # Ranks were right in 99, 49 and 0 of 99 visits. Two tokens name 5 experts: 0.04 x 5 may be wrong.
    assert guesses.worthwhile(1) == [7, 5]
    assert guesses.worthwhile(2) == []
    used, guessed = guesses.used, guesses.guessed
    guesses.compare(1, [5, 6, 7])
    assert (guesses.used, guesses.guessed) == (used + 2, guessed + 2)
    assert guesses.worthwhile(1) == [], "its visit is over"
    guesses.add(1, [[7, 4, 5]])
    guesses.begin()
    assert guesses.worthwhile(1) == []


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_lanes_begin_with_what_the_lane_before_has_left(slots, model, tmp_path, monkeypatch):
    fetched: list[tuple[int, int]] = []
    extents = HostExperts._extents

    def fetch(tier, unit, lease):
        fetched.append(tier.units.place(unit))
        return extents(tier, unit, lease)

    monkeypatch.setattr(HostExperts, "_extents", fetch)
    config = make_config(model("mixtral"), [], tmp_path / "out", engine={"expert_slots": slots})
    session = Session(find_result(config, None))
    try:
        streamed = session.open(session.plan(BatchShape.of_text(1, 24, 3, train=False)), tmp_path / "scratch")
        ids = torch.arange(24).view(1, -1) + 5
        streamed.forward([{"input_ids": ids, "use_cache": False}] * 3)
    finally:
        session.close()
    for stack in range(6):
        chosen = {expert for one, expert in fetched if one == stack}
        assert len(chosen) >= 4
        assert sum(one == stack for one, _ in fetched) == len(chosen) + 2 * (len(chosen) - slots)
