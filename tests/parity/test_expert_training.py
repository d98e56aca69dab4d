"""Experts that are trained one matrix at a time: the bits of a plain loop over Transformers' stacked parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from mixtures import MIXTURES
from test_weight_training import (  # noqa: F401  fixtures
    assert_same,
    reference,
    roots_that_kernels_have,
    small_pieces,
    streamed,
    weights_config,
)
from tiny_models import CONFIGS, IDS, TEXT, aligned_copies, keep_at_most

from finetune import Trainer
from finetune.memory.plan import PlanRefused
from finetune.offload.sizing.needs import GRAPHS, HOST_BLOCKS, STATE
from finetune.offload.update.store import read_manifest
from finetune.offload.update.stored_tiers import StoredExperts
from finetune.session import Session

PLACES = {
    "one slot": {"expert_slots": 1, "resident_blocks": 0, "lookahead": 0, "activations": "disk"},
    "a few": {"expert_slots": 3, "resident_blocks": 1},
    "all": {},
}


@pytest.fixture
def mixture(checkpoint, monkeypatch) -> Callable[..., Path]:
    """The tiny checkpoint of a name and stored dtype, and other sizes."""
    aligned_copies(monkeypatch)

    def get(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Path:
        kind = f"{name} {sizes}"
        monkeypatch.setitem(CONFIGS, kind, lambda: MIXTURES[name](**sizes))
        return checkpoint(kind, dtype)

    return get


@pytest.fixture
def fetched(monkeypatch) -> list[int]:
    """Numbers of the matrices that were read from disk."""
    units: list[int] = []
    extents = StoredExperts._extents
    monkeypatch.setattr(StoredExperts, "_extents", lambda tier, unit, lease: units.append(unit) or extents(tier, unit, lease))
    return units


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "name, device, dtype, clipping",
    [
        ("mixtral", "cpu", "float32", "previous"), ("qwen3-moe", "simulated", "float32", "exact"),
        ("gpt-oss", "cpu", "bfloat16", "exact"), ("olmoe", "simulated", "bfloat16", "previous"),
    ],
)  # fmt: skip
def test_steps_are_those_of_the_plain_loop(name, device, dtype, clipping, mixture, tokens, tmp_path, fetched):
    """With the loss of routers and three micro-batches, under a norm that clips."""

    def config(output: str, engine: dict[str, Any]) -> Any:
        return weights_config(
            mixture(name, getattr(torch, dtype)), tokens, tmp_path / output, device=device, engine={"dtype": dtype} | engine,
            training={"router_loss": "micro_batch", "router_loss_coefficient": 0.3, "max_grad_norm": 0.2},
            optimizer={"clipping": clipping},
        )  # fmt: skip

    expected = reference(config("plain", {}))
    assert len(set(expected[0])) == 4
    for place, engine in PLACES.items():
        fetched.clear()
        found = config(place, engine)
        assert_same(streamed(found, tmp_path / f"{place} exported"), expected)
        assert fetched and (len(fetched) > len(set(fetched)) or place == "all")


MANY = {"num_experts": 61, "num_experts_per_tok": 1}


def stored(config: Any) -> dict[str, dict[int, set[int]]]:
    """What the store has of experts: stack -> expert -> how often its pieces have been updated."""
    found: dict[str, dict[int, set[int]]] = {}
    for name, _, *piece in read_manifest(config.output / "store")["pieces"]:
        stack, bracket, expert = name.partition("[")
        if bracket:
            found.setdefault(stack, {}).setdefault(int(expert[:-1]), set()).add(piece[-1])
    return found


@pytest.mark.parametrize(
    "dtype, method", [("bfloat16", "full"), ("float32", "lisa"), ("float32", "slimfit"), ("bfloat16", "frugal")]
)
def test_experts_that_nothing_can_change_are_left_alone(dtype, method, mixture, tokens, tmp_path, monkeypatch):
    """Without decay: an expert that gets its first tokens late begins with the count of its stack."""
    keep_at_most(2, monkeypatch)
    config = weights_config(
        mixture("olmoe", getattr(torch, dtype), **MANY), tokens, tmp_path / "out", method,
        engine={"dtype": dtype, "expert_slots": 2}, training={"weight_decay": 0.0, "max_grad_norm": None, "max_steps": 6},
        **({} if method == "full" else {"selection": {"interval": 2}}),
    )  # fmt: skip
    expected = reference(config)
    assert_same(streamed(config, tmp_path / "model"), expected)
    found = stored(config)
    assert len(found) == 6
    used = [len(of_stack) for of_stack in found.values()]
    if method == "slimfit":  # which asks how large weights are, too
        assert used == [61] * 6
    else:
        assert all(1 < count < 61 for count in used)
    if method == "full":
        assert all(updates == {6} for of_stack in found.values() for updates in of_stack.values())


@pytest.mark.parametrize(
    "train", [["experts"], [r"layers\.1\..*down_proj", "lm_head"], ["self_attn", "norm"]], ids=["experts", "a stack", "trunks"]
)
def test_only_what_matches_is_trained(train, mixture, tokens, tmp_path, monkeypatch):
    config = weights_config(
        mixture("mixtral"), tokens, tmp_path / "out", training={"max_grad_norm": None, "weight_decay": 0.1},
        engine={"expert_slots": 2}, train=train,
    )  # fmt: skip
    assert_same(streamed(config, tmp_path / "model"), reference(config))
    assert all(re.search(train[0], f"{name}[") for name in stored(config))


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_blocks_experts_may_be_larger_than_the_memory_that_is_allowed(
    device, checkpoint, tokens, tmp_path, monkeypatch
):
    """One expert at a time: weights, gradients and state."""
    sizes = TEXT | IDS | {"num_experts": 64, "num_experts_per_tok": 4, "hidden_size": 224, "intermediate_size": 208}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    aligned_copies(monkeypatch)
    monkeypatch.setitem(CONFIGS, "larger", lambda: tf.OlmoeConfig(**sizes))
    model = checkpoint("larger")

    def config(output: str, **changes: Any) -> Any:
        engine = {"resident_blocks": 0, "lookahead": 0}
        training = {"max_steps": 2, "weight_decay": 0.1}
        return weights_config(model, tokens, tmp_path / output, engine=engine, device=device, training=training, **changes)

    with pytest.raises(PlanRefused) as refused:
        Trainer(config("refused", host_memory="64MiB")).train()
    allowed = {"host_memory": f"{-(-refused.value.smallest_bytes >> 20) + 6}MiB"}
    plans, open_session = [], Session.open
    monkeypatch.setattr(Session, "open", lambda *args: plans.append(args[1].plan) or open_session(*args))
    found, (plan,) = streamed(config("out", **allowed), tmp_path / "model"), plans
    experts, matrix = 64 * 3 * 224 * 208 * 4, 2 * 224 * 208 * 4
    of_process = ("process", "margin", "disk staging", "kernels", "workspaces")
    parts = [*plan.host_parts.items(), *plan.device_parts.items()]
    assert sum(size for name, size in parts if not name.startswith(of_process)) < experts
    trunk = plan.slots[HOST_BLOCKS].slot_bytes
    assert max(slots.slot_bytes for name, slots in plan.slots.items() if name not in (STATE, GRAPHS)) <= max(trunk, 4 * matrix)
    if device == "cpu":
        assert json.loads((tmp_path / "out" / "report.json").read_text())["arena"]["overflow_peak_bytes"] == 0
    assert_same(found, reference(config("plain")))
