"""The optimizers of trained weights, a file each. Nothing here needs torch before a rule is used, so that a configuration can
list them and their options.
"""

from __future__ import annotations

from importlib import import_module

from finetune.offload.update.rules.rule import Rule


def _load(place: str) -> type[Rule]:
    """place: "module:Class" in this package."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"{__name__}.{module}"), name)


OPTIMIZERS: dict[str, type[Rule]] = {
    "adamw": _load("adamw:AdamW"),
    "adafactor": _load("adafactor:Adafactor"),
    "apollo": _load("apollo:Apollo"),
    "lamb": _load("lamb:Lamb"),
    "lion": _load("lion:Lion"),
    "sgd": _load("sgd:Sgd"),
}
"""By the name that a configuration gives them."""

SUBSPACES: dict[str, type[Rule]] = {
    "columns": _load("frugal:Columns"),
    "projection": _load("frugal:Projection"),
}
"""What has AdamW's state where FRUGAL splits every matrix, by the name that a configuration gives it."""
