"""Prefix tuning through PEFT: keys and values that every layer sees before its own, while the model stays as it is.

Li and Liang 2021; by forward passes alone, as MeZO (Malladi et al. 2023, section 3 and appendix) tunes one: it begins as the
keys and values of random tokens.

PEFT gives the model a key-value cache with the prefix in it, which would go on to keep every token of every layer until the
pass is over: here a layer's new keys and values are dropped as soon as it has attended (`take_over`), so a pass holds those of
one block. In generation the caches that come in keep them, and the prefix is put into those that are empty.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from finetune.methods.adapters import task_type
from memory.errors import UserError
from offload.skeleton import cache_argument
from offload.streamed_model import StreamedModel


def attach(model: nn.Module, num_tokens: int, seed: int) -> nn.Module:
    """`model` wrapped by PEFT with a fresh prefix of so many positions. Raises UserError for models that cannot have one."""
    from peft import PrefixTuningConfig, get_peft_model

    if task_type(model) is None:
        raise UserError(f"zo.parameters prefix: expected a language model, found {type(model).__name__}")
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, PrefixTuningConfig(task_type=task_type(model), num_virtual_tokens=num_tokens))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"PEFT has no prefix for {type(model).__name__}: {error}") from error


def length(model: nn.Module) -> int:
    """Positions that a prefix takes before every text."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def take_over(model: nn.Module) -> None:
    """Lets a model that PEFT has given a prefix drop keys and values, and take caches; others stay as they are."""
    if length(model):
        model.get_prompt = partial(_passing_prompt, model.get_prompt)
        model.forward = partial(_forward, model)


def begin_as_tokens(model: nn.Module, streamed: StreamedModel, seed: int) -> None:
    """Sets the prefix to the keys and values of random tokens, which takes a pass over the weights."""
    from transformers import DynamicCache

    base, count = streamed.parts.model, length(model)
    config = base.config.get_text_config()
    ids = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))
    cache = DynamicCache(config=base.config)
    ids = ids.to(streamed.device.torch_device)
    streamed.forward([{"input_ids": ids, cache_argument(base): cache, "use_cache": True, "without_prefix": True}])
    values = [x[0].transpose(0, 1).reshape(count, -1) for layer in cache.layers for x in (layer.keys, layer.values)]
    _set_values(model, torch.cat(values, dim=1))


def read_values(model: nn.Module, directory: Path) -> None:
    """Sets the prefix to that saved in `directory`. Raises UserError when it is not there."""
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is not there: the prefix that the run began with is needed to go on with it")
    _set_values(model, load_file(path)["prompt_embeddings"])


def _set_values(model: nn.Module, values: torch.Tensor) -> None:
    weight = model.prompt_encoder[model.active_adapter].embedding.weight
    if values.shape != weight.shape:
        raise UserError(
            f"PEFT has no prefix for {type(model.get_base_model()).__name__}: it takes keys and values of "
            f"{weight.shape[1]} numbers, the model makes {values.shape[1]}"
        )
    weight.data.copy_(values)


def _forward(model: nn.Module, *, input_ids: torch.Tensor, without_prefix: bool = False, **inputs: Any) -> Any:
    """PEFT's forward for a prefix, and one for a cache that comes in."""
    key = cache_argument(model.base_model)
    cache, batch_size = inputs.pop(key, None), input_ids.shape[0]
    if cache is None:
        cache = model.get_prompt(batch_size)
        if inputs.get("attention_mask") is not None:
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask.new_ones(batch_size, length(model)), mask], dim=1)
    elif not without_prefix and not cache.get_seq_length():
        for index, layer in enumerate(model.get_prompt(batch_size).layers):
            cache.update(layer.keys, layer.values, index)
    return model.base_model(input_ids=input_ids, **inputs, **{key: cache})


def _passing_prompt(get_prompt: Any, batch_size: int, **arguments: Any) -> Any:
    """PEFT's cache with the prefix in it, whose layers come back to it after each update."""
    cache = get_prompt(batch_size, **arguments)
    for layer in cache.layers:
        layer.update = partial(_update_and_forget, layer, layer.update)
    return cache


def _update_and_forget(layer: Any, update: Any, *arguments: Any, **options: Any) -> Any:
    before = dict(vars(layer))
    try:
        return update(*arguments, **options)
    finally:
        vars(layer).clear()
        vars(layer).update(before)
