"""DynMoLE (Li et al. 2025, arXiv 2504.00661): LoRA experts around every linear layer, chosen by how sure a router is.

A token gets the likeliest experts whose probabilities add up to at most `top_p`, but at least `keep_top_k` of them; where the
Tsallis entropy of the router's probabilities is above a threshold, it gets all. Experts are weighted by the router's
probabilities as they are. The loss has the mean entropy, so that routers become surer, and a load balance of these weights.
Entropies are divided by the largest that so many experts can have. Where the paper leaves it open (that share, what is added to
probabilities), this is as in the authors' program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional

from finetune.peft_tuners.experts import NO_MERGE, LoraPair, check_linear, check_lora, router


@dataclass
class DynMoleConfig(PeftConfig):
    """Options of DynMoLE, by the names of the authors' program."""

    r: int = field(default=8, metadata={"help": "Rank of every expert."})
    lora_alpha: float = field(default=16, metadata={"help": "Changes are scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what goes into an expert."})
    use_rslora: bool = field(default=False, metadata={"help": "Whether changes are scaled by lora_alpha / sqrt(r) instead."})
    target_modules: list[str] | str | None = field(default="all-linear", metadata={"help": "Names of linear layers."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of layers that are left out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of blocks; all if none."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "The name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})
    num_experts: int = field(default=6, metadata={"help": "Experts of a layer."})
    keep_top_k: int = field(default=2, metadata={"help": "Experts that a token gets at least."})
    top_p: float = field(default=0.75, metadata={"help": "What the probabilities of its experts add up to at most."})
    entropy_threshold: float = field(default=0.9, metadata={"help": "Above it, of the largest entropy, all experts."})
    entropy_index: float = field(default=1.1, metadata={"help": "Tsallis' q; 1: Shannon's entropy."})
    entropy_eps: float = field(default=1e-5, metadata={"help": "Added to probabilities in entropies."})
    router_init_range: float = field(default=5.0, metadata={"help": "Routers begin as kaiming_uniform_(a=sqrt(this))."})
    router_aux_loss_coef: float = field(default=0.001, metadata={"help": "What the load balance counts in the loss."})
    router_dyn_loss_coef: float = field(default=0.01, metadata={"help": "What the mean entropy counts in the loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "DYNMOLE"
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        check_lora(self)
        if not 1 <= self.keep_top_k <= self.num_experts or self.num_experts < 2:
            raise ValueError("num_experts is 2 or more, keep_top_k is from 1 to num_experts")
        if not 0 < self.top_p <= 1 or not 0 < self.entropy_index <= 2:
            raise ValueError("top_p is above 0 and at most 1, entropy_index is above 0 and at most 2")
        if min(self.entropy_threshold, self.entropy_eps, self.router_init_range, self.router_dyn_loss_coef) < 0:
            raise ValueError("entropy_threshold, entropy_eps, router_init_range, router_dyn_loss_coef are 0 or more")


def tsallis_entropy(probabilities: Tensor, q: float, eps: float) -> Tensor:
    """Of the last dimension, as a share of that of equal probabilities. Shannon's where q is 1."""
    count, p = probabilities.shape[-1], probabilities + eps
    if q == 1:
        return -(p * p.log()).sum(dim=-1) / math.log(count)
    return (1 - (p**q).sum(dim=-1)) / (q - 1) / ((1 - count ** (1 - q)) / (q - 1))


def route(probabilities: Tensor, config: DynMoleConfig) -> tuple[Tensor, Tensor]:
    """(entropies [...], weights of experts [..., experts]) of a router's probabilities [..., experts]."""
    values, order = torch.sort(probabilities, dim=-1, descending=True)
    taken = values.cumsum(dim=-1) <= config.top_p
    taken = taken | (torch.arange(taken.shape[-1], device=taken.device) < config.keep_top_k)
    mask = torch.zeros_like(taken).scatter(-1, order, taken)
    entropies = tsallis_entropy(probabilities, config.entropy_index, config.entropy_eps)
    mask = mask | (entropies > config.entropy_threshold)[..., None]
    return entropies, probabilities * mask


class DynMoleLinear(nn.Module, BaseTunerLayer):
    """A linear layer with experts and a router of its own."""

    adapter_layer_names = ("dynmole_experts", "dynmole_router")
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.dynmole_experts, self.dynmole_router = nn.ModuleDict(), nn.ModuleDict()
        self.configs: dict[str, DynMoleConfig] = {}
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, name: str, config: DynMoleConfig) -> None:
        base, count = self.base_layer, config.num_experts
        self.configs[name] = config
        self.dynmole_experts[name] = nn.ModuleList([LoraPair(base, config) for _ in range(count)])
        self.dynmole_router[name] = router(base.in_features, count, base.weight)
        nn.init.kaiming_uniform_(self.dynmole_router[name].weight, a=math.sqrt(config.router_init_range))
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name not in self.dynmole_experts:
                continue
            logits = self.dynmole_router[name](x.reshape(-1, x.shape[-1]).float()).reshape(*x.shape[:-1], -1)
            _, weights = route(functional.softmax(logits, dim=-1), self.configs[name])
            for number, expert in enumerate(self.dynmole_experts[name]):
                result = result + (weights[..., number, None] * expert(x, torch.float32)).to(result.dtype)
        return result


class DynMoleModel(BaseTuner):
    """Puts DynMoLE around the linear layers of a model."""

    prefix = "dynmole_"
    tuner_layer_cls = DynMoleLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def _create_and_replace(
        self, peft_config: DynMoleConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        layer = target
        if not isinstance(target, DynMoleLinear):
            check_linear(target, current_key, "DynMoLE")
            layer = DynMoleLinear(target)
        layer.update_layer(adapter_name, peft_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".dynmole_experts.{adapter_name}.", ".dynmole_experts.").replace(
            f".dynmole_router.{adapter_name}.", ".dynmole_router."
        )

    def routers(self) -> list[nn.Module]:
        """What gives the logits of each layer, fp32 [tokens, experts], in module order."""
        layers = (module for module in self.model.modules() if isinstance(module, DynMoleLinear))
        return [layer.dynmole_router[self.active_adapters[0]] for layer in layers]

    def router_loss(self, logits: Sequence[Tensor], attention_mask: Tensor | None) -> Tensor:
        """Mean entropy and load balance of all tokens of all layers together, each times its coefficient, fp32 [].

        logits: of each router, [tokens, experts]. attention_mask: [tokens]; 0: padding, which counts for nothing.
        """
        config, count = self.peft_config[self.active_adapters[0]], logits[0].shape[-1]
        probabilities = functional.softmax(torch.cat(list(logits)), dim=-1)
        entropies, weights = route(probabilities, config)
        if attention_mask is None:
            entropy, shares, means = entropies.mean(), weights.mean(dim=0), probabilities.mean(dim=0)
        else:
            mask = attention_mask.to(probabilities).repeat(len(logits))
            tokens = mask.sum()
            entropy = (entropies * mask).sum() / tokens
            shares = (weights * mask[:, None]).sum(dim=0) / tokens
            means = (probabilities * mask[:, None]).sum(dim=0) / tokens
        balance = count * (shares * means).sum()
        return config.router_dyn_loss_coef * entropy + config.router_aux_loss_coef * balance
