"""FILE.py:FUNCTION, MODULE:FUNCTION or a function: what a generated completion is worth, as the user's own code says."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from finetune.config import Config
from finetune.config.function_names import PYTHON, name_of_function
from finetune.data import TokenDataset
from finetune.memory.errors import UserError
from finetune.objectives.generated import Generated
from finetune.session import Session

Reward = Callable[..., Sequence[float]]
"""Called with the keyword arguments prompts, completions (what the model said) and references (the data's completions), all
lists of as many strings; returns a number for each, more for better. So does TRL call its reward functions."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Rewards(Generated):
    """- mean reward of what greedy decoding gives."""

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        word = config.objective
        self._reward: Reward = word if callable(word) else load_reward(word)
        super().__init__(config, session, data)

    def value(self, prompts: list[str], completions: list[str], references: list[str]) -> float:
        return -float(np.mean(call_reward(self._reward, prompts, completions, references)))


def token_f1(completions: Sequence[str], references: Sequence[str], **_: object) -> list[float]:
    """F1 over words, without case, punctuation and articles: SQuAD's (Rajpurkar et al. 2016, section 6.1)."""
    return [_f1(_words(found), _words(wanted)) for found, wanted in zip(completions, references, strict=True)]


def load_reward(name: str, key: str = "zo.objective") -> Reward:
    """`FILE.py:FUNCTION` or `MODULE:FUNCTION`. key: of the configuration, that says so. Raises UserError."""
    source, _, function = name.rpartition(":")
    if source == PYTHON:
        raise UserError(
            f"{key}: the run was started in Python, with a function of its own ({function}), which no file gives: pass it "
            f"again, as in Config.load(DIRECTORY, {{{key!r}: ...}}), or name FILE.py:FUNCTION"
        )
    try:
        if source.endswith(".py"):
            path = Path(source).expanduser()
            if not path.is_file():
                raise UserError(f"{key}: expected {name} to name a Python file, there is none at {path}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except UserError:
        raise
    except Exception as error:  # the user's code raises what it likes
        raise UserError(f"{key}: {source} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{key}: expected a function named {function} in {source}, found {found!r}")
    return found


def call_reward(
    reward: Reward, prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]
) -> list[float]:
    """Raises UserError when the function fails or returns anything but a finite number for each completion."""
    name = name_of_function(reward)
    try:
        found = reward(prompts=list(prompts), completions=list(completions), references=list(references))
        values = [float(value) for value in found]
    except Exception as error:
        raise UserError(f"the objective {name} failed: {type(error).__name__}: {error}") from error
    if len(values) != len(completions) or not all(map(math.isfinite, values)):
        raise UserError(
            f"the objective {name}: expected {len(completions)} finite numbers, one a completion, found {str(values)[:80]}"
        )
    return values


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return float(found == wanted)
    return 2 * common / (len(found) + len(wanted))
