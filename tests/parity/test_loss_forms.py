"""Forms of the loss and noise in embeddings: three steps with the bits of a plain PEFT loop, formulas against Transformers',
gradients through a head in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_head import Case, Chunks, soft_cap
from test_perturbations import zo_config, zo_run
from tiny_models import assert_same_bits, make_config, reference_run, streamed_run
from torch.nn import functional
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_pt_utils import LabelSmoother

import finetune.offload.weights.parts
from finetune.config import Config, ConfigError
from finetune.memory.errors import UserError
from finetune.offload.step.head import TiledHead
from finetune.offload.step.loss_form import LossForm, StepForm
from finetune.trainer import Trainer

IGNORED = -100


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def plain_form(
    logits: torch.Tensor, labels: torch.Tensor, all_labels: list[torch.Tensor], smoothing: float, z: float, sequences: bool
) -> torch.Tensor:
    """A micro-batch's part of the loss of the step; texts are rows."""
    targets, logits = shifted(labels), logits.float()
    flat, y = logits.flatten(0, 1), targets.flatten()
    if not z and not sequences:
        loss = functional.cross_entropy(flat, y, reduction="sum", label_smoothing=smoothing)
    else:
        each = functional.cross_entropy(flat, y, reduction="none", label_smoothing=smoothing)
        if z:
            each = each + z * torch.where(y == IGNORED, 0.0, torch.logsumexp(flat, dim=-1) ** 2)
        if sequences:
            counts = (targets != IGNORED).sum(dim=1, keepdim=True)
            each = each * torch.where(targets == IGNORED, 0.0, 1 / counts.clamp(min=1)).flatten()
        loss = each.sum()
    trained = [shifted(y) != IGNORED for y in all_labels]
    return loss / sum(int((y.any(dim=1) if sequences else y).sum()) for y in trained)


FORMS = {
    "smoothed": ("llama", {"label_smoothing_factor": 0.1}, (0.1, 0.0, False)),
    "all": ("gemma2", {"label_smoothing_factor": 0.2, "z_loss": 1e-2, "loss_average": "sequence"}, (0.2, 1e-2, True)),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_form_has_the_bits_of_a_plain_loop(case, checkpoint, tokens, tmp_path):
    name, options, form = FORMS[case]
    config = make_config(checkpoint(name), tokens, tmp_path / "out", training={"max_steps": 3, **options})
    found = streamed_run(config)
    expected = reference_run(config, lane_loss=lambda *lane: plain_form(*lane, *form))
    assert_same_bits(found, expected)


def make_noisy(model: Any) -> None:
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)


def test_noise_in_embeddings_is_transformers_own(checkpoint, tokens, tmp_path, monkeypatch):
    """With dropout behind it, an adapter of the table, and micro-batches that wait on disk."""
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    config = make_config(
        checkpoint("llama"), tokens, tmp_path / "out", lora={"target_modules": ["embed_tokens", "q_proj"]},
        training={"max_steps": 3, "neftune_noise_alpha": 5.0}, engine={"hidden_states": "disk"},
    )  # fmt: skip
    found, expected = streamed_run(config), reference_run(config, prepare=make_noisy)
    assert_same_bits(found, expected)
    assert found.losses != reference_run(config).losses


def test_method_zo_has_forms_too(checkpoint, tokens, tmp_path):
    """Its first loss is the mean of two that differ by little from that of the weights as they are."""
    options = {"max_steps": 1, "label_smoothing_factor": 0.3, "z_loss": 1e-2, "loss_average": "sequence"}
    config = zo_config(checkpoint("llama"), tokens, tmp_path / "out", {"epsilon": 1e-6}, training=options)
    expected = reference_run(
        make_config(checkpoint("llama"), tokens, tmp_path, training={"max_steps": 1}, lora={"dropout": 0.0}),
        lane_loss=lambda *lane: plain_form(*lane, 0.3, 1e-2, True),
    )
    assert zo_run(config)[0] == pytest.approx(expected.losses[0], rel=1e-5)


@pytest.mark.parametrize("operation", [lambda x: x, soft_cap])
def test_gradients_through_a_head_in_chunks(operation):
    """Hidden states' and the head's own, against autograd over whole logits; the smoothed part is Transformers' formula."""
    case, form = Case(), LossForm(0.2, 1e-2)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.rand(int((y[:, 1:] != IGNORED).sum()), generator=generator) for y in case.labels]
    losses = {}
    for tile_tokens, tile_vocab in ((64, 101), (4, 30)):
        chunks = Chunks(case.head, tile_vocab, trained=tile_vocab < 101)
        outer = [hidden.clone().requires_grad_() for hidden in case.hidden]
        tiled = TiledHead(case.head, chunks, len(chunks.starts), tile_tokens)
        formed = StepForm(form, weights, 7.0).applied(case.deferred(outer, operation))
        losses[tile_vocab] = tiled.loss_and_backward(formed).item(), [h.grad for h in outer]
        del case.head.forward
    head = case.head.weight.detach().clone().requires_grad_()
    total, grads = torch.zeros(()), []
    for hidden, labels, weight in zip(case.hidden, case.labels, weights, strict=True):
        hidden = hidden.clone().requires_grad_()
        grads.append(hidden)
        logits, targets = operation(functional.linear(hidden, head))[:, :-1], labels[:, 1:]
        for x, y, w in zip(logits[targets != IGNORED], targets[targets != IGNORED], weight, strict=True):
            smoothed = LabelSmoother(0.2)({"logits": x[None]}, y[None])
            total = total + w * (smoothed + 1e-2 * torch.logsumexp(x, dim=-1) ** 2) / 7
    total.backward()
    for loss, found in losses.values():
        assert loss == pytest.approx(total.item(), rel=1e-5)
        for ours, theirs in zip(found, grads, strict=True):
            expected = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    ours = torch.cat([chunks.gradients[i][0] for i in range(len(chunks.starts))])
    torch.testing.assert_close(ours, head.grad, rtol=1e-4, atol=1e-6)


def test_what_has_no_such_form_is_refused(checkpoint, images, tmp_path):
    for options, words in [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha|expected a method with gradients, found zo"),
        ({"neftune_noise_alpha": 0}, "neftune_noise_alpha: expected a number greater than 0"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Config(model="m", method="zo" if options["neftune_noise_alpha"] else "lora", training=options)
    with pytest.raises(ConfigError, match="training.z_loss: expected only with objective loss, found another objective"):
        Config(model="m", training={"objective": "dpo", "z_loss": 1e-4})
    config = make_config(checkpoint("vit"), images, tmp_path / "out", training={"label_smoothing_factor": 0.1})
    with pytest.raises(UserError, match="expected their defaults, because ViTForImageClassification computes its loss itself"):
        Trainer(config).train()
