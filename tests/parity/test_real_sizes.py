"""Layers as large as real ones on two threads, for which libraries choose other kernels: the bits of a plain loop."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tiny_models import VOCAB, assert_same_bits, make_config, reference_run, streamed_run, token_data

SIZES = {"135M": (576, 1536, 9, 3), "1.1B": (2048, 5632, 32, 4)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, stored, computed, threads",
    [
        ("135M", "float32", "float32", 2), ("135M", "bfloat16", "bfloat16", 1), ("135M", "bfloat16", "bfloat16", 2),
        ("135M", "bfloat16", "float32", 2), ("1.1B", "bfloat16", "bfloat16", 2),
    ],
)  # fmt: skip
def test_adapters(size, stored, computed, threads, tmp_path):
    hidden, intermediate, heads, kv_heads = SIZES[size]
    torch.manual_seed(0)
    shape = tf.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=512,
    )  # fmt: skip
    tf.LlamaForCausalLM(shape).to(getattr(torch, stored)).save_pretrained(tmp_path / "model")
    config = make_config(
        tmp_path / "model", token_data(tmp_path / "tokens", 7, 40, 200), tmp_path / "out",
        engine={"dtype": computed, "num_threads": threads, "resident_blocks": 1}, dataset={"sequence_length": 224},
        training={"max_steps": 2},
    )  # fmt: skip
    assert_same_bits(streamed_run(config), reference_run(config))
