"""The methods, by name: what a configuration must know of each, and where its code is. Imports neither torch nor Transformers.

A kind of adapter that is trained by gradients is a method of its own name, see `finetune.adapters.registry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.adapters.registry import ADAPTERS
from finetune.plugin import load

METHOD_SECTIONS = {
    "zo": "finetune.methods.zeroth_order_options:ZerothOrderOptions",
    "optimizer": "finetune.methods.optimizer_options:OptimizerOptions",
    "selection": "finetune.methods.selection_options:SelectionOptions",
}
"""Sections that some methods read, besides those of adapters: "module:Class", a `finetune.options.Section`."""


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """What is known of a method before its code is loaded."""

    goal: str
    """In a few words, for help texts."""
    code: str
    """"module:Class", a `finetune.methods.base.Method`."""
    reads: tuple[str, ...]
    """Sections and top-level keys that not all methods read."""
    files: Callable[[Any], tuple[str, ...]]
    """From a configuration: names in the run's directory that are the method's; the first says which run it is."""
    learning_rate: Callable[[Any], float]
    """From a configuration: what suits the method where none is set."""
    adapter: Callable[[Any], str | None] = lambda config: None
    """From a configuration: the kind of adapter that is trained; None: the model's own weights."""
    has_gradients: bool = True
    """Whether it computes gradients, and so reads AdamW's numbers and `max_grad_norm`."""
    strategy: str = ""
    """"module:Class", the `finetune.methods.selection.Selection` that chooses the blocks of a step; empty: none are chosen."""

    def recorded(self, config: Any) -> tuple[str, ...]:
        """Of the sections and keys that not all methods read, those that make a run what it is."""
        kind = self.adapter(config)
        section = None if kind is None else ADAPTERS[kind].section
        chosen = ("selection",) if self.strategy else ()  # with full too, whose files say so
        return tuple(dict.fromkeys((*self.reads, *chosen, *([section] if section else ()))))

    def load(self) -> type:
        """The method's class."""
        return load(self.code)


def _adapter_training(kind: str) -> MethodEntry:
    entry = ADAPTERS[kind]
    return MethodEntry(
        f"gradients for {entry.words}",
        "finetune.methods.adapter_training:AdapterTraining",
        reads=(entry.section,) if entry.section else (),
        files=lambda config: ("state", "adapter", "initial-adapter"),
        learning_rate=lambda config: entry.gradient_rate,
        adapter=lambda config: kind,
    )


def _weight_training(goal: str, strategy: str, *, selects: bool = True) -> MethodEntry:
    """strategy: of the blocks; selects: whether its options are read."""
    return MethodEntry(
        goal,
        "finetune.methods.weight_training:WeightTraining",
        reads=("train", "optimizer", *(["selection"] if selects else [])),
        files=lambda config: ("store",),
        learning_rate=lambda config: 2e-5,
        strategy=strategy,
    )


def _perturbed_kind(config: Any) -> str | None:
    return config.zo.parameters if config.zo.parameters in ADAPTERS else None


def _perturbed_files(config: Any) -> tuple[str, ...]:
    kind = _perturbed_kind(config)
    if kind is None:
        return ("journal.zo", "weights")
    return ("journal.zo", "adapter", *(["initial-adapter"] if ADAPTERS[kind].kept_initial else []))


def _perturbed_rate(config: Any) -> float:
    kind = _perturbed_kind(config)
    of_weights = {"all": 1e-6, "scales": 1e-7}
    return of_weights[config.zo.parameters] if kind is None else ADAPTERS[kind].perturbed_rate


METHODS: dict[str, MethodEntry] = {
    **{kind: _adapter_training(kind) for kind, entry in ADAPTERS.items() if entry.gradient_rate is not None},
    "zo": MethodEntry(
        "forward passes only",
        "finetune.methods.zeroth_order:ZerothOrder",
        reads=("zo",),
        files=_perturbed_files,
        learning_rate=_perturbed_rate,
        adapter=_perturbed_kind,
        has_gradients=False,
    ),
    "full": _weight_training("all weights", "finetune.methods.selection:Selection", selects=False),
    "lisa": _weight_training("a few blocks at random", "finetune.methods.selection.lisa:Lisa"),
    "badam": _weight_training("one block after the other", "finetune.methods.selection.badam:Badam"),
    "slimfit": _weight_training("the blocks that change most", "finetune.methods.selection.slimfit:Slimfit"),
    "frugal": _weight_training("some blocks with state, the others by signs", "finetune.methods.selection.frugal:Frugal"),
}


def not_shared() -> set[str]:
    """Sections and top-level keys of the configuration that not all methods read."""
    return {key for method in METHODS.values() for key in method.reads} | {
        entry.section for entry in ADAPTERS.values() if entry.section
    }
