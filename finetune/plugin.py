"""What a registry names, loaded on first use: a registry itself needs neither torch nor Transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(place: str) -> Any:
    """place: "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
