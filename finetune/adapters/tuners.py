"""Every tuner of PEFT that puts layers of its own around layers of the model: `adapter.type`, with PEFT's options.

[Note: tuners] Nothing here is about one tuner. PEFT makes the adapter, its layers compute, PEFT saves, loads and merges it.
What streaming asks for:

- Where PEFT computes from the base's weights when it makes an adapter, it gets them (`finetune.offload.weights.on_demand`), in
its own
  order, so its random numbers are those of plain PEFT.
- Layers of tuners may multiply the weight themselves. Then the weights of layers that have an adapter are bound as numbers, and
  not decoded by the layer's own forward.
- What a tuner shares between layers lives once, outside of blocks ([Note: shared parameters] in
  `offload/step/shared_gradients.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from torch import nn

from finetune.adapters.base import Adapter
from finetune.adapters.peft_files import base_of, task_type
from finetune.adapters.tuner_options import REFUSED
from finetune.config import Config
from finetune.config.errors import ConfigError
from finetune.memory.errors import UserError
from finetune.memory.meter import host_bytes
from finetune.memory.units import format_bytes, parse_bytes, total_host_bytes
from finetune.offload.sizing.dry_run import on_meta
from finetune.offload.weights.binding import LinearInSlot
from finetune.offload.weights.on_demand import OnDemand, weights_on_demand
from finetune.offload.weights.parts import ModelParts
from finetune.options import show

_OF_THE_RUN = {
    "task_type": "the model determines it",
    "inference_mode": "an adapter in inference mode is not trained",
    "peft_type": "adapter.type says it",
    **dict.fromkeys(("auto_mapping", "base_model_name_or_path", "revision", "peft_version"), "PEFT notes it itself"),
}
_NOT_STREAMED = {
    "bias": ("none", "the biases of the model itself are streamed and not trained"),
    "target_parameters": (None, "only lora has adapters of parameters here: use method lora"),
    "use_asa": (False, "it changes after a step which parameters are trained"),
}
"""Options of which only one value can be had."""
_OWN_FORWARD = ("adalora",)
"""Tuners whose model has a forward of its own that is honoured here."""
_ALLOCATE = ("adalora", "adamss")
"""Tuners that change themselves after a step, as they are told here or are told not to."""
_COPIES = 4
"""Matrices in fp32 that are taken to be there at once where an adapter is made of the base's weights: decompositions."""


class Tuner(Adapter):
    @classmethod
    def attach(cls, parts: ModelParts, config: Config, only_shapes: bool = False) -> tuple[nn.Module, str | None]:
        from peft import get_peft_model

        word, model = config.adapter.type, parts.model
        peft_config = make_config(word, config.adapter.peft_arguments, task_type(model))
        own = set(model.modules())
        torch.manual_seed(config.training.seed)
        try:
            with warnings.catch_warnings(), weights_on_demand(parts, partial(check_memory, config)):
                warnings.simplefilter("ignore")
                adapted = get_peft_model(model, peft_config)
        except UserError:
            raise
        except Exception as error:  # whatever its layers raise for options that do not go together
            raise UserError(f"PEFT refuses the options of adapter {word}: {error or type(error).__name__}") from error
        check_tuner(adapted, word)
        for module in adapted.modules():
            if module not in own and isinstance(module.__dict__.get("forward"), LinearInSlot):
                del module.forward  # a copy of a layer: it would look for its weight in a slot
        return adapted, None

    def take_over(self) -> None:
        """Nothing. Raises UserError for an adapter of the head, whose loss is made in tiles of tokens."""
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        head = self.model.get_output_embeddings()
        if isinstance(head, BaseTunerLayer) and not isinstance(head, TrainableTokensLayer):
            word = self.model.active_peft_config.peft_type.lower()
            raise UserError(f"adapter.target_modules: {word} can't have the model's head, which is streamed in tiles; lora can")

    @property
    def needs_whole_texts(self) -> bool:
        return True  # some take a mean over tokens, and nothing is known of those that come

    @property
    def reads_weights(self) -> frozenset[nn.Module]:
        """Every kind of layer is tried on meta, with a weight that notes who asks for its numbers."""
        found: set[nn.Module] = set()
        reads: dict[type, bool] = {}
        for layer in self.model.modules():
            base = base_of(layer)
            if base is None:
                continue
            if type(layer) not in reads:
                reads[type(layer)] = _reads_weight(layer, base)
            if reads[type(layer)]:
                found.add(base)
        return frozenset(found)

    @classmethod
    def check_loaded(cls, peft_config: Any, directory: Path) -> None:
        for option, (value, reason) in _NOT_STREAMED.items():
            if (getattr(peft_config, option, value) or value) != value:
                raise UserError(f"the adapter in {directory} has {option}={getattr(peft_config, option)!r}: {reason}")


def make_config(word: str, arguments: dict[str, Any], task: str | None) -> Any:
    """The configuration of PEFT's tuner `word`. Raises UserError for one that is not there or can't be streamed, ConfigError
    for options that it does not have."""
    kind = config_class(word)
    problems = list(_problems(word, kind, arguments))
    if problems:
        raise ConfigError(problems)
    try:
        return kind(**{"task_type": task, **arguments})
    except Exception as error:  # whatever PEFT's checks raise
        raise UserError(f"PEFT refuses the options of adapter {word}: {error or type(error).__name__}") from error


