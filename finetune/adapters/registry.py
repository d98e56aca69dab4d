"""The kinds of adapters that are trained, by the name that a configuration gives them. Imports neither torch nor PEFT."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """What is known of a kind before its code is loaded."""

    code: str
    """"module:Class", a `finetune.adapters.base.Adapter`."""
    words: str
    """What it is, in sentences."""
    peft_type: str
    """PEFT's word for it, which stands in files of adapters; empty: that of any other kind."""
    perturbed_rate: float
    """Learning rate that suits forward passes alone (method zo)."""
    gradient_rate: float | None = None
    """Learning rate that suits gradients; a kind that has one is a method of its own name."""
    section: str | None = None
    """Of the configuration: its options."""
    options: str | None = None
    """"module:Class", a `finetune.options.Section`: what that section is."""
    one_text: str = ""
    """Why a row cannot hold several texts with it; empty: it can."""
    kept_initial: bool = False
    """Whether a run keeps what it begins as, which then takes a pass over the weights."""


ADAPTERS: dict[str, AdapterEntry] = {
    "lora": AdapterEntry(
        "finetune.adapters.lora:Lora", "a LoRA adapter", "LORA", 1e-4, gradient_rate=2e-4, section="lora",
        options="finetune.adapters.lora_options:LoraOptions",
    ),  # fmt: skip
    "prefix": AdapterEntry(
        "finetune.adapters.prefix:Prefix", "a prefix", "PREFIX_TUNING", 1e-3, one_text="which stands before one text",
        kept_initial=True,
    ),  # fmt: skip
    "adapter": AdapterEntry(
        "finetune.adapters.tuners:Tuner", "any other adapter of PEFT (adapter.type)", "", 1e-4, gradient_rate=1e-3,
        section="adapter", options="finetune.adapters.tuner_options:AdapterOptions",
    ),  # fmt: skip
}
