"""Which keys a method reads. One that it does not read changes nothing, whatever it is set to: it is refused.

But for `lora`: one configuration with an adapter's settings is often tried with other methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WEIGHT_METHODS = ("full", "lisa", "badam", "slimfit", "frugal")
_READ_BY = {
    "zo": "method zo",
    "optimizer": f"methods {', '.join(WEIGHT_METHODS)}",
    "selection": f"methods {', '.join(WEIGHT_METHODS[1:])}",
}
_OF_GRADIENTS = ("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")


def unused_keys(config: Any) -> Iterator[tuple[str, str]]:
    """(key, problem) for every key that was set to something else than its default and that the method does not read."""
    reads = {
        "zo": config.method == "zo",
        "optimizer": config.method in WEIGHT_METHODS,
        "selection": config.method in WEIGHT_METHODS[1:],
    }
    for section, readers in _READ_BY.items():
        if not reads[section]:
            for key in _changed(getattr(config, section)):
                if (section, key) != ("selection", "subspace"):  # which has words of its own
                    yield f"{section}.{key}", f"expected only with {readers}, found with method {config.method}"
    if config.method == "zo":
        for key in _changed(config.training):
            if key in _OF_GRADIENTS and getattr(config.training, key):  # without clipping it clips nothing, as is said
                yield f"training.{key}", "expected only with methods that have gradients, found with method zo"


def _changed(section: Any) -> list[str]:
    fields = type(section).model_fields
    return [key for key in fields if key in section.model_fields_set and getattr(section, key) != fields[key].default]
