"""What is wrong with a configuration, in one message: a line a key, with what was expected, what was found, the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from pydantic import ValidationError

from finetune.config.other_names import RENAMED
from finetune.memory.errors import UserError
from finetune.options import show

# What other tools call our keys: named in the message about an unknown key.
OTHER_NAMES = {
    "lr": "training.learning_rate",
    **RENAMED,
    "gradient_accumulation_steps": "training.batch_size",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "interleave_probs": "dataset.probabilities",
    "mix_strategy": "dataset.stopping_strategy",
    "datasets": "data",
}


class ConfigError(UserError):
    """A configuration that is not valid: `problems` has one line a key."""

    def __init__(self, problems: Sequence[str], origin: str = "the configuration") -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in {origin}:", *problems]))


def explain(error: ValidationError, sections: Collection[str], keys: Sequence[str]) -> dict[str, str]:
    """Key -> its line. sections: keys that have keys of their own. keys: all others, dotted."""
    expectations: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        location = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            key = ".".join(location)
            expectations[key] = [f"unknown key{nearest_key(location, sections, keys)}"]
            found[key] = show(problem["input"])
            continue
        # Behind the key stand tags of a union's members and indices: `lora.target_modules.list[str].0`.
        key = location[0] if location[0] not in sections else ".".join(location[:2])
        if problem["type"] == "missing":
            expectations[key] = [_MISSING.get(key, "missing")]
        elif problem["type"] == "value_error":  # our own checks say what they expected and found
            expectations[key] = [str(problem["ctx"]["error"])]
        else:
            expected = _expected(problem["type"], problem["msg"], location)
            lines = expectations.setdefault(key, [])
            if expected not in lines:
                lines.append(expected)
            found.setdefault(key, show(problem["input"]) + _nearest_word(problem["input"], expected))
    return {key: _problem_line(key, lines, found.get(key)) for key, lines in expectations.items()}


_MISSING = {"model": "missing; name a model directory or hub id (--model, or `model:` in the file)"}


def _expected(kind: str, message: str, location: Sequence[str]) -> str:
    if kind == "model_type":
        return "a mapping of keys to values"
    if "list[str]" in location:
        return "a list of strings"
    expected = message.removeprefix("Input should be ").split(", unable to parse")[0].split(", got a number")[0]
    return f"a number {expected}" if expected.startswith(("greater", "less")) else expected


def _problem_line(key: str, lines: list[str], found: str | None) -> str:
    if found is None:
        return f"{key}: {lines[0]}"
    if lines[0].startswith("unknown key"):
        return f"{key}: {lines[0]} (value {found})"
    return f"{key}: expected {' or '.join(lines)}, found {found}"


def _nearest_word(value: object, expected: str) -> str:
    """Of the words that `expected` has in quotation marks."""
    near = difflib.get_close_matches(value, re.findall("'([^']+)'", expected), n=1) if isinstance(value, str) else []
    return f"; nearest: {near[0]}" if near else ""


def nearest_key(location: Sequence[str], sections: Collection[str], keys: Sequence[str]) -> str:
    """Words for a message that say which key was meant by one that is unknown, given part by part; empty where none is near."""
    *folders, leaf = location
    everywhere: dict[str, str] = {}
    inside: dict[str, str] = {}
    for key in (*keys, *sections):
        section, _, name = key.rpartition(".")
        everywhere.setdefault(name, key)
        if section == ".".join(folders):
            inside[name] = key
    key = OTHER_NAMES.get(leaf) or everywhere.get(leaf)
    if key is None:
        near = [(names, one) for names in (inside, everywhere) for one in difflib.get_close_matches(leaf, names, n=1)]
        if near:
            names, one = max(near, key=lambda found: difflib.SequenceMatcher(None, found[1], leaf).ratio())
            key = names[one]
    return f"; nearest: {key}" if key else ""
