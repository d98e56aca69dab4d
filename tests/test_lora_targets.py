"""What "all-linear" means: PEFT's own list, less what cannot have an adapter, and less routed experts by default."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from finetune.adapters.lora import attach
from finetune.adapters.lora_options import key_of
from finetune.memory.errors import UserError

SHAPE = {
    "vocab_size": 101, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {key: SHAPE[key] for key in SHAPE if key.endswith("_id") or key in ("vocab_size", "hidden_size", "num_hidden_layers")}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
MODELS = {
    "llama": lambda: tf.LlamaConfig(**SHAPE),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SHAPE, head_dim=10, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0]
    ),
    "llama4": lambda: tf.Llama4TextConfig(
        **SHAPE, head_dim=10, num_local_experts=4, intermediate_size_mlp=56, attention_chunk_size=8, interleave_moe_layer_step=2
    ),
    "gpt_oss": lambda: tf.GptOssConfig(**SHAPE, head_dim=10, num_local_experts=4),
    "mamba": lambda: tf.MambaConfig(**SMALL, state_size=8, time_step_rank=4),
}
EXPECTED = {
    "llama": (ATTENTION | MLP, None),
    "qwen3_moe": (ATTENTION, "gate_up_proj, down_proj (stacked routed experts are most of the model"),
    "gpt_oss": (ATTENTION, "--set 'lora.target_parameters=[experts.down_proj, experts.gate_up_proj]' takes them too"),
    "llama4": (ATTENTION | MLP, "takes them too); router (it returns more than one tensor)"),
    "mamba": ({"in_proj", "x_proj", "dt_proj"}, "out_proj (PEFT forbids it on mamba)"),
}


def make(name: str) -> Any:
    torch.manual_seed(7)
    return tf.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32)


def adapted(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if getattr(module, "lora_A", None)}


@pytest.mark.parametrize("name", MODELS)
def test_the_default_trains_what_can_be_trained(name):
    model, targets = attach(make(name), {"r": 2, "target_modules": "all-linear"}, seed=1, experts=False)
    modules, said = EXPECTED[name]
    assert adapted(model) == modules
    if said is None:
        assert targets.note is None and targets.modules == "all-linear"
    else:
        assert targets.note.startswith("note: adapters are on ") and said in targets.note
    model(input_ids=torch.arange(3, 14)[None], use_cache=False).logits.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_typed_it_means_what_peft_means(name):
    """Routed experts too, with the same numbers."""
    model, targets = attach(make(name), {"r": 2, "target_modules": "all-linear"}, seed=1)
    plain = make(name)
    torch.manual_seed(1)
    plain = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    assert targets.note is None
    found, expected = model.state_dict(), plain.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_that_are_named_are_all_that_is_added(name):
    """Where PEFT would take its own word for routers too, and for twice the rank."""
    arguments = {"r": 2, "target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model, _ = attach(make(name), arguments, seed=1, experts=False)
    parameters = ((name.partition("layers.1.")[2], p.shape) for name, p in model.named_parameters() if "lora_A" in name)
    found = {name: shape for name, shape in parameters if name}
    assert {name for name in found if "self_attn" not in name} == {
        "mlp.experts.base_layer.lora_A.default.weight", "mlp.experts.lora_A.default.weight",
    }  # fmt: skip
    assert found["mlp.experts.base_layer.lora_A.default.weight"] == (4 * 2, 40)


def test_experts_that_all_linear_does_not_reach_are_said():
    """PEFT knows only some models' experts from before they were stacked."""
    model, targets = attach(make("gpt_oss"), {"r": 2, "target_modules": "all-linear"}, seed=1)
    assert adapted(model) == ATTENTION and "gate_up_proj, down_proj (stacked routed experts" in targets.note


WRONG_PARAMETERS = {
    "none": ("gpt_oss", {"target_parameters": ["experts.w1"]}, "none ends in 'experts.w1'"),
    "a linear layer's": ("gpt_oss", {"target_parameters": ["q_proj.weight"]}, "list those in lora.target_modules by their"),
    "an embedding": ("gpt_oss", {"target_parameters": ["embed_tokens.weight"]}, "list those in lora.target_modules by their"),
    "a vector": ("gpt_oss", {"target_parameters": ["input_layernorm.weight"]}, "only 2d and 3d are supported"),
    "a router that returns two tensors": ("llama4", {"target_modules": ["router"]}, "router returns more than one tensor"),
    "half of what is stacked": ("qwen3_moe", {"target_modules": ["up_proj"]}, "without also targeting gate_proj"),
    "nothing": ("llama", {"target_modules": []}, "No `target_modules` passed"),
}


@pytest.mark.parametrize("case", WRONG_PARAMETERS)
def test_parameters_that_cannot_have_an_adapter_are_refused(case):
    name, arguments, words = WRONG_PARAMETERS[case]
    with pytest.raises(UserError, match=re.escape(words)):
        attach(make(name), {"r": 2, "target_modules": [], **arguments}, seed=1)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"fan_in_fan_out": True},
        {"init_lora_weights": "orthogonal"}, {"velora_config": {"num_groups": 4}},
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("targets", [{"target_parameters": ["experts.down_proj"]}, {"target_modules": "all-linear"}])
def test_options_that_peft_has_for_layers_alone_are_refused(options, targets):
    (option,) = options
    with pytest.raises(UserError, match=rf"^{re.escape(key_of(option))}=.* not for adapters of stacked parameters"):
        attach(make("qwen3_moe"), {"r": 2, "target_modules": ["q_proj"]} | targets | options, seed=1)
