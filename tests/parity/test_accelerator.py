"""On a real accelerator: the bits of a plain loop that computes there with everything resident."""

from __future__ import annotations

import pytest
import test_perturbations as perturbations
import test_weight_training as weights
import torch
from packed_checkpoints import write_packed
from test_weight_training import roots_that_kernels_have, small_pieces  # noqa: F401  fixtures
from tiny_models import assert_same_bits, make_config, reference_run, streamed_run

import finetune.offload.weights.binding

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")

PLACEMENTS = [
    {"resident_blocks": 0, "lookahead": 0, "activations": "disk"},
    {"resident_blocks": 0, "lookahead": 2, "io_backend": "threads"},
    {"resident_blocks": 2, "lookahead": 1},
    {"resident_blocks": 5},
    {},
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """Kernels whose sums have an order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", PLACEMENTS, ids=str)
def test_adapters(engine, dtype, checkpoint, tokens, tmp_path, spill_everything):
    config = make_config(
        checkpoint("llama", getattr(torch, dtype)), tokens, tmp_path / "out", device="auto", engine={"dtype": dtype, **engine}
    )
    assert_same_bits(streamed_run(config), reference_run(config))


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "opt-layerdrop", "mixtral", "vit"])
def test_adapters_of_other_architectures(name, checkpoint, tokens, images, tmp_path):
    config = make_config(
        checkpoint(name), images if name == "vit" else tokens, tmp_path / "out", device="auto", engine=PLACEMENTS[1],
        lora={"dropout": 0.0 if name == "mixtral" else 0.1},
    )  # fmt: skip
    assert_same_bits(streamed_run(config), reference_run(config))


@pytest.mark.parametrize("kind, nested", [("nf4", True), ("fp4", False), ("int8", False)])
@pytest.mark.parametrize("engine", [PLACEMENTS[0], PLACEMENTS[2]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_over_packed_weights(kind, nested, engine, dtype, checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    packed, decoded = write_packed(checkpoint("llama", getattr(torch, dtype)), tmp_path, kind, nested)
    expected = reference_run(make_config(decoded, tokens, tmp_path / "plain", device="auto", engine={"dtype": dtype}))
    found = streamed_run(make_config(packed, tokens, tmp_path / "out", device="auto", engine={"dtype": dtype, **engine}))
    assert_same_bits(found, expected)


@pytest.mark.parametrize("clipping", ["previous", "exact"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("engine", PLACEMENTS, ids=str)
def test_weights(engine, name, clipping, checkpoint, tokens, tmp_path):
    config = weights.weights_config(
        checkpoint(name, torch.bfloat16), tokens, tmp_path / "out", device="auto", engine={"dtype": "bfloat16", **engine},
        optimizer={"clipping": clipping}, training={"micro_batch_size": 5 if name == "gemma2" else 2},
    )  # fmt: skip
    weights.assert_same(weights.streamed(config, tmp_path / "model"), weights.reference(config))


@pytest.mark.parametrize("method", ["lisa", "badam", "slimfit", "frugal"])
def test_selected_blocks(method, checkpoint, tokens, tmp_path):
    config = weights.weights_config(
        checkpoint("llama", torch.bfloat16), tokens, tmp_path / "out", method, device="auto",
        engine={"dtype": "bfloat16", "resident_blocks": 1, "lookahead": 1},
        training={"max_steps": 9, "max_grad_norm": None}, selection={"interval": 2},
    )  # fmt: skip
    weights.assert_same(weights.streamed(config, tmp_path / "model"), weights.reference(config))


@pytest.mark.parametrize("parameters", ["all", "lora"])
@pytest.mark.parametrize("engine", PLACEMENTS[1:4], ids=str)
@pytest.mark.parametrize("noise", ["rademacher", "gaussian", "low_rank"])
def test_perturbations(noise, engine, parameters, checkpoint, tokens, tmp_path):
    if parameters == "lora" and noise == "low_rank":
        pytest.skip("adapters are of low rank already")
    config = perturbations.zo_config(
        checkpoint("llama", torch.bfloat16), tokens, tmp_path / "out", {"noise": noise, "parameters": parameters},
        device="auto", engine={"dtype": "bfloat16", **engine}, lora={"dropout": 0.0}, training={"max_steps": 9},
    )  # fmt: skip
    plain = perturbations.PlainMezo(config).run()
    assert perturbations.zo_run(config) == plain.losses
    if parameters == "all":
        perturbations.assert_exported(config, plain, tmp_path / "tuned")
