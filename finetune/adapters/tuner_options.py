"""Section `adapter`: a tuner of PEFT by PEFT's own word for it, with PEFT's own names of its options.

What there is and what its options are is asked of PEFT when the adapter is made, so a tuner that a later PEFT brings is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ConfigDict

from finetune.options import Conflict, Section

REFUSED = {
    "xlora": "it runs the whole model once more before every pass, to learn how its adapters are mixed",
    "poly": "its router asks for the number of the task of every row, which rows of data do not have",
    "multitask_prompt_tuning": "it asks for the number of the task of every row, which rows of data do not have",
    "cpt": "it replaces the model's loss by one of its own over whole logits",
    "shadow": "it hands a state of its own from block to block outside of what blocks are called with",
}
"""Tuners that can't be trained on a streamed model, and why."""

BY_GRADIENTS = ("adalora", "mixlora", "dynmole")
"""Those whose own loss goes by gradients."""

BEFORE_TEXTS = ("prompt_tuning", "p_tuning", "prefix_tuning", "cartridge")
"""Those that stand before a text."""


class AdapterOptions(Section):
    """Beside `type`, all keys are options of that tuner's configuration in PEFT."""

    model_config = ConfigDict(extra="allow")

    type: str | None = None
    """PEFT's word for the tuner: ia3, loha, lokr, vera, oft, boft, adalora, vblora, randlora, ... See `docs/methods.md`."""

    @property
    def peft_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the tuner's configuration in PEFT."""
        return dict(self.model_extra or {})

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        if config.adapter_kind == "adapter" and self.type is None:
            yield Conflict(("adapter.type", "method"), "expected adapter.type, PEFT's word for the adapter, such as vera")
        if config.adapter_kind == "adapter" and self.type in BEFORE_TEXTS and config.dataset.packing:
            yield Conflict(
                ("adapter.type", "dataset.packing"),
                f"expected dataset.packing off with adapter.type {self.type}, which stands before one text, found it on",
            )
        if config.method == "zo" and config.adapter_kind == "adapter" and self.type in BY_GRADIENTS:
            yield Conflict(
                ("adapter.type", "method"),
                f"expected another adapter.type with zo than {self.type}, whose own loss goes by gradients",
            )
