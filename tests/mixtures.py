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

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_ROUTED = {"num_experts": 5, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
_GROUPED = {
    "moe_intermediate_size": 24, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 14, "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10, "v_head_dim": 8,
}  # fmt: skip

MORE: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(**TEXT, **_HEADS, **IDS, **SHARED, **_ROUTED),
    "deepseek-v2": lambda: tf.DeepseekV2Config(**TEXT, **IDS, **_LATENT, **_GROUPED),
    "glm4-moe-lite": lambda: tf.Glm4MoeLiteConfig(**TEXT, **IDS, **_LATENT, **_GROUPED),
    "dots1": lambda: tf.Dots1Config(**TEXT, **HEADS, **IDS, **_GROUPED),
    "ernie4.5-moe": lambda: tf.Ernie4_5_MoeConfig(
        **TEXT, **_HEADS, **IDS, moe_intermediate_size=24, moe_num_experts=6, moe_k=2, moe_num_shared_experts=1,
        moe_layer_start_index=1, moe_layer_end_index=2,
    ),
    "phimoe": lambda: tf.PhimoeConfig(**TEXT, **_HEADS, **IDS, **_LOCAL),
    "jamba": lambda: tf.JambaConfig(
        **TEXT, **_HEADS, **IDS, **_ROUTED, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_d_conv=2, use_mamba_kernels=False,
    ),
    "hunyuan-moe": lambda: tf.HunYuanMoEV1Config(**TEXT, **HEADS, **IDS, num_experts=5, moe_topk=2),
    "lfm2-moe": lambda: tf.Lfm2MoeConfig(
        **TEXT, **_HEADS, **IDS, **_ROUTED, moe_intermediate_size=24, num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv"], conv_L_cache=3,
    ),
    "minimax-m2": lambda: tf.MiniMaxM2Config(**TEXT, **HEADS, **IDS, **_LOCAL),
    "flex-olmo": lambda: tf.FlexOlmoConfig(**TEXT, **_HEADS, **IDS, **_ROUTED),
    "granite-moe-shared": lambda: tf.GraniteMoeSharedConfig(**TEXT, **_HEADS, **IDS, **_LOCAL, shared_intermediate_size=16),
    "granite-moe-hybrid": lambda: tf.GraniteMoeHybridConfig(
        **TEXT, **_HEADS, **IDS, **_LOCAL, shared_intermediate_size=16, layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=4, mamba_d_head=20, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8,
    ),
    "afmoe": lambda: tf.AfmoeConfig(
        **TEXT, **HEADS, **IDS, **_ROUTED, moe_intermediate_size=24, num_dense_layers=1, num_shared_experts=1, n_group=1,
        topk_group=1, sliding_window=8,
    ),
    "nemotron-h": lambda: tf.NemotronHConfig(
        vocab_size=TEXT["vocab_size"], hidden_size=40, intermediate_size=56, hybrid_override_pattern="ME*",
        num_hidden_layers=3, **HEADS, **IDS, mamba_num_heads=4, mamba_head_dim=20, ssm_state_size=8, n_groups=1, chunk_size=8,
        n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=16, n_group=1,
        topk_group=1,
    ),
    "exaone-moe": lambda: tf.ExaoneMoeConfig(
        **TEXT, **HEADS, **IDS, **_ROUTED, moe_intermediate_size=24, num_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=1, sliding_window=8,
    ),
}  # fmt: skip
