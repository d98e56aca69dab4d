"""What a run cannot have whose objective looks at answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from finetune.options import Conflict

METHODS_OF_LORA = ("lora",)
METHODS_OF_GRADIENTS = ("lora", "full", "lisa", "badam", "slimfit", "frugal")
"""Of which only lora has a reference: the model without its adapter."""


def conflicts_of_answers(config: Any, word: str, methods: Collection[str]) -> Iterator[Conflict]:
    """word: the run's `training.objective`. methods: that train on it."""
    if config.method not in methods:
        yield Conflict(
            ("training.objective", "method"),
            f"training.objective: {word} is trained with method {', '.join(methods)} so far, found method {config.method}",
        )
    if config.dataset.packing:
        yield Conflict(
            ("training.objective", "dataset.packing"),
            f"dataset.packing: expected it off with training.objective {word}, which compares answers, found it on",
        )
