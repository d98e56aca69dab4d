"""Prefix tuning through PEFT: keys and values that every layer sees before its own, while the model stays as it is.

Li and Liang 2021; by forward passes alone, as MeZO (Malladi et al. 2023, section 3 and appendix) tunes one: it begins as the
keys and values of random tokens.

PEFT gives the model a key-value cache with the prefix in it, which would go on to keep every token of every layer until the
pass is over: here a layer's new keys and values are dropped as soon as it has attended (`Prefix.take_over`), so a pass holds
those of one block. In generation the caches that come in keep them, and the prefix is put into those that are empty.
"""

from __future__ import annotations

import hashlib
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from finetune.adapters.base import Adapter
from finetune.adapters.peft_files import task_type
from finetune.adapters.prompts import check_positions
from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.offload.streamed_model import StreamedModel
from finetune.offload.weights.parts import ModelParts
from finetune.offload.weights.skeleton import cache_argument


class Prefix(Adapter):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._given: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        """Of every micro-batch of a step, in their order: keys and values of all layers as they came out of the encoder, and as
        blocks got them."""

    @classmethod
    def attach(cls, parts: ModelParts, config: Config, only_shapes: bool = False) -> tuple[nn.Module, str | None]:
        return attach(parts.model, config.zo.prefix_tokens, config.training.seed), None

    @property
    def positions(self) -> int:
        return self.model.active_peft_config.num_virtual_tokens

    def check_length(self, num_tokens: int) -> None:
        check_positions(self.model, "prefix", self.positions, num_tokens)

    def lane_bytes(self, itemsize: int) -> int:
        return self._values.numel() * itemsize

    def take_over(self) -> None:
        """Lets the model drop keys and values, and take caches. Raises UserError for a model that cannot have a prefix."""
        _check_attends(self.model.get_base_model())
        self.model.forward = partial(_forward, self.model, self._given)

    def begin_step(self) -> None:
        self._given.clear()

    def after_backward(self) -> None:
        for made, given in self._given:
            pairs = [(one, other.grad) for one, other in zip(made, given, strict=True) if other.grad is not None]
            if pairs:
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        self._given.clear()

    def begin(self, streamed: StreamedModel, seed: int) -> None:
        """As the keys and values of random tokens."""
        from transformers import DynamicCache

        base, count = streamed.parts.model, self.positions
        config = base.config.get_text_config()
        ids = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))
        past = DynamicCache(config=base.config)
        ids = ids.to(streamed.device.torch_device)
        streamed.forward([{"input_ids": ids, cache_argument(base): past, "use_cache": True, "without_prefix": True}])
        values = [x[0].transpose(0, 1).reshape(count, -1) for layer in past.layers for x in (layer.keys, layer.values)]
        self._set_values(torch.cat(values, dim=1))

    def read(self, directory: Path, digest: str) -> bool:
        try:
            self._set_values(load_file(directory / "adapter_model.safetensors")["prompt_embeddings"])
        except (OSError, SafetensorError, KeyError, UserError):
            return False
        return self.digest() == digest

    def digest(self) -> str:
        return hashlib.blake2b(self._values.detach().cpu().numpy().tobytes(), digest_size=16).hexdigest()

    @property
    def _values(self) -> nn.Parameter:
        """fp32 [positions, 2 * layers * key-value heads * head size]: of every layer its keys, then its values."""
        return self.model.prompt_encoder[self.model.active_adapter].embedding.weight

    def _set_values(self, values: torch.Tensor) -> None:
        weight = self._values
        if values.shape != weight.shape:
            raise UserError(
                f"PEFT has no prefix for {type(self.model.get_base_model()).__name__}: it takes keys and values of "
                f"{weight.shape[1]} numbers, the model makes {values.shape[1]}"
            )
        weight.data.copy_(values)


def attach(model: nn.Module, num_tokens: int, seed: int) -> nn.Module:
    """`model` wrapped by PEFT with a fresh prefix of so many positions. Raises UserError for models that cannot have one."""
    from peft import PrefixTuningConfig, get_peft_model

    _check_attends(model)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, PrefixTuningConfig(task_type=task_type(model), num_virtual_tokens=num_tokens))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"PEFT has no prefix for {type(model).__name__}: {error}") from error


def _check_attends(model: nn.Module) -> None:
    """Raises UserError unless `model` is a language model all of whose layers have keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if task_type(model) is None:
        raise UserError(f"a prefix: expected a language model, found {type(model).__name__}")
    layers = DynamicCache(config=model.config).layers
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise UserError(
            f"a prefix: expected a model whose layers all attend, found {type(model).__name__}: use another kind of adapter"
        )


def _forward(
    model: nn.Module,
    given: list[tuple[list[torch.Tensor], list[torch.Tensor]]],
    *,
    input_ids: torch.Tensor,
    without_prefix: bool = False,
    **inputs: Any,
) -> Any:
    """PEFT's forward for a prefix, and one for a cache that comes in. given: as `Prefix` has it."""
    key, rows = cache_argument(model.base_model), input_ids.shape[0]
    past = inputs.pop(key, None)
    if past is None:
        past = _passing_cache(model, rows, given)
        if inputs.get("attention_mask") is not None:
            mask = inputs["attention_mask"]
            before = mask.new_ones(rows, model.active_peft_config.num_virtual_tokens)
            inputs["attention_mask"] = torch.cat([before, mask], dim=1)
    elif not without_prefix and not past.get_seq_length():
        for index, layer in enumerate(model.get_prompt(rows).layers):
            past.update(layer.keys, layer.values, index)
    return model.base_model(input_ids=input_ids, **inputs, **{key: past})


def _passing_cache(model: nn.Module, rows: int, given: list[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> Any:
    """PEFT's cache with the prefix in it, whose layers forget what they are updated with. The same memory serves all rows,
    unless gradients are wanted, which PEFT sums over copies. Then blocks get leaves, each its own."""
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in model.prompt_encoder.parameters())
    cache = model.get_prompt(rows if trained else 1)
    made: list[torch.Tensor] = []
    for layer in cache.layers:
        pair = layer.keys, layer.values
        if trained:
            made += pair
            layer.keys, layer.values = (x.detach().requires_grad_() for x in pair)
        else:
            layer.keys, layer.values = (x.expand(rows, *x.shape[1:]) for x in pair)
        layer.__class__ = _passing(type(layer))
    if trained:
        given.append((made, [x for layer in cache.layers for x in (layer.keys, layer.values)]))
    return cache


@cache
def _passing(kind: type) -> type:
    def update(self: Any, *arguments: Any, **options: Any) -> Any:
        before = dict(vars(self))
        try:
            return kind.update(self, *arguments, **options)
        finally:
            vars(self).clear()
            vars(self).update(before)

    return type(f"Passing{kind.__name__}", (kind,), {"update": update})
