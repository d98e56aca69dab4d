"""What "all-linear" means: PEFT's own list, less what cannot have an adapter, and less routed experts by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from finetune.adapters.lora import attach

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
    "mamba": lambda: tf.MambaConfig(**SMALL, state_size=8, time_step_rank=4),
}
EXPECTED = {
    "llama": (ATTENTION | MLP, None),
    "qwen3_moe": (ATTENTION, "routed experts"),
    "llama4": (ATTENTION | MLP, "router (it returns more than one tensor)"),
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
