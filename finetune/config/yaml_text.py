"""Text of configurations as values: YAML, in which a key stands once and numbers are what they look like.

Plain YAML 1.1 takes 1e-4 for a string, 010 for eight, 1:30 for ninety and 2024-01-01 for a date. Here the first is a number and
the others are text, which a key that wants a number refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

import yaml

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)")
_OTHERWISE = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"}


class Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the scalars that the module describes."""


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would not read as a string."""


for _kind in (Loader, Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERWISE]
        for first, resolvers in _kind.yaml_implicit_resolvers.items()
    }
    for _tag, _pattern in (("int", _INTEGER), ("float", _FLOAT)):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789")
        )


Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def read_document(text: str) -> tuple[Any, list[str]]:
    """The value, and a line for each key that stands twice, wherever it is nested. Raises yaml.YAMLError."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        return loader.construct_document(node), list(_duplicates(node, "", set()))
    finally:
        loader.dispose()


def write_document(value: Any) -> str:
    """Text that `read_document` reads as an equal value."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def read_word(text: str, accepts: Callable[[Any], bool]) -> Any:
    """The value of one word of a command line, for a key that `accepts` some values.

    What begins with a bracket, a brace or a quote is YAML. All else is one scalar as it stands (no comments, no mappings):
    a number, a truth value or null where it looks like one and the key takes it, else the text.
    Raises yaml.YAMLError, also for a key that stands twice.
    """
    text = text.strip()
    if text[:1] in tuple("[{'\""):
        value, duplicates = read_document(text)
        if duplicates:
            raise yaml.YAMLError(duplicates[0])
        return value
    loader = Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        value = loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()
    return text if value is not None and not accepts(value) and accepts(text) else value


def _duplicates(node: yaml.Node, prefix: str, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, f"{prefix}{index}.", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                yield f"{prefix}{name}: stands twice, in lines {lines[name]} and {line}: keep one of them"
            lines.setdefault(name, line)
            yield from _duplicates(value, f"{prefix}{name}.", seen)
