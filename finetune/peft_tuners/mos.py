"""MoS, mixture of shards (Wang et al. 2024, arXiv 2410.00938): low-rank matrices whose rows are put together of shards.

The shards of all layers of one kind (all `q_proj`, say) are in two pools, one for A and one for B. All of what the paper keeps
layers apart by is here: a layer takes a random subset of its pool (subset selection), another one for A than for B (pair
dissociation), a row of a matrix is several shards (vector sharding), and a part of each pool belongs to single layers (shard
privatization). Which shards a layer takes is drawn once and saved with the adapter.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass
class MosConfig(PeftConfig):
    """Options of MoS. With L layers of a kind, a pool has `equivalent_rank` x L x `shards_per_vector` shards."""

    r: int = field(default=8, metadata={"help": "Rank of the matrices of a layer."})
    equivalent_rank: int = field(default=2, metadata={"help": "Rank of the LoRA that has as many parameters."})
    private_rank: int = field(default=1, metadata={"help": "Of equivalent_rank, what belongs to single layers."})
    shards_per_vector: int = field(default=4, metadata={"help": "Shards that a row of a matrix is put together of."})
    lora_alpha: float = field(default=16, metadata={"help": "The change of a weight is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what goes into the low-rank product."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of linear layers, as for LoRA."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of layers that are left out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of blocks; all if none."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "The name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "MOS"
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if min(self.r, self.equivalent_rank, self.shards_per_vector) < 1 or self.private_rank < 0:
            raise ValueError("r, equivalent_rank and shards_per_vector are 1 or more, private_rank is 0 or more")
        if self.private_rank > min(self.r, self.equivalent_rank):
            raise ValueError("private_rank is at most equivalent_rank and at most r")
        if self.private_rank == self.equivalent_rank != self.r:
            raise ValueError("where all shards are private (private_rank = equivalent_rank), r is the same number")


class MosLinear(nn.Module, BaseTunerLayer):
    """A linear layer with the change that its shards make. pool_A, pool_B: pools, fp32 [shards, features / shards a row]."""

    adapter_layer_names = ("pool_A", "pool_B")
    other_param_names = ("mos_index_A", "mos_index_B", "mos_dropout", "scaling", "r")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.pool_A, self.pool_B = nn.ParameterDict(), nn.ParameterDict()
        self.mos_index_A, self.mos_index_B = BufferDict(persistent=True), BufferDict(persistent=True)
        self.mos_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, name: str, config: MosConfig, pools: tuple[nn.Parameter, nn.Parameter], number: int) -> None:
        """pools: for A and for B. number: of this layer among those that share them."""
        shards, private = config.shards_per_vector, config.private_rank * config.shards_per_vector
        self.r[name] = config.r
        self.scaling[name] = config.lora_alpha / config.r
        self.mos_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        sides = (self.pool_A, self.mos_index_A), (self.pool_B, self.mos_index_B)
        for (parameters, indices), pool in zip(sides, pools, strict=True):
            layers = len(pool) // (config.equivalent_rank * shards)
            public = len(pool) - layers * private
            own = public + number * private + torch.arange(private)
            shared = torch.randperm(public)[: config.r * shards - private]
            parameters[name] = pool
            indices[name] = torch.cat([shared, own]).to(pool.device)
        self.set_adapter(self.active_adapters)

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of an adapter: its shards, one behind the other."""
        r = self.r[name]
        a = self.pool_A[name][self.mos_index_A[name]].reshape(r, -1)
        return a, self.pool_B[name][self.mos_index_B[name]].reshape(r, -1).t()

    def get_delta_weight(self, name: str) -> Tensor:
        """Of the base's weight, in its shape, fp32."""
        a, b = self.matrices(name)
        change = (b @ a) * self.scaling[name]
        return change.t() if isinstance(self.get_base_layer(), Conv1D) else change

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        weight = self.get_base_layer().weight
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.pool_A:
                merged = weight.data + self.get_delta_weight(name).to(weight.dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                weight.data = merged
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.pool_A:
                a, b = self.matrices(name)
                inputs = self.mos_dropout[name](self._cast_input_dtype(x, a.dtype))
                result = result + ((inputs @ a.t() @ b.t()) * self.scaling[name]).to(result.dtype)
        return result


class MosModel(BaseTuner):
    """Puts MoS around the linear layers of a model. `mos_pools` holds the pools of every adapter, by kind of layer."""

    uses_shared_state = True
    prefix = "mos_"
    tuner_layer_cls = MosLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: MosConfig, adapter_name: str) -> None:
        self.mos_pools = nn.ModuleDict()

    def _prepare_model(self, peft_config: MosConfig, model: nn.Module) -> None:
        """Makes the pools, whose sizes follow from how many layers there are of each kind."""
        _maybe_include_all_linear_layers(peft_config, model)
        kinds: dict[str, list[nn.Module]] = defaultdict(list)
        for key, module in model.named_modules():
            base = module.base_layer if isinstance(module, MosLinear) else module
            if isinstance(base, nn.Linear | Conv1D) and self._check_target_module_exists(peft_config, key):
                kinds[_kind(key, base)].append(base)
        pools = nn.ParameterDict()
        for kind, layers in kinds.items():
            for side, size in zip("AB", _features(layers[0]), strict=True):
                pools[f"{kind}_{side}"] = _make_pool(peft_config, kind, side, size, layers)
        self.mos_pools[next(name for name, config in self.peft_config.items() if config is peft_config)] = pools
        self._numbers: dict[str, int] = defaultdict(int)

    def _create_and_replace(
        self, peft_config: MosConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        base = target.base_layer if isinstance(target, MosLinear) else target
        if not isinstance(base, nn.Linear | Conv1D):
            raise ValueError(f"{current_key} is a {type(base).__name__}: MoS is for linear layers")
        kind = _kind(current_key, base)
        pools, number = self.mos_pools[adapter_name], self._numbers[kind]
        self._numbers[kind] += 1
        layer = target if isinstance(target, MosLinear) else MosLinear(target)
        layer.update_layer(adapter_name, peft_config, (pools[f"{kind}_A"], pools[f"{kind}_B"]), number)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: MosConfig, adapter_name: str, state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Pools once, not with every layer."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {key: value for key, value in found.items() if not any(f".{pool}." in key for pool in ("pool_A", "pool_B"))}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MosConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Raises ValueError for a layer that takes shards which are not there."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for key, layer in model.named_modules():
            for side in "AB" if isinstance(layer, MosLinear) else "":
                index = found.get(f"{key}.mos_index_{side}.{adapter_name}")
                pool = getattr(layer, f"pool_{side}").get(adapter_name)
                if index is None or pool is None:
                    continue
                if index.dtype != torch.int64 or not index.numel() or index.min() < 0 or index.max() >= len(pool):
                    raise ValueError(f"{key}: expected numbers of shards in mos_index_{side}, from 0 to {len(pool) - 1}")
        return found


def _features(base: nn.Module) -> tuple[int, int]:
    """(inputs, outputs)."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    return base.weight.shape[0], base.weight.shape[1]


def _kind(key: str, base: nn.Module) -> str:
    """Layers of the same kind share pools."""
    inputs, outputs = _features(base)
    return f"{key.rpartition('.')[2]}_{inputs}x{outputs}"


def _make_pool(config: MosConfig, kind: str, side: str, size: int, layers: list[nn.Module]) -> nn.Parameter:
    """Of A as LoRA begins a matrix of that many inputs, of B zeros: fp32 [shards, size / shards a row]."""
    shards = config.shards_per_vector
    if size % shards:
        raise ValueError(f"shards_per_vector {shards} does not divide the {size} features of {kind}")
    if len(layers) * (config.equivalent_rank - config.private_rank) < config.r - config.private_rank:
        raise ValueError(
            f"r {config.r} is more than the {len(layers)} layers of {kind} share: expected at most "
            f"{config.private_rank + len(layers) * (config.equivalent_rank - config.private_rank)}"
        )
    device = layers[0].weight.device
    pool = torch.zeros(len(layers) * config.equivalent_rank * shards, size // shards)
    if side == "A":
        nn.init.uniform_(pool, -1 / sqrt(size), 1 / sqrt(size))
    return nn.Parameter(pool if device.type == "meta" else pool.to(device))
