"""MixLoRA (Li et al. 2024, arXiv 2404.15159): every feed-forward block becomes a mixture of experts that share its weights.

An expert is the block itself with a LoRA adapter of its own around each linear layer. A router gives every token to its `top_k`
experts; what they make is summed by the router's probabilities. Linear layers elsewhere (attention) get one LoRA adapter. The
load balance of the routers is part of the loss.

The block runs once, over all pairs of token and expert, one expert behind the other. What the shared weights make of a token
that several experts get is computed once, as in the paper, where they are given the block's own input.

Files are named as the authors' programs name them: `adapter_config.json` is theirs as it is, and the tensors have their names
where blocks are `model.layers` with `self_attn` and `mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional

from finetune.peft_tuners.experts import NO_MERGE, LoraPair, check_linear, check_lora, router


@dataclass
class MixLoraConfig(PeftConfig):
    """Options of MixLoRA, by the names of the authors' programs."""

    r: int = field(default=8, metadata={"help": "Rank of every LoRA adapter."})
    lora_alpha: float = field(default=16, metadata={"help": "Changes are scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Of what goes into a LoRA adapter; theirs wants one."})
    use_rslora: bool = field(default=False, metadata={"help": "Whether changes are scaled by lora_alpha / sqrt(r) instead."})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Names of linear layers. Those outside of attention get experts."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of layers that are left out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of blocks; all if none."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "The name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})
    num_experts: int = field(default=8, metadata={"help": "Experts of a feed-forward block."})
    top_k: int = field(default=2, metadata={"help": "Experts that a token gets."})
    router_init_range: float = field(default=0.02, metadata={"help": "Standard deviation of what routers begin as."})
    router_aux_loss_coef: float = field(default=0.001, metadata={"help": "What the load balance counts in the loss."})
    routing_strategy: str = field(default="mixlora", metadata={"help": "How tokens are routed; mixlora: top_k experts."})
    act_fn: str | None = field(default=None, metadata={"help": "The model's own activation, for other programs."})
    router_loss: bool = field(default=True, metadata={"help": "Whether the load balance is part of the loss."})
    use_dora: bool = field(default=False, metadata={"help": "Not offered."})
    jitter_noise: float = field(default=0.0, metadata={"help": "Not offered."})
    expert_lora: dict[str, Any] | None = field(default=None, metadata={"help": "Not offered."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "MIXLORA"
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        check_lora(self)
        if self.routing_strategy != "mixlora":
            raise ValueError(f"routing_strategy: expected mixlora, found {self.routing_strategy}")
        for option, value in (("use_dora", False), ("jitter_noise", 0.0), ("expert_lora", None)):
            if getattr(self, option) != value and getattr(self, option) is not None:
                raise ValueError(f"{option} is not offered: expected {value}, found {getattr(self, option)}")
        if not 1 <= self.top_k <= self.num_experts or self.num_experts < 2:
            raise ValueError("num_experts is 2 or more, top_k is from 1 to num_experts")

    def to_dict(self) -> dict[str, Any]:
        """Without what the authors' programs take for given where it stands there."""
        return {key: value for key, value in super().to_dict().items() if key != "expert_lora"}


class _Turn(NamedTuple):
    """What the linear layers of a feed-forward block are told while it runs for all experts."""

    given: Tensor
    """The block's input, [tokens, features]."""
    sorted: Tensor
    """The same for every pair of token and expert, by experts, [pairs, features]."""
    rows: Tensor
    """Of `given` in `sorted`, int64 [pairs]."""
    sizes: Sequence[int]
    """Pairs of each expert."""


class MixLoraLinear(nn.Module, BaseTunerLayer):
    """A linear layer with one LoRA adapter, or, within a feed-forward block, with one for every expert."""

    adapter_layer_names = ("mixlora_experts",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str, config: MixLoraConfig, num_experts: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        pairs = [LoraPair(base_layer, config) for _ in range(num_experts)]
        self.mixlora_experts = nn.ModuleDict({name: nn.ModuleList(pairs)})
        self.turn: _Turn | None = None
        self._disable_adapters = False
        self.merged_adapters = []
        self.set_adapter(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name, turn = self.active_adapters[0] if self.active_adapters else None, self.turn
        if self.disable_adapters or name not in self.mixlora_experts:
            return self.base_layer(x, *args, **kwargs)
        pairs = self.mixlora_experts[name]
        if len(pairs) == 1:
            result = self.base_layer(x, *args, **kwargs)
            return result + pairs[0](x, result.dtype)
        if turn is None:  # outside of its feed-forward block
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(turn.given)[turn.rows] if x is turn.sorted else self.base_layer(x, *args, **kwargs)
        parts = zip(pairs, x.split(turn.sizes), strict=True)
        return result + torch.cat([pair(part, result.dtype) for pair, part in parts])


class MixLoraBlock(nn.Module, BaseTunerLayer):
    """A feed-forward block as a mixture of experts."""

    adapter_layer_names = ("mixlora_router",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str, config: MixLoraConfig, features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        like = next(base_layer.parameters())
        self.mixlora_router = nn.ModuleDict({name: router(features, config.num_experts, like)})
        nn.init.normal_(self.mixlora_router[name].weight, std=config.router_init_range)
        self.top_k = config.top_k
        self._disable_adapters = False
        self.merged_adapters = []
        self.set_adapter(name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0] if self.active_adapters else None
        if self.disable_adapters or name not in self.mixlora_router:
            return self.base_layer(hidden_states, *args, **kwargs)
        given = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.mixlora_router[name](given.float())
        weights, chosen = torch.topk(functional.softmax(logits, dim=-1, dtype=torch.float32), self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        experts = chosen.t().reshape(-1)  # first choices of all tokens, then second ones
        order = experts.argsort(stable=True)
        rows = order % len(given)
        turn = _Turn(given, given[rows], rows, _sizes(experts, logits.shape[-1]))
        layers = [layer for layer in self.base_layer.modules() if isinstance(layer, MixLoraLinear)]
        for layer in layers:
            layer.turn = turn
        try:
            made = self.base_layer(turn.sorted, *args, **kwargs)
        finally:
            for layer in layers:
                layer.turn = None
        weighted = made.float() * weights.t().reshape(-1)[order, None]
        total = torch.zeros(len(given), made.shape[-1], dtype=torch.float32, device=made.device).index_add(0, rows, weighted)
        return total.to(made.dtype).reshape(*hidden_states.shape[:-1], -1)


def _sizes(experts: Tensor, num_experts: int) -> list[int]:
    """How many pairs each expert has. On meta, where nobody knows: all are of the first one, which takes as much memory."""
    if experts.is_meta:
        return [len(experts), *[0] * (num_experts - 1)]
    return torch.bincount(experts, minlength=num_experts).tolist()


class MixLoraModel(BaseTuner):
    """Puts MixLoRA around a model. It has one such adapter at a time."""

    prefix = "mixlora_"
    tuner_layer_cls = (MixLoraLinear, MixLoraBlock)
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: MixLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise ValueError("a model has one MixLoRA adapter at a time")

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._blocks: dict[str, int] = {}  # name -> features of its input
        config, own = self.peft_config[adapter_name], getattr(getattr(model, "config", None), "hidden_act", None)
        if config.act_fn not in (None, own):
            raise ValueError(f"act_fn: expected {own}, the model's own, found {config.act_fn}")
        config.act_fn = own
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for key, features in self._blocks.items():
            with init_empty_weights() if kwargs.get("low_cpu_mem_usage") else nullcontext():
                block = MixLoraBlock(model.get_submodule(key), adapter_name, config, features)
            parent, _, child = key.rpartition(".")
            self._replace_module(model.get_submodule(parent), child, block, block.base_layer)
        if not self._blocks:
            raise ValueError("target_modules has no linear layer of a feed-forward block: without one there are no experts")
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def _create_and_replace(
        self, peft_config: MixLoraConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        check_linear(target, current_key, "MixLoRA")
        block = current_key.rpartition(".")[0]
        num_experts = 1
        if not _is_attention(block.rpartition(".")[2]):
            if any(_is_attention(name) for name, _ in parent.named_modules()):
                raise ValueError(f"{current_key} is in no feed-forward block of its own, which MixLoRA could make a mixture of")
            num_experts = peft_config.num_experts
            self._blocks.setdefault(block, target.in_features)
        layer = MixLoraLinear(target, adapter_name, peft_config, num_experts)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The authors' names."""
        key = key.replace(f".mixlora_router.{adapter_name}.weight", ".moe_gate.weight")
        is_routed = ".base_layer." in key and f".mixlora_experts.{adapter_name}." in key
        key = key.replace(f".mixlora_experts.{adapter_name}.", ".experts." if is_routed else ".one.")
        key = key.replace(".one.0.", ".").replace(".base_layer.", ".")
        return re.sub(r"^base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.", r"mixlora.layers.\1.\2.", key)

    def routers(self) -> list[nn.Module]:
        """What gives the logits of each mixture, fp32 [tokens, experts], in module order."""
        blocks = (module for module in self.model.modules() if isinstance(module, MixLoraBlock))
        return [block.mixlora_router[self.active_adapters[0]] for block in blocks]

    def router_loss(self, logits: Sequence[Tensor], attention_mask: Tensor | None) -> Tensor:
        """The load balance of all tokens, fp32 []: N sum_i F_i P_i with F_i the share of choices and P_i the mean probability
        of expert i, over all layers together as the authors compute it.

        logits: of each router, [tokens, experts]. attention_mask: [tokens]; 0: padding, which counts for nothing.
        """
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        config = self.peft_config[self.active_adapters[0]]
        if not config.router_loss or not config.router_aux_loss_coef:
            return torch.zeros(())
        mask = None if attention_mask is None else attention_mask[None]
        return config.router_aux_loss_coef * load_balancing_loss_func(
            tuple(logits), config.num_experts, config.top_k, mask
        )


def _is_attention(name: str) -> bool:
    return "attn" in name.lower() or "attention" in name.lower()
