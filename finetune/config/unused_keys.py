"""Which keys a method and its optimizer read. One that they do not read changes nothing, whatever it is set to: it is refused.

But for those of adapters: one configuration with an adapter's settings is often tried with other methods. They are named when
the run begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.config.sections import ADAPTER_SECTIONS
from finetune.methods.optimizer_options import unread_keys
from finetune.methods.registry import METHOD_SECTIONS, METHODS
from finetune.options import Conflict

_OF_GRADIENTS = ("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
_OWN_WORDS = ("selection.subspace",)  # keys whose section says itself which method they are for


def unused_keys(config: Any) -> Iterator[Conflict]:
    """For every key that was set to something else than its default and that the method or its optimizer does not read: the key
    and those that decide that it is not read."""
    method = METHODS[config.method]
    for section in METHOD_SECTIONS:
        if section in method.reads:
            continue
        readers = [name for name, other in METHODS.items() if section in other.reads]
        words = f"{'methods' if len(readers) > 1 else 'method'} {', '.join(readers)}"
        for key in _changed(config, section):
            if key not in _OWN_WORDS:
                yield Conflict((key, "method"), f"expected only with {words}, found with method {config.method}")
    if not method.has_gradients:
        for key in _OF_GRADIENTS:
            # Without clipping it clips nothing, as is said.
            if f"training.{key}" in _changed(config, "training") and getattr(config.training, key):
                problem = f"expected only with methods that have gradients, found with method {config.method}"
                yield Conflict((f"training.{key}", "method"), problem)
    # A run that was begun when these were not refused goes on.
    if "optimizer" in method.reads and not config.resume:
        changed = _changed(config, "optimizer") + _changed(config, "training")
        for key, readers in unread_keys(config):
            if key in changed:
                problem = f"expected only with {readers}, found with {config.optimizer.name}"
                yield Conflict((key, "method", "optimizer.name", "selection.subspace"), problem)


def unused_adapter_note(config: Any) -> str | None:
    """What a run says of an adapter's keys that are set and that it does not read."""
    read = METHODS[config.method].recorded(config)
    keys = [key for section in ADAPTER_SECTIONS if section not in read for key in _changed(config, section)]
    if not keys:
        return None
    return f"no adapter of that kind is trained with method {config.method}, so these keys change nothing: {', '.join(keys)}"


def _changed(config: Any, section: str) -> list[str]:
    """Dotted keys that were set to something else than their default."""
    options = getattr(config, section)
    fields = type(options).model_fields
    changed = (
        key for key in fields if key in options.model_fields_set and getattr(options, key) != fields[key].default
    )
    return [f"{section}.{key}" for key in changed]
