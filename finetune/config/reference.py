"""All keys of a configuration with their defaults and sentences, which are those of the source: the text below each key."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from finetune.config.config import Config
from finetune.config.sections import SECTIONS
from finetune.config.yaml_text import write_document
from finetune.methods.optimizer_options import OPTIMIZERS

_INTRODUCTION = """# Configuration

All keys, as `finetune config` prints them: this page is written by `finetune config --markdown`. A key is set in a YAML file,
where a part before a dot is a section, or on the command line with `--set KEY=VALUE`; some have a flag too. In Python they are
arguments of `Config`.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """name: dotted. values: which it takes, in words; empty: the sentence says it. default: as YAML has it; None: none."""

    name: str
    values: str
    default: str | None
    sentence: str


def all_keys() -> Iterator[Key]:
    """In the order in which a configuration is written."""
    schema = Config.model_json_schema()
    properties = schema["properties"]
    for name, field in Config.model_fields.items():
        if name not in SECTIONS:
            yield _key(name, field, properties[name], _sentences(Config)[name])
    for section, kind in SECTIONS.items():
        inside, sentences = kind.model_json_schema()["properties"], _sentences(kind)
        if section == "optimizer":
            sentences = _of_rules() | sentences
        for name, field in kind.model_fields.items():
            yield _key(f"{section}.{name}", field, inside[name], sentences[name])


def keys_text(words: Collection[str], flags: Collection[str]) -> str:
    """Of the keys whose names have one of the words; of all, where there are no words. flags: keys that have one."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = []
    for key in all_keys():
        if words and not any(word in key.name for word in words):
            continue
        about = ", ".join(filter(None, [key.values, _flag(key, flags)]))
        lines.append(f"{key.name}{'' if key.default is None else f': {key.default}'}{f'  ({about})' if about else ''}")
        lines += textwrap.wrap(key.sentence, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) or f"no key has {' or '.join(words)} in its name"


def keys_page(flags: Collection[str]) -> str:
    """The same as Markdown, all keys."""
    lines, section = [_INTRODUCTION], None
    for key in all_keys():
        before, _, _ = key.name.rpartition(".")
        if before != section:
            section = before
            about = inspect.getdoc(SECTIONS[section]) if section else "Keys that stand at the top."
            title = f"`{section}`" if section else "The run"
            lines.append(f"\n## {title}\n\n{about}\n\n| key | default | values | |\n|---|---|---|---|")
        default = "" if key.default is None else f"`{key.default}`"
        name = f"`{key.name}`" + (f", `{flag}`" if (flag := _flag(key, flags)) else "")
        lines.append(f"| {name} | {default} | {key.values} | {key.sentence} |")
    return "\n".join(lines)


def _flag(key: Key, flags: Collection[str]) -> str:
    section, _, name = key.name.rpartition(".")
    return f"--{name.replace('_', '-')}" if name in flags and section in ("", "training", "dataset") else ""


def _key(name: str, field: FieldInfo, schema: Mapping[str, Any], sentence: str) -> Key:
    default = None if field.is_required() else write_document(field.default).removesuffix("...\n").strip()
    return Key(name, _values(schema), default, sentence)


def _values(schema: Mapping[str, Any]) -> str:
    """Which values a JSON schema takes, in words; empty where it does not say."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(filter(None, map(_values, schema["anyOf"]))))
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type", "")
    word = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
    if kind == "array":
        return f"list of {_values(schema.get('items', {})) or 'values'}"
    if kind == "object":
        return "keys and values"
    bounds = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
    limits = [words.format(f"{schema[name]:g}") for name, words in bounds.items() if name in schema]
    return " ".join([word.get(kind, ""), *limits]).strip()


def _of_rules() -> dict[str, str]:
    """Of the numbers of optimizers, which stand where their rules are: who reads a number, and what it is."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, rule in OPTIMIZERS.items():
        for key, sentence in _sentences(rule).items():
            found.setdefault(key, {}).setdefault(sentence, []).append(name)
    return {key: " ".join(f"{', '.join(names)}: {text}" for text, names in texts.items()) for key, texts in found.items()}


def _sentences(kind: type) -> dict[str, str]:
    """By key: the text that stands below it in the source of the class, or of those that it is made from."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body
        except (OSError, TypeError):  # made from others, without a text of its own; built in
            continue
        for key, text in zip(body, body[1:], strict=False):
            if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[key.target.id] = " ".join(str(text.value.value).split())
    return found
