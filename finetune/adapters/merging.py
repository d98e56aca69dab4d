"""An adapter merged into its base by PEFT's own layers, one layer at a time: what `merge_and_unload` does to a model in memory.

[Note: merging] PEFT goes through the modules that an adapter has wrapped, and each adds its change to its base layer's weights.
Here the weights of one such layer at a time take the place of the placeholders, and what comes of them is taken out again. So
kinds of adapters, their options and their arithmetic are PEFT's. What differs is a tie: PEFT adds the change of an embedding to
the head that is tied to it, though the adapter has never touched that. Here ends that differ become two weights, which
compute what the adapter has computed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from finetune.adapters.base import class_of
from finetune.adapters.registry import ADAPTERS
from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.objectives.registry import find_objective
from finetune.offload.sizing.meta_operations import peak_bytes
from finetune.offload.weights.formats import PlainTensor, StoredWeight

# Of every number of a layer: what products and sums between dtypes make inside of themselves, in fp32, unseen by a dry run.
_UNSEEN_BYTES = 8


def can_merge(config: Config) -> bool:
    """Whether PEFT can merge what a run of these settings leaves into the base, as far as its kind says."""
    kind = config.adapter_kind
    if kind is None or find_objective(config.objective).scores:
        return False
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    import finetune.peft_tuners  # noqa: F401  registers them
    from finetune.adapters.routed import Routed

    word = (config.adapter.type or "").upper() if kind == "adapter" else ADAPTERS[kind].peft_type
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(word)
    return hasattr(tuner, "merge_and_unload") and not issubclass(class_of(word), Routed)


@dataclass(frozen=True, slots=True)
class Layer:
    """What an adapter has wrapped."""

    name: str
    """Fully qualified, in the base model."""
    module: nn.Module
    """The adapter, around its base layer."""
    weights: tuple[tuple[nn.Module, str, str], ...]
    """(module of the base, name in it, fully qualified name) of all parameters and persistent buffers inside."""


class Merging:
    """layers: in module order."""

    def __init__(self, adapted: nn.Module, base_names: Mapping[int, str], sources: Mapping[str, StoredWeight]) -> None:
        """adapted: the model with the adapter around it, over placeholders. base_names: id of each module of the base -> its
        name, from before it was wrapped. sources: its weights.

        Raises UserError for an adapter that cannot be merged.
        """
        if adapted.active_peft_config.is_prompt_learning:
            raise UserError("a prefix or prompt cannot be merged, for it changes no weight: use it with --adapter")
        if not hasattr(adapted.base_model, "merge_and_unload"):
            word = adapted.active_peft_config.peft_type.lower()
            raise UserError(f"PEFT cannot merge an adapter of kind {word}: use it with --adapter")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's, about ties: see [Note: merging]
                adapted.base_model._check_merge_allowed()
        except ValueError as error:
            raise UserError(f"PEFT cannot merge this adapter: {error}") from error
        self._names, self._sources = base_names, sources
        self._base = {id(module): module for module in adapted.modules() if id(module) in base_names}
        self.layers = tuple(self._find(adapted.base_model.model, ""))

    def merge(self, layer: Layer, value: Callable[[str], Tensor], device: str = "cpu") -> dict[str, Tensor]:
        """The layer's weights with the adapter in them, by fully qualified name, in the dtypes of their values.

        value: gives a weight as it is, which may be changed in place. device: that of the values, where the adapter goes too.
        Raises UserError for what PEFT refuses.
        """
        owners = {id(owner): owner for owner, _, _ in layer.weights}.values()
        homes = [home for owner in owners for home in (owner._parameters, owner._buffers)]
        held = [(home, name, tensor) for home in homes for name, tensor in home.items()]
        # PEFT notes in a layer that it is merged. What is copied is the adapter alone.
        adapter = copy.deepcopy(layer.module, dict(self._base))
        try:
            adapter.to(device)
            for owner, name, parameter in layer.weights:
                if name in owner._parameters:
                    owner._parameters[name] = nn.Parameter(value(parameter), requires_grad=False)
                else:
                    owner._buffers[name] = value(parameter)
            with torch.no_grad():
                merged = _merged(adapter)
            found = {f"{layer.name}.{name}": tensor.detach() for name, tensor in merged.state_dict().items()}
            return {parameter: found[parameter].contiguous() for _, _, parameter in layer.weights}
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"PEFT cannot merge the adapter of {layer.name}: {reason}") from error
        finally:
            for home, name, tensor in held:
                home[name] = tensor

    def peak_bytes(self, dtype: Callable[[StoredWeight], torch.dtype], value: Callable[[str], Tensor]) -> int:
        """What merging one layer takes at most, its stored and merged weights included, found by merging one of each kind on
        meta. dtype: of a weight's numbers. value: as `merge` takes it.

        Raises UserError as `merge`: before anything is written.
        """

        def on_meta(parameter: str) -> Tensor:
            weight = self._sources[parameter]
            stored = weight.load(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
            return weight.decode(stored, dtype(weight))

        sizes: dict[object, int] = {}
        for layer in self.layers:
            weights = [self._sources[parameter] for _, _, parameter in layer.weights]
            kind = type(layer.module), _shapes(layer.module), str([(type(w), w.shape, w.num_bytes) for w in weights])
            if kind in sizes:
                continue
            unseen = _UNSEEN_BYTES * max(prod(weight.shape) for weight in weights)
            try:
                sizes[kind] = unseen + peak_bytes(partial(self.merge, layer, on_meta, "meta"))
            except UserError:  # it asks for numbers, or can't be done
                self.merge(layer, value)
                sizes[kind] = unseen + sum(weight.num_bytes + 4 * 4 * prod(weight.shape) for weight in weights)
        return max(sizes.values(), default=0)

    def _find(self, module: nn.Module, prefix: str) -> Iterator[Layer]:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if id(child) in self._names:
                yield from self._find(child, f"{full}.")
                continue
            weights = tuple(
                (owner, attribute, parameter)
                for owner in child.modules()
                if id(owner) in self._names
                for attribute in (*owner._parameters, *owner._buffers)
                if _holds_numbers(self._sources.get(parameter := f"{self._names[id(owner)]}.{attribute}"))
            )
            yield Layer(full, child, weights)


def _holds_numbers(weight: StoredWeight | None) -> bool:
    """Whether it is there, and no buffer of integers."""
    return weight is not None and not (isinstance(weight, PlainTensor) and not weight.dtype.is_floating_point)


def _merged(adapter: nn.Module) -> nn.Module:
    """The base layer of `adapter` with that in it, as PEFT's `merge_and_unload` goes about a module."""
    if hasattr(adapter, "unload_and_optionally_merge_module"):
        return adapter.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    adapter.merge(safe_merge=False, adapter_names=None)
    return adapter.get_base_layer()


def _shapes(module: nn.Module) -> str:
    return str([(name, tensor.shape, tensor.dtype) for name, tensor in module.named_parameters()])
