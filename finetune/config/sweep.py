"""The words of `finetune sweep`, and the key `sweep` of a file, as the configurations of its runs.

Every combination of the values that keys are given is a run: `lora.r=8,16 training.seed=1,2` are four. Several files are as
many bases for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from finetune.config.config import KEYS, Config, parse_word
from finetune.config.errors import ConfigError, nearest_key
from finetune.config.loading import SHORTHANDS, find_source, read_yaml
from finetune.config.sections import SECTIONS
from finetune.methods.registry import METHODS
from finetune.objectives.registry import find_objective
from finetune.options import show

MOST_NAME = 100  # characters of a run's name, which is a directory's
_SHARED = (
    "model", "quantize", "quantization", "output", "host_memory", "device_memory", "disk", "device", "machine", "resume",
    "trace", "trust_remote_code", "engine",
)  # fmt: skip
"""Keys that all runs of a sweep have alike, because they are one process over one base."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A key that is swept. values: with each, how a run's name says it."""

    key: str
    values: Sequence[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class RunOfSweep:
    config: Config  # whose output is that of the sweep
    own: Mapping[str, Any]  # what it has of its own, by dotted keys


def read_sweep(
    words: Sequence[str], overrides: Mapping[str, Any] | None = None, settings: Sequence[str] = ()
) -> dict[str, RunOfSweep]:
    """The runs by name. words: files or presets, and "key=value,value". overrides, settings: as in `Config.load`, for all.

    Raises ConfigError.
    """
    sources = [word for word in words if "=" not in word or Path(word).is_file()]
    axes = [_axis_of_word(word) for word in words if word not in sources]
    fixed = {_full(key) for key, value in (overrides or {}).items() if value is not None}
    fixed |= {_full(setting.partition("=")[0].strip()) for setting in settings}
    runs: dict[str, RunOfSweep] = {}
    for source in sources or [None]:
        values = {} if source is None else read_yaml(find_source(source))
        all_axes = [*_axes_of_file(values.pop("sweep", {}), source), *axes]
        _check_axes(all_axes, fixed)
        for chosen in product(*(axis.values for axis in all_axes)):
            own = {axis.key: value for axis, (_, value) in zip(all_axes, chosen, strict=True)}
            parts = [Path(source).stem] if len(sources) > 1 else []
            parts += [
                f"{_short(axis.key, all_axes)}={word}" for axis, (word, _) in zip(all_axes, chosen, strict=True)
            ]
            origin = source or "the configuration"
            config = Config.of_values(values, origin, {**(overrides or {}), **own}, settings)
            _add(runs, ",".join(parts), RunOfSweep(config, own))
    check_together({name: run.config for name, run in runs.items()})
    return runs


def check_together(configs: Mapping[str, Config]) -> None:
    """Raises ConfigError unless these configurations, by name, can be the runs of one sweep."""
    if not configs:
        raise ConfigError(["expected a run or more, found none: name files, or keys with values such as lora.r=8,16"], "sweep")
    first, *others = configs.items()
    problems = []
    for name, config in configs.items():
        if config.method != "lora":
            problems.append(
                f"{name}: expected method lora, found {config.method} ({METHODS[config.method].goal}), which does not share a "
                "read of the model with other runs: start it by itself"
            )
        elif find_objective(config.objective).steps_alone:
            problems.append(
                f"{name}: expected an objective of one pass over the model as it is, found {config.objective}, whose steps are "
                "not those of other runs: start it by itself"
            )
        if config.max_writes is not None:
            problems.append(f"{name}: expected no max_writes, which counts what one run writes, found {config.max_writes}")
        if config.training.neftune_noise_alpha is not None:
            problems.append(
                f"{name}: training.neftune_noise_alpha: expected none in a sweep, whose runs share the embeddings: start it by "
                "itself"
            )
        if config.engine.sequence_chunk == "auto":
            problems.append(f"{name}: engine.sequence_chunk: expected a number in a sweep, found auto: finetune plan finds one")
    for name, config in others:
        problems += [
            f"{key}: expected the same in all runs, found {show(getattr(first[1], key))} in {first[0]} and "
            f"{show(getattr(config, key))} in {name}"
            for key in _SHARED
            if getattr(config, key) != getattr(first[1], key)
        ]
    if problems:
        raise ConfigError(problems, "sweep")


def _axis_of_word(word: str) -> Axis:
    key, _, text = word.partition("=")
    key, parts = key.strip(), list(_split(text))
    try:
        return Axis(_full(key), [(_name_of(part), parse_word(key, part)) for part in parts])
    except ValueError as error:
        raise ConfigError([str(error)], "sweep") from None


def _axes_of_file(found: Any, source: str | None) -> list[Axis]:
    if not isinstance(found, Mapping) or not all(isinstance(values, list) and values for values in found.values()):
        problem = f"sweep: expected keys with lists of values, such as lora.r: [8, 16], found {show(found)}"
        raise ConfigError([problem], str(source))
    return [Axis(_full(str(key)), [(_name_of(value), value) for value in values]) for key, values in found.items()]


def _check_axes(axes: Sequence[Axis], fixed: set[str]) -> None:
    keys = [axis.key for axis in axes]
    problems = [f"{key}: is swept twice: give its values once" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    problems += [f"{key}: is swept, and set for all runs too: give one of them" for key in keys if key in fixed]
    unknown = [key for key in keys if key not in KEYS]
    problems += [f"{key}: unknown key{nearest_key(key.split('.'), SECTIONS, KEYS)}" for key in unknown]
    problems += [
        f"{key}: expected the same in all runs, found it among what is swept" for key in keys if key.split(".")[0] in _SHARED
    ]
    if problems:
        raise ConfigError(problems, "sweep")


def _add(runs: dict[str, RunOfSweep], name: str, run: RunOfSweep) -> None:
    name = name or "run"
    if len(name) > MOST_NAME:
        name = f"{len(runs) + 1:03}-{name[: MOST_NAME - 4]}"
    if name in runs:
        raise ConfigError([f"two runs are called {name}: name each file and each value once"], "sweep")
    runs[name] = run


def _full(key: str) -> str:
    return f"{SHORTHANDS[key]}.{key}" if key in SHORTHANDS else key


def _short(key: str, axes: Sequence[Axis]) -> str:
    """The last part of the key, where no other one ends so."""
    last = key.rpartition(".")[2]
    return last if sum(axis.key.rpartition(".")[2] == last for axis in axes) == 1 else key


def _split(text: str) -> Iterator[str]:
    """At commas outside of brackets and quotes."""
    depth, quote, start = 0, "", 0
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def _name_of(value: Any) -> str:
    """For a directory's name: of a path its last part."""
    if isinstance(value, (list, tuple)):
        return "+".join(map(_name_of, value))
    text = str(value).strip()
    if os.sep in text:
        text = Path(text).name
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "none"
