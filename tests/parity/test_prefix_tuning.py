"""Zeroth-order tuning of a prefix, streamed, against PEFT's own model in memory, with NumPy's noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_perturbations import PLACEMENTS, PlainMezo, zo_config, zo_run
from tiny_models import aligned_copies

import finetune.offload.weights.parts

ZO = {"parameters": "prefix", "prefix_tokens": 4, "epsilon": 0.1, "perturbations": 2}


class PlainPrefix(PlainMezo):
    """PEFT's model, whose prefix begins as the keys and values that the plain model makes of random tokens."""

    def __init__(self, config) -> None:
        self.config, self.zo = config, config.zo
        torch.set_num_threads(config.engine.num_threads)
        plain = tf.AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, config.engine.dtype)).eval()
        count = config.zo.prefix_tokens
        generator = torch.Generator().manual_seed(config.training.seed)
        ids = torch.randint(plain.config.vocab_size, (1, count), generator=generator)
        with torch.no_grad():
            cache = plain(ids, use_cache=True).past_key_values
        self.model = get_peft_model(plain, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count)).eval()
        self.named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        assert list(self.named) == ["prompt_encoder.default.embedding.weight"]
        rows = [
            torch.cat([x[0, :, t].flatten() for layer in cache.layers for x in (layer.keys, layer.values)])
            for t in range(count)
        ]
        self.values = {name: torch.stack(rows).float().flatten() for name in self.named}
        self.group, self.losses = [], []


@pytest.mark.every(5)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "device"),
    [(name, "cpu") for name in ("llama", "llama-tied", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "mixtral")]
    + [("llama", "simulated"), ("gemma2", "simulated")],
)
def test_architectures(name, device, dtype, checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    if name == "mixtral" and dtype == "float32":
        aligned_copies(monkeypatch)
    config = zo_config(
        checkpoint(name, getattr(torch, dtype)), tokens, tmp_path / "out", ZO, device=device,
        engine={"dtype": dtype, **PLACEMENTS[1]},
    )  # fmt: skip
    plain = PlainPrefix(config).run()
    assert zo_run(config) == plain.losses
    found = load_file(config.output / "adapter" / "adapter_model.safetensors")
    assert list(found) == ["prompt_embeddings"]
    ((name, expected),) = ((n, plain.up_to_date(n)) for n in plain.named)
    assert found["prompt_embeddings"].flatten().equal(expected)
    assert not np.allclose(expected, plain.values[name])
