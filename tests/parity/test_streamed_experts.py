"""Experts that are fetched one by one: the bits of the plain loop, wherever they lie."""

from __future__ import annotations

from functools import partial

import pytest
import transformers as tf
from tiny_models import CONFIGS, HEADS, IDS, TEXT, assert_same_bits, make_config, reference_run, streamed_run

from finetune.offload.residency.expert_tiers import HostExperts

SPARSE = {**TEXT, "num_hidden_layers": 3} | HEADS | IDS
WITHOUT_HEAD_DIM = {key: value for key, value in SPARSE.items() if key != "head_dim"}
KINDS = {
    "qwen3-moe": partial(
        tf.Qwen3MoeConfig, **SPARSE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1]
    ),
    "mixtral": partial(tf.MixtralConfig, **SPARSE, num_local_experts=5, num_experts_per_tok=2),
    "olmoe": partial(tf.OlmoeConfig, **WITHOUT_HEAD_DIM, num_experts=6, num_experts_per_tok=3),
    "gpt-oss": partial(
        tf.GptOssConfig, **SPARSE | {"num_hidden_layers": 2}, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
}
PLACES = [
    {"expert_slots": 1, "resident_blocks": 0, "lookahead": 0},
    {"expert_slots": 2, "resident_blocks": 1},
    {"expert_slots": 7, "resident_blocks": 0},
    {},
]
TRUNK = {"target_modules": ["q_proj", "o_proj"], "dropout": 0.0}
EXPERTS = {
    "target_modules": ["q_proj"],
    "dropout": 0.0,
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


@pytest.fixture(autouse=True)
def kinds(monkeypatch) -> None:
    for name, make in KINDS.items():
        monkeypatch.setitem(CONFIGS, name, make)


@pytest.fixture
def fetched(monkeypatch) -> list[int]:
    """Units that have been fetched from disk."""
    units: list[int] = []
    extents = HostExperts._extents
    monkeypatch.setattr(HostExperts, "_extents", lambda tier, unit, lease: units.append(unit) or extents(tier, unit, lease))
    return units


@pytest.mark.parametrize(  # every pair of two of them
    "name, device, adapted",
    [
        ("qwen3-moe", "cpu", "trunk"), ("qwen3-moe", "simulated", "experts"), ("mixtral", "cpu", "experts"),
        ("mixtral", "simulated", "trunk"), ("olmoe", "cpu", "trunk"), ("olmoe", "simulated", "experts"),
        ("gpt-oss", "cpu", "experts"), ("gpt-oss", "simulated", "trunk"),
    ],
)  # fmt: skip
def test_steps_are_those_of_the_plain_loop(name, device, adapted, checkpoint, tokens, tmp_path, fetched):
    lora = {"trunk": TRUNK, "experts": EXPERTS}[adapted]
    config = make_config(checkpoint(name), tokens, tmp_path / "plain", lora=lora, training={"max_steps": 2})
    expected = reference_run(config)
    for number, engine in enumerate(PLACES):
        fetched.clear()
        place = make_config(
            checkpoint(name), tokens, tmp_path / str(number), lora=lora, training={"max_steps": 2}, engine=engine, device=device
        )
        assert_same_bits(streamed_run(place), expected)
        assert len(fetched) > len(set(fetched)) or not engine.get("expert_slots")
