"""What a refused plan says would fit: each plan that is named is made, and so is the next larger one, which must not fit."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import make_config, save_tiny

import finetune.nearest_plans
from finetune.config import Config
from finetune.memory.plan import SPREAD_BYTES, PlanRefused
from finetune.memory.units import MIB
from finetune.methods.base import make_method
from finetune.micro_batch_choice import sizes
from finetune.nearest_plans import MOST_PLANS, ROW_STEP
from finetune.objectives.base import objective_class
from finetune.planner import Planner
from finetune.session import Session
from finetune.trainer import Trainer

PROCESS_BYTES = 300 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def a_process_that_does_not_grow(monkeypatch) -> None:
    monkeypatch.setattr(Planner, "process_bytes", PROCESS_BYTES)


def refusal(config: Config) -> PlanRefused:
    with pytest.raises(PlanRefused) as refused:
        Trainer(config).plan()
    return refused.value


def named(refused: PlanRefused) -> list[tuple[list[str], int]]:
    """(words that the user types, MiB) of every plan that is named."""
    lines = str(refused).partition("These fit, the nearest first:\n")[2].splitlines()
    line = r"    (--.*): (\d+) MiB(?: and \d+ MiB on the device)?, about [\d.]+ (?:s|min) a step"
    found = [re.fullmatch(line, words) for words in lines]
    assert all(found) and len(found) <= MOST_PLANS, lines
    return [(shlex.split(match[1]), int(match[2])) for match in found]


def changed(config: Config, words: list[str]) -> Config:
    keys = {"--micro-batch-size": "micro_batch_size", "--sequence-length": "sequence_length", "--method": "method"}
    keys |= {"--host-memory": "host_memory", "--device-memory": "device_memory"}
    values = {key: getattr(config, key) for key in config.model_fields_set}
    settings = []
    for flag, value in zip(words[::2], words[1::2], strict=True):
        if flag == "--set":
            settings.append(value)
        elif keys[flag] in ("micro_batch_size", "sequence_length"):
            settings.append(f"{keys[flag]}={value}")
        else:
            values[keys[flag]] = value
    base = Config(**values)
    for setting in settings:
        key, _, value = setting.partition("=")
        key = {"micro_batch_size": "training.micro_batch_size", "sequence_length": "dataset.sequence_length"}.get(key, key)
        section, _, name = key.partition(".")
        inner = getattr(base, section).model_copy(update={name: int(value) if value.isdecimal() else value})
        base = base.model_copy(update={section: inner})
    return base


def large(model: Path, tmp_path: Path, **changes) -> Config:
    training = {"batch_size": 8, "micro_batch_size": 8}
    return make_config(model, None, tmp_path, training=training, dataset={"sequence_length": 1024}, **changes)


@pytest.fixture
def least(model, tmp_path) -> Iterator[Callable[[Config], int]]:
    """The host memory in which a plan fits, with the same process."""
    session = Session(make_method(large(model, tmp_path)), only_plan=True)

    def measure(config: Config) -> int:
        session.settle(config)
        shape = objective_class(config).full_shape(config, session, config.dataset.sequence_length)
        return session.least_memory(shape)[0]

    yield measure
    session.close()


def test_every_named_plan_fits_and_the_next_one_does_not(model, tmp_path, least):
    config = large(model, tmp_path)
    budget = least(changed(config, ["--micro-batch-size", "2"])) + SPREAD_BYTES
    config = changed(config, ["--host-memory", str(budget)])
    refused = refusal(config)
    plans = dict((" ".join(words[::2]), (words, mib)) for words, mib in named(refused))
    assert list(plans)[:3] == ["--host-memory", "--micro-batch-size", "--sequence-length"]
    for words, mib in plans.values():
        fitting = changed(config, words)
        assert least(fitting) == pytest.approx(mib * MIB, abs=MIB)
        assert words[0] == "--host-memory" or least(fitting) <= budget - SPREAD_BYTES
    within = budget - SPREAD_BYTES  # in which the search looked
    rows = int(plans["--micro-batch-size"][0][1])
    assert rows == 2 and least(changed(config, ["--micro-batch-size", str(sizes(8)[sizes(8).index(rows) + 1])])) > within
    length = int(plans["--sequence-length"][0][1])
    assert least(changed(config, ["--sequence-length", str(length)])) <= within
    assert least(changed(config, ["--sequence-length", str(length + ROW_STEP)])) > within
    memory = int(plans["--host-memory"][0][1].removesuffix("MiB"))
    assert least(config) <= memory * MIB - SPREAD_BYTES < least(config) + MIB


def test_the_largest_chunk_of_a_text_that_fits_is_named(model, tmp_path, least, monkeypatch):
    monkeypatch.setattr(finetune.nearest_plans, "MOST_PLANS", 2)
    training, rows = {"batch_size": 1, "micro_batch_size": 1}, {"sequence_length": 2048}
    config = make_config(model, None, tmp_path, training=training, dataset=rows)
    budget = least(changed(config, ["--set", "engine.sequence_chunk=512"])) + SPREAD_BYTES
    words = [" ".join(words) for words, _ in named(refusal(changed(config, ["--host-memory", str(budget)])))]
    assert words[1] == "--set engine.sequence_chunk=512"
    auto = changed(config, ["--set", "engine.sequence_chunk=auto", "--host-memory", str(budget)])
    chosen, whole = Trainer(auto).plan(), Trainer(changed(auto, ["--host-memory", "8GiB"])).plan()
    assert chosen.batch.chunk == 512 and "512 tokens of a text at a time, the most that fit" in chosen.describe()
    assert whole.batch.chunk is None and "of a text at a time" not in whole.describe()
    assert least(changed(config, ["--set", "engine.sequence_chunk=1024"])) > budget - SPREAD_BYTES


def test_what_the_user_has_set_too_high_is_named(model, tmp_path, least, monkeypatch):
    monkeypatch.setattr(finetune.nearest_plans, "SPREAD_BYTES", 0)  # what a small model's blocks take is less
    engine = {"resident_blocks": 3, "lookahead": 2, "activations": "host", "kept_graphs": 2}
    config = large(model, tmp_path, engine=engine)
    for key, value in {"activations": "disk", "kept_graphs": "0"}.items():
        budget = least(changed(config, ["--set", f"engine.{key}={value}"]))
        assert budget < least(config)
        words = [words[1] for words, _ in named(refusal(changed(config, ["--host-memory", str(budget)])))]
        (word,) = (word for word in words if word.startswith(f"engine.{key}="))
        assert least(changed(config, ["--set", word])) <= budget
        found = word.partition("=")[2]
        larger = "host" if key == "activations" else int(found) + 1
        assert least(changed(config, ["--set", f"engine.{key}={larger}"])) > budget


def test_a_run_that_not_even_short_rows_fit_says_for_which_rows_it_speaks(model, tmp_path, least):
    """The data may have shorter rows than it might have; it is not read before that."""
    config = changed(large(model, tmp_path), ["--host-memory", str(PROCESS_BYTES)])
    (tmp_path / "rows.jsonl").write_text("not read")
    with pytest.raises(PlanRefused) as refused:
        Trainer(config.model_copy(update={"data": str(tmp_path / "rows.jsonl")})).train()
    found = re.search(r"for rows of 1024 tokens: .* not been read yet. Rows of 16 tokens need (\d+) MiB", str(refused.value))
    short, full = (least(changed(config, ["--sequence-length", length])) for length in ("16", "1024"))
    assert int(found[1]) == pytest.approx(short / MIB, abs=1) and short < full - 10 * MIB
    assert refused.value.smallest_bytes == pytest.approx(full, abs=MIB)


def test_where_nothing_else_helps_only_memory_is_named(model, tmp_path):
    refused = refusal(large(model, tmp_path, host_memory="50MiB"))
    assert [words[::2] for words, _ in named(refused)] == [["--host-memory"]]


def test_a_run_that_goes_on_is_told_nothing_that_changes_its_numbers(model, tmp_path, least):
    config = large(model, tmp_path)
    tight = changed(config, ["--host-memory", str(least(changed(config, ["--micro-batch-size", "2"])) + SPREAD_BYTES)])
    refused = refusal(tight.model_copy(update={"resume": True}))
    assert {word for words, _ in named(refused) for word in words[::2]} <= {"--host-memory", "--set"}


def test_both_tiers_are_named_where_both_are_too_small(model, tmp_path):
    refused = refusal(large(model, tmp_path, device="simulated", host_memory="100MiB", device_memory="1MiB"))
    first = named(refused)[0][0]
    assert first[::2] == ["--host-memory", "--device-memory"]
    planned = Trainer(changed(large(model, tmp_path, device="simulated"), first)).plan().plan
    assert planned.device_peak_bytes <= planned.device_budget_bytes
