"""Tiny random mixtures of experts of many architectures."""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf
from tiny_models import HEADS, IDS, TEXT

LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
SHARED = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}
DEEPSEEK = {
    "vocab_size": TEXT["vocab_size"], "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3,
    "moe_intermediate_size": 24, "num_attention_heads": 4, "n_shared_experts": 1, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "num_mtp_layers": 0,
}  # fmt: skip

MIXTURES: dict[str, Callable[..., tf.PreTrainedConfig]] = {
    "mixtral": lambda **o: tf.MixtralConfig(**TEXT, **HEADS, **IDS, num_local_experts=5, num_experts_per_tok=2, **o),
    "gpt-oss": lambda **o: tf.GptOssConfig(
        **TEXT, **HEADS, **IDS, num_local_experts=5, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], **o,
    ),
    "qwen3-moe": lambda **o: tf.Qwen3MoeConfig(
        **TEXT, **HEADS, **IDS, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, mlp_only_layers=[1], **o
    ),
    "qwen3-next": lambda **o: tf.Qwen3NextConfig(
        **TEXT, **HEADS, **IDS, **SHARED, **LINEAR_ATTENTION, num_experts=6, num_experts_per_tok=3, **o
    ),
    "qwen3.5-moe": lambda **o: tf.Qwen3_5MoeTextConfig(
        **{k: v for k, v in TEXT.items() if k != "intermediate_size"}, **HEADS, **IDS, **SHARED, **LINEAR_ATTENTION,
        num_experts=6, num_experts_per_tok=3, **o,
    ),
    "deepseek-v3": lambda **o: tf.DeepseekV3Config(
        **DEEPSEEK, **IDS, kv_lora_rank=10, q_lora_rank=14, qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=8, **o
    ),
    "glm4-moe": lambda **o: tf.Glm4MoeConfig(**DEEPSEEK, **IDS, num_key_value_heads=2, head_dim=12, use_qk_norm=True, **o),
    "llama4": lambda **o: tf.Llama4TextConfig(
        **TEXT, **HEADS, **IDS, num_local_experts=5, intermediate_size_mlp=48, attention_chunk_size=8,
        interleave_moe_layer_step=2, no_rope_layers=[1, 1, 0], **o,
    ),
    "olmoe": lambda **o: tf.OlmoeConfig(
        **TEXT, **IDS, num_attention_heads=4, num_key_value_heads=2, **{"num_experts": 6, "num_experts_per_tok": 3} | o
    ),
    "granite-moe": lambda **o: tf.GraniteMoeConfig(
        **TEXT, **IDS, num_attention_heads=4, num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2,
        embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.7, attention_multiplier=0.2, **o,
    ),
    "minimax": lambda **o: tf.MiniMaxConfig(
        **TEXT, **HEADS, **IDS, num_local_experts=5, num_experts_per_tok=2, block_size=8, **o
    ),
}  # fmt: skip

WITHOUT_ROUTER_LOSS = {"deepseek-v3", "glm4-moe", "llama4"}
"""Those whose own forward adds none."""
