"""Tiny mixtures of experts whose experts are packed one by one, in every format in which such are published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import transformers as tf
from grouped_checkpoints import Awq, Gptq, write_grouped
from packed_bases import BASES, write
from packed_checkpoints import write_packed
from tiny_models import HEADS, IDS, TEXT

MODELS = {
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(
        **TEXT, **HEADS, **IDS, num_experts=5, moe_intermediate_size=24, num_experts_per_tok=2, mlp_only_layers=[1]
    ),
    "mixtral": lambda: tf.MixtralConfig(**TEXT, **HEADS, **IDS, num_local_experts=5, num_experts_per_tok=2),
    # A shared expert, and a first block without experts.
    "deepseek-v3": lambda: tf.DeepseekV3Config(
        **TEXT, **IDS, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=24, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    ),
}  # fmt: skip
ENDS = ("proj.weight", "w1.weight", "w2.weight", "w3.weight")

KINDS: dict[str, Callable[[Path, Path], tuple[Path, Path]]] = {
    "nf4": lambda model, folder: write_packed(model, folder, "nf4", nested=True, ends=ENDS),
    "fp4": lambda model, folder: write_packed(model, folder, "fp4", ends=ENDS),
    "llm.int8": lambda model, folder: write_packed(model, folder, "int8", ends=ENDS),
    "gptq": lambda model, folder: write_grouped(model, folder, Gptq(act_order=True), ENDS),
    "gptq, 8 bits": lambda model, folder: write_grouped(model, folder, Gptq(bits=8, has_groups=False), ENDS),
    "awq": lambda model, folder: write_grouped(model, folder, Awq(), ENDS),
    **{kind: lambda model, folder, base=base: write(base, model, folder, ENDS) for kind, base in BASES.items()},
}
"""Packs a tiny checkpoint: as `write_packed`."""
