"""From files, flags and words of a command line to the values of a configuration, which are not checked yet."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from finetune.config.errors import ConfigError
from finetune.config.presets import find_preset, preset_names
from finetune.config.yaml_text import read_document, read_word
from finetune.options import Section, show

# Everyday keys that may stand at the top level, as they do on the command line.
SHORTHANDS = {
    "max_steps": "training",
    "epochs": "training",
    "batch_size": "training",
    "micro_batch_size": "training",
    "learning_rate": "training",
    "seed": "training",
    "sequence_length": "dataset",
}

RUN_FILE = "config.yaml"
"""In the directory of a run: its settings, see `finetune.config.run_file`."""


def find_source(source: str) -> Path:
    """A file; that of a run where its directory is named."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if (path / RUN_FILE).is_file():
        return path / RUN_FILE
    preset = find_preset(source)
    if preset is None and path.is_dir():
        found = "a run of an earlier version, without one" if (path / "run.json").exists() else "none in it"
        raise ConfigError([f"expected config.yaml, as runs write it, found {found}: name --model and --output"], str(path))
    if preset is None:
        near = difflib.get_close_matches(source, preset_names(), n=1)
        raise ConfigError(
            [
                f"expected a YAML file, a run's directory, or one of the presets {', '.join(preset_names())}; found none"
                + (f"; did you mean {near[0]}?" if near else "")
            ],
            origin=repr(source),
        )
    return preset


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values, duplicates = read_document(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"expected YAML, found: {' '.join(str(error).split())}"], str(path)) from None
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], str(path)) from None
    if duplicates:
        raise ConfigError(duplicates, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"expected keys and values, found {show(values)}"], str(path))
    return {str(key): value for key, value in values.items()}


def parse_setting(setting: str, takes: Callable[[str, Any], bool]) -> tuple[str, Any]:
    """Key and value of "key=value". takes: whether a dotted key takes a value. Raises ValueError."""
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"expected key=value, such as training.max_steps=50, found {setting!r}")

    full = f"{SHORTHANDS[key]}.{key}" if key in SHORTHANDS else key
    try:
        return key, read_word(text, lambda value: takes(full, value))
    except yaml.YAMLError:
        raise ValueError(
            f"{key}: expected a YAML value in which each key stands once, found {text!r}; text is quoted as in {key}='\"...\"'"
        ) from None


def assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *folders, leaf = dotted.split(".")
    for folder in folders:
        if not isinstance(tree.get(folder), dict):
            tree[folder] = {}
        tree = tree[folder]
    tree.update(merge(tree, {leaf: value}))  # a section's keys that came before stay


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def expand_shorthands(values: Mapping[str, Any]) -> dict[str, Any]:
    """Moves each shorthand into its section; one that contradicts its section stays, for `Config` to report."""
    values = dict(values)
    for key, section in SHORTHANDS.items():
        if key not in values:
            continue
        inner = values.get(section)
        if isinstance(inner, Section):
            inner = inner.model_dump(exclude_unset=True)
        if inner is None:
            inner = {}
        if isinstance(inner, Mapping) and inner.get(key, values[key]) == values[key]:
            values[section] = {**inner, key: values.pop(key)}
    return values


def without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """`values` without dotted `keys`; a section that is not a mapping goes with any of its keys."""
    left = dict(values)
    for key in keys:
        section, _, name = key.rpartition(".")
        if not section or not isinstance(left.get(section), Mapping):
            left.pop(section or name, None)
        else:
            left[section] = {inner: value for inner, value in left[section].items() if str(inner) != name}
    return {"model": "-"} | left if "model" in keys else left
