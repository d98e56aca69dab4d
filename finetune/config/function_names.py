"""What functions are called that a configuration got in Python: readable, and the same in every process."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

PYTHON = "<python>"
"""Stands in place of a module where a function has no name that it can be imported by."""


def name_of_function(function: Callable[..., Any]) -> str:
    """For messages and logs: its own name; of a `functools.partial` that of its function, of an object that of its class."""
    name = getattr(function, "__name__", None)
    if name is None and isinstance(function, partial):
        return name_of_function(function.func)
    return str(type(function).__name__ if name is None else name)


def distinct_names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    """`name_of_function` of each; where one was there before, with a number: score, score_2, score_3."""
    found: list[str] = []
    for function in functions:
        name = numbered = name_of_function(function)
        number = 1
        while numbered in found:
            number += 1
            numbered = f"{name}_{number}"
        found.append(numbered)
    return found


def describe_function(function: Callable[..., Any]) -> str:
    """For what a run says of itself: its qualified name; of a `functools.partial` what it gives its function, too."""
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    if name is None and isinstance(function, partial):
        named = [f"{key}={_described(value)}" for key, value in sorted(function.keywords.items())]
        return f"{describe_function(function.func)}({', '.join([*map(_described, function.args), *named])})"
    return str(type(function).__qualname__ if name is None else name)


def word_for_function(function: Callable[..., Any]) -> str:
    """MODULE:FUNCTION, as a configuration names functions. MODULE is `PYTHON` where none leads to this very function."""
    name, module = getattr(function, "__name__", ""), getattr(function, "__module__", None)
    if str(name).isidentifier() and str(name).isascii() and module not in (None, "__main__"):
        if getattr(sys.modules.get(module), name, None) is function:
            return f"{module}:{name}"
    letters = re.sub(r"\W+", "", name_of_function(function), flags=re.ASCII).lstrip("0123456789")
    return f"{PYTHON}:{letters or 'function'}"


def _described(value: Any) -> str:
    """Of values that are more than numbers, text and functions, only their kind: what else they show may be an address."""
    if callable(value):
        return describe_function(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_described(key)}: {_described(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__qualname__