def config_class(word: str) -> type:
    """PEFT's configuration of the tuner `word`. Raises UserError for one that PEFT does not have or that can't be streamed."""
    known = {kind.value.lower(): config for kind, config in known_types().items()}
    if word == "lora":
        raise UserError("adapter.type lora: expected another tuner of PEFT; LoRA is method lora, with section lora")
    if word in REFUSED:
        raise UserError(f"adapter.type {word} can't be trained on a streamed model: {REFUSED[word]}")
    if word not in known:
        there = sorted(known.keys() - REFUSED.keys() - {"lora"})
        found = f"{show(word)}{_nearest(word, known)}"
        raise UserError(f"adapter.type: expected a tuner of PEFT ({', '.join(there)}), found {found}")
    return known[word]


def known_types() -> dict[Any, type]:
    """PEFT's types of adapters, with those of `finetune.peft_tuners`: their configurations."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import finetune.peft_tuners  # noqa: F401  registers them

    return PEFT_TYPE_TO_CONFIG_MAPPING


def _problems(word: str, kind: type, arguments: dict[str, Any]) -> typing.Iterator[str]:
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    hints = typing.get_type_hints(kind)
    for key, value in arguments.items():
        if key not in fields:
            yield f"adapter.{key}: unknown key of {word}{_nearest(key, fields, 'adapter.')} (value {show(value)})"
        elif key in _OF_THE_RUN:
            yield f"adapter.{key}: expected no value, found {show(value)}: {_OF_THE_RUN[key]}"
        elif key in _NOT_STREAMED and value != _NOT_STREAMED[key][0]:
            yield f"adapter.{key}: expected {_NOT_STREAMED[key][0]}, found {show(value)}: {_NOT_STREAMED[key][1]}"
        elif (expected := _mismatch(hints[key], value)) is not None:
            yield f"adapter.{key}: expected {expected}, found {show(value)}"


def _nearest(word: str, words: typing.Iterable[str], before: str = "") -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; nearest: {before}{near[0]}" if near else ""


def _mismatch(hint: Any, value: Any) -> str | None:
    """What a value of this type would be; None: it is one."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        # Of YAML come lists where PEFT has sets or tuples, and mappings where it has classes.
        adapter.validate_python(value, strict=not isinstance(value, list | dict))
    except ValidationError as error:
        found = dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in error.errors(include_url=False))
        return " or ".join(found)
    except PydanticSchemaGenerationError:
        return None
    return None


def _reads_weight(layer: nn.Module, base: nn.Module) -> bool:
    """Whether `layer` computes with the weight of `base` itself; True where that cannot be found out."""
    if type(base) is not nn.Linear:
        return True
    asked: list[bool] = []

    def numbers() -> torch.Tensor:
        asked.append(True)
        return torch.empty(shape, dtype=weight.dtype, device="meta")

    weight, shape, own = base.weight, base.weight.shape, base.__dict__.get("forward")
    modes = [(module, module.training) for module in layer.modules()]
    base._parameters["weight"] = nn.Parameter(OnDemand.of(numbers(), "weight", numbers, False), requires_grad=False)
    base.forward = lambda x, *_, **__: x.new_empty(*x.shape[:-1], shape[0])
    asked.clear()
    try:
        with on_meta(layer), torch.no_grad():
            for training in (True, False):
                layer.train(training)
                layer(torch.empty(1, 2, shape[1], dtype=weight.dtype, device="meta"))
    except Exception:  # whatever layers raise where there are no numbers
        asked.append(True)
    finally:
        base._parameters["weight"] = weight
        del base.forward
        if own is not None:
            base.forward = own
        for module, training in modes:
            module.training = training
    return bool(asked)


def check_memory(config: Config, num_numbers: int) -> None:
    """Raises UserError where the limit has no room for what is made of a matrix of so many numbers."""
    if config.host_memory is None:
        return
    limit, need = parse_bytes(config.host_memory, total_host_bytes()), host_bytes() + _COPIES * 4 * num_numbers
    if need > limit:
        raise UserError(
            f"host_memory: expected at least {format_bytes(need)}, for this adapter is made of the base's weights, one matrix "
            f"at a time, found {config.host_memory}"
        )


def check_tuner(adapted: nn.Module, word: str) -> None:
    """Raises UserError for a tuner that does more than its layers do."""
    from peft.tuners.tuners_utils import BaseTuner

    tuner = adapted.base_model
    own = isinstance(tuner, BaseTuner) and type(tuner).forward is not BaseTuner.forward
    if own and word not in _OWN_FORWARD:
        raise UserError(
            f"adapter.type {word} can't be trained on a streamed model: its model has a forward of its own, of which nothing "
            "is known here"
        )
    if hasattr(tuner, "update_and_allocate") and word not in _ALLOCATE:
        raise UserError(f"adapter.type {word} can't be trained on a streamed model: it changes itself after every step")


def check_kind(kind: Any, place: Path) -> None:
    """Raises UserError for a saved adapter, in `place`, of a kind that PEFT does not have or that cannot be streamed."""
    word = str(kind).lower()
    if kind not in known_types():
        raise UserError(f"the adapter in {place} is of kind {word}, which this PEFT does not have: install a newer one")
    if word in REFUSED:
        raise UserError(f"the adapter in {place} is of kind {word}, which cannot be streamed: {REFUSED[word]}")
