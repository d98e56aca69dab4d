"""Section `lora`, and which of PEFT's LoRA options a streamed model can have: a gate before every adapter, fresh or loaded.

While a model is streamed, its weights are placeholders when PEFT makes the adapter, a block's forward runs again in the
backward pass, and the micro-batches of a step go through a block one after the other before the next block. Options that look
at weights, keep numbers between forward passes, or reach from one layer into another would then silently give other
numbers than plain PEFT.

So nothing is let through that is not listed here. An option with another value than its default must stand in `EQUAL`
(any value gives plain PEFT's bits, held for each of them by `tests/parity/test_lora_options.py`), or have one of the values in
`EQUAL_VALUES`; those of a sub-configuration are listed one by one (`use_bdlora.nblocks`). Everything else is refused by name,
with the reason from `REFUSED`, and an option that a later PEFT brings is refused until someone adds it here with its parity
test, which fails for options that stand in no list.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Strict, field_validator

from finetune.memory.errors import UserError
from finetune.options import Conflict, Count, NonNegative, Positive, Section, Share, Switch


def _peft_name(key: str) -> str:
    """What `peft.LoraConfig` calls a key of the section."""
    return {"alpha": "lora_alpha", "dropout": "lora_dropout"}.get(key, key)


_OF_THE_OPTIMIZER = ("loraplus_lr_ratio", "loraplus_lr_embedding")


class LoraOptions(Section):
    """`peft.LoraConfig` under shorter names; what is not named here goes into `extra` as it is."""

    r: Count = 16
    """Rank of the adapter's matrices."""
    alpha: Count = 32
    """The adapter's product is scaled by alpha / r (alpha / sqrt(r) with rsLoRA)."""
    dropout: Share = 0.0
    """Of the adapter's input."""
    target_modules: str | list[str] | None = None
    """"all-linear", a regular expression of module names, or a list of their endings; of an empty one none. None: all-linear
    without routed experts, which are most of a model that has them."""
    target_parameters: list[str] = []
    """Endings of names of parameters that are no linear layer's: [experts.gate_up_proj, experts.down_proj] are stacked
    experts."""
    use_rslora: Switch = False
    """Kalajdzievski 2023."""
    use_dora: Switch = False
    """Liu et al. 2024."""
    init_lora_weights: Annotated[bool, Strict()] | str = True
    """How PEFT makes the first values: true, false, gaussian, orthogonal, mica, pissa, pissa_niter_N or olora."""
    loraplus_lr_ratio: Positive | None = None
    """LoRA+ (Hayou et al. 2024): how many times the learning rate of others that of the B matrices is."""
    loraplus_lr_embedding: NonNegative = 1e-6
    """With LoRA+, the learning rate of an embedding's adapter."""
    extra: dict[str, Any] = {}
    """Other arguments of `peft.LoraConfig`, by PEFT's names."""

    @field_validator("extra")
    @classmethod
    def _check_extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        named = {name: key for key in cls.model_fields for name in (key, _peft_name(key))}
        for key in extra:
            if key in named:
                raise ValueError(
                    f"expected only arguments that have no key of their own, found {key!r}: use lora.{named[key]}"
                )
        return extra

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        if config.method == "zo" and config.adapter_kind == "lora" and self.loraplus_lr_ratio is not None:
            yield Conflict(
                ("lora.loraplus_lr_ratio", "method"),
                f"expected only with method lora, found {self.loraplus_lr_ratio:g} with zo, which has one learning rate",
            )

    def peft_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `peft.LoraConfig`."""
        own = {_peft_name(key): value for key, value in self if key != "extra" and key not in _OF_THE_OPTIMIZER}
        modules = "all-linear" if self.target_modules is None else self.target_modules
        return own | {"target_modules": modules, "target_parameters": self.target_parameters or None} | self.extra


EQUAL = frozenset({
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "target_parameters",
    "ensure_weight_tying", "trainable_token_indices", "modules_to_save",
    "use_bdlora.target_modules_bd_a", "use_bdlora.target_modules_bd_b", "use_bdlora.nblocks", "use_bdlora.match_strict",
    "velora_config.num_groups", "velora_config.scale",
})  # fmt: skip

EQUAL_VALUES: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "mica"),
    "velora_config.init_type": ("batch_average", "random"),
}

NOT_OF_PARAMETERS = frozenset({
    "lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora", "use_bdlora", "velora_config", "init_lora_weights=orthogonal",
    "init_lora_weights=mica",
})  # fmt: skip
"""Options that PEFT has for modules only, not for adapters of parameters such as stacked experts."""

DESCRIPTIVE = frozenset({"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"})
"""What PEFT notes about an adapter; nothing is computed from it."""

_NEEDS_WEIGHTS = "it computes from the base weights, which are not in memory when adapters are made"

REFUSED = {
    "task_type": "the model determines it",
    "inference_mode": "an adapter in inference mode is not trained",
    "bias": "the biases of the model itself are streamed and not trained",
    "init_lora_weights": "it computes from data or from weights before they were quantised, or was made for a base that PEFT "
    "has changed. True, false, gaussian, orthogonal, mica, pissa, pissa_niter_N and olora are offered for training",
    "megatron_config": "models of Megatron are not streamed",
    "megatron_core": "models of Megatron are not streamed",
    "loftq_config": "it computes from the base weights as they were before they were quantised",
    "eva_config": _NEEDS_WEIGHTS,
    "corda_config": _NEEDS_WEIGHTS,
    "lora_ga_config": _NEEDS_WEIGHTS,
    "kasa_config": "it changes the base weights by a decomposition of them, and they are not in memory when adapters are made",
    "velora_config.init_type": "what batch_average_once keeps of the first step would be lost when the run is resumed: use "
    "batch_average or random",
    "alora_invocation_tokens": "it tells all layers once per forward pass where the adapter begins, but blocks run one "
    "by one here, and again in the backward pass",
    "use_qalora": "it is for GPTQ's own layers, and PEFT does nothing with it on the linear layers of a streamed model",
    "qalora_group_size": "it is for GPTQ's own layers, and PEFT does nothing with it on the linear layers of a streamed model",
    "monteclora_config": "its samples come from a buffer that moves with every forward, and a block's forward runs again in "
    "the backward pass",
    "layer_replication": "the blocks are those of the checkpoint",
    "runtime_config": "the streamed model decides where tensors live",
    "arrow_config": "it routes among several adapters, and there is one here",
}
_UNKNOWN = "it is not known to give plain PEFT's numbers while the model is streamed"

# What was made from these is in the adapter's file, and the base's weights are not touched when it is loaded.
_FREE_WHEN_LOADED = {"task_type", "inference_mode", "bias", "eva_config", "lora_ga_config"}
_EQUAL_WHEN_LOADED = {"eva", "lora_ga"}
_OWN_KEYS = {_peft_name(key): f"lora.{key}" for key in LoraOptions.model_fields if key != "extra"}


def key_of(option: str) -> str:
    """What a user types for an option of `peft.LoraConfig`."""
    return _OWN_KEYS.get(option, f"lora.extra.{option}")


def check_fresh(config: Any, task_type: str | None) -> None:
    """Raises UserError, naming the key as the user types it, for a `peft.LoraConfig` that a streamed model cannot have.

    task_type: PEFT's word for what the model does.
    """
    for option, value in _changed(config):
        if option != "task_type" or value != task_type:
            check_option(option, value)


def changes_base(init: Any) -> bool:
    """Whether this value of init_lora_weights changes the base's weights in a way that is done here, see
    `finetune/adapters/residual.py`."""
    return isinstance(init, str) and re.fullmatch(r"pissa|pissa_niter_\d+|olora", init) is not None


def check_option(option: str, value: Any) -> None:
    """The same for one option that has another value than its default."""
    if not _is_equal(option, value) and not (option == "init_lora_weights" and changes_base(value)):
        raise UserError(f"{key_of(option)}={value!r} cannot be used while the model is streamed: {_reason(option)}")


def check_beside_parameters(config: Any) -> None:
    """The same for what a configuration cannot have if it targets parameters."""
    for option, value in _changed(config) if config.target_parameters else ():
        name = option.partition(".")[0]
        if name in NOT_OF_PARAMETERS or f"{name}={value}" in NOT_OF_PARAMETERS:
            raise UserError(
                f"{key_of(name)}={getattr(config, name)!r}: PEFT has this for linear layers, and not for adapters of stacked "
                f"parameters ({', '.join(sorted(config.target_parameters))}): leave it out, or name linear layers alone in "
                "lora.target_modules"
            )


def check_loaded(config: Any, place: Any) -> None:
    """The same for the configuration of an adapter that was saved, maybe by another program, in `place`."""
    for option, value in _changed(config):
        known = option in _FREE_WHEN_LOADED or _is_equal(option, value)
        if known or option == "init_lora_weights" and value in _EQUAL_WHEN_LOADED:
            continue
        raise UserError(
            f"the adapter in {place} has {option}={value!r}, which cannot be used while the model is streamed: "
            f"{_reason(option)}. Merge it into the model with PEFT and give the result as the model"
        )


def _changed(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(name, value) of every option that has another value than its default; sub-configurations are taken apart."""
    changed: list[tuple[str, Any]] = []
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if name in DESCRIPTIVE or value == default:
            continue
        listed = name in EQUAL or name in EQUAL_VALUES or name in REFUSED
        if dataclasses.is_dataclass(value) and not listed:
            changed += _changed(value, f"{name}.") if _has_listed_parts(name) else [(name, value)]
        else:
            changed.append((name, value))
    return changed


def _has_listed_parts(name: str) -> bool:
    return any(option.startswith(f"{name}.") for option in (*EQUAL, *EQUAL_VALUES))


def _is_equal(option: str, value: Any) -> bool:
    return option in EQUAL or value in EQUAL_VALUES.get(option, ())


def _reason(option: str) -> str:
    return REFUSED.get(option, _UNKNOWN)
