"""Losses of routers as `training.router_loss` has them: over each micro-batch, and over the whole step.

The references are plain PyTorch and PEFT. That of the global batch runs the micro-batches one after the other and keeps their
graphs; the model's own function is then applied to the logits of all their routers, one behind the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from mixtures import MIXTURES, WITHOUT_ROUTER_LOSS
from peft import get_peft_model_state_dict
from test_own_losses import KINDS, sequences
from test_own_losses import save as save_kind
from tiny_models import (
    CONFIGS,
    Run,
    aligned_copies,
    assert_same_bits,
    load_plain,
    make_config,
    plain_batches,
    reference_run,
    streamed_run,
    token_loss,
)

from finetune.data.tensor_rows import TensorRows
from finetune.memory.errors import UserError
from finetune.methods.first_order import lane_seed
from finetune.offload.step.router_loss import has_balance
from finetune.trainer import Trainer

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
LORA = {"dropout": 0.0, "target_modules": ["q_proj", "o_proj"], "target_parameters": [*STACKS, "mlp.gate.weight"]}
# Constant rates and no clipping: what is compared to rounding is not made larger.
PLAIN = {
    "max_steps": 3, "batch_size": 7, "micro_batch_size": 2, "warmup_steps": 0, "max_grad_norm": None, "weight_decay": 0.0
}  # fmt: skip


@pytest.fixture(autouse=True)
def same_sums(monkeypatch) -> None:
    aligned_copies(monkeypatch)


@pytest.fixture
def mixture(checkpoint, monkeypatch) -> Callable[..., Path]:
    def get(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        kind = f"{name} {options}" if options else name
        monkeypatch.setitem(CONFIGS, kind, lambda: MIXTURES[name](**options))
        return checkpoint(kind, dtype)

    return get


def global_batch_run(config: Any) -> Run:
    """AdamW at a constant rate over the token loss of a step and the load balance of all its micro-batches together."""
    options = config.training
    torch.set_num_threads(config.engine.num_threads)
    model = load_plain(config)
    base = model.get_base_model()
    balance = sys.modules[type(base).__module__].load_balancing_loss_func
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=0.0)
    losses = []
    for step, batches in enumerate(plain_batches(config)):
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        parts, logits, masks = [], [], []
        for index, batch in enumerate(batches):
            labels = batch.pop("labels")
            torch.manual_seed(lane_seed(options.seed, step, index))
            output = model(**batch, output_router_logits=True)
            parts.append(token_loss(output.logits, labels) / count)
            logits.append(output.router_logits)
            masks.append(batch.get("attention_mask", torch.ones(labels.shape)).reshape(-1))
        layers = [torch.cat(layer).detach().requires_grad_() for layer in zip(*logits, strict=True)]
        aux = balance(tuple(layers), base.num_experts, base.num_experts_per_tok, torch.cat(masks))
        aux = options.router_loss_coefficient * aux
        aux.backward()
        start = 0
        total = sum((part.detach() for part in parts), torch.zeros(()))
        for part, own in zip(parts, logits, strict=True):
            rows = slice(start, start + own[0].shape[0])
            torch.autograd.backward([part, *own], [None, *(layer.grad[rows] for layer in layers)])
            start = rows.stop
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total + aux.detach()).item())
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return Run(losses, {name: value.detach().clone().contiguous() for name, value in state.items()})


def routed(loss: str, coefficient: float | None = 0.4, **options: Any) -> dict[str, Any]:
    return PLAIN | {"router_loss": loss, "router_loss_coefficient": coefficient, "lr_scheduler": "constant"} | options


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3-moe", "olmoe"])
def test_balance_of_the_whole_step(name, dtype, mixture, tokens, tmp_path, spill_everything):
    """4 micro-batches, 2 of them padded; on a CPU and beside a device, in two placements."""
    model = mixture(name, getattr(torch, dtype))

    def config(folder: str, device: str = "cpu", **engine: Any) -> Any:
        return make_config(
            model, tokens, tmp_path / folder, device=device, training=routed("global_batch"), lora=LORA,
            engine={"dtype": dtype, **engine},
        )  # fmt: skip

    expected = global_batch_run(config("plain"))
    placements = {"cpu": {"resident_blocks": 0, "activations": "disk"}, "simulated": {"resident_blocks": 2, "kept_graphs": 1}}
    for device, engine in placements.items():
        assert_same_bits(streamed_run(config(device, device, **engine)), expected)


def test_it_is_the_loss_of_a_loop_that_sees_the_batch_whole(mixture, tokens, tmp_path):
    """Of which micro-batches, each balanced by itself, are not: here they differ by more than rounding."""
    whole = mixture("qwen3-moe", output_router_logits=True, router_aux_loss_coef=0.4)
    flat = {"batch_size": 8, "lr_scheduler": "linear", "max_grad_norm": 1e9}
    training = routed("config", None, **flat | {"micro_batch_size": 8})
    config = make_config(whole, tokens, tmp_path / "whole", lora=LORA, training=training)
    expected = reference_run(config)
    assert_same_bits(streamed_run(config), expected)
    found = {}
    for word in ("global_batch", "micro_batch"):
        training = routed(word, **flat)
        found[word] = streamed_run(make_config(mixture("qwen3-moe"), tokens, tmp_path / word, lora=LORA, training=training))
    assert found["global_batch"].losses == pytest.approx(expected.losses, rel=3e-6)
    assert max(abs(a - b) for a, b in zip(found["micro_batch"].losses, expected.losses, strict=True)) > 1e-3
    for name, value in expected.adapter.items():
        torch.testing.assert_close(found["global_batch"].adapter[name], value, rtol=2e-3, atol=2e-5)


def test_one_micro_batch_is_the_whole_step(mixture, tokens, tmp_path):
    runs = []
    for word in ("micro_batch", "global_batch"):
        training = routed(word, micro_batch_size=7)
        runs.append(streamed_run(make_config(mixture("mixtral"), tokens, tmp_path / word, training=training)))
    assert_same_bits(*runs)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", sorted(MIXTURES.keys() - WITHOUT_ROUTER_LOSS))
def test_the_key_is_as_good_as_the_configuration(name, mixture, tokens, tmp_path):
    """Whatever config.json says."""
    lora = {"target_modules": ["q_proj", "out_proj"]}
    training = PLAIN | {"max_steps": 2, "batch_size": 3}
    said = mixture(name, output_router_logits=True, router_aux_loss_coef=0.3)
    silent = mixture(name)
    by_file = streamed_run(make_config(said, tokens, tmp_path / "file", training=training, lora=lora))
    keys = {"router_loss": "micro_batch", "router_loss_coefficient": 0.3}
    assert_same_bits(streamed_run(make_config(silent, tokens, tmp_path / "key", training=training | keys, lora=lora)), by_file)
    off = training | {"router_loss": "without"}
    bare = streamed_run(make_config(silent, tokens, tmp_path / "bare", training=training, lora=lora))
    assert_same_bits(streamed_run(make_config(said, tokens, tmp_path / "off", training=off, lora=lora)), bare)
    assert all(a - b > 0.3 for a, b in zip(by_file.losses, bare.losses, strict=True))


def test_forward_passes_alone(mixture, tokens, tmp_path):
    """Every variant of the weights has its own balance: with the model's own loss over one micro-batch, the same."""
    runs = []
    for word in ("micro_batch", "global_batch", "without"):
        training = {
            "max_steps": 3, "batch_size": 4, "micro_batch_size": 4, "router_loss": word,
            "router_loss_coefficient": None if word == "without" else 0.4,
        }  # fmt: skip
        config = make_config(
            mixture("mixtral"), tokens, tmp_path / word, method="zo", zo={"parameters": "lora"}, training=training,
            lora={"dropout": 0.0, "target_modules": ["q_proj"]},
        )  # fmt: skip
        runs.append(streamed_run(config))
    assert_same_bits(runs[0], runs[1])
    assert all(a - b > 0.3 for a, b in zip(runs[0].losses, runs[2].losses, strict=True))


def test_losses_of_another_form_are_the_models_own(tmp_path):
    """Switch Transformers has a z-loss too, and its load balance is over encoder and decoder: by micro-batch alone."""
    kind = KINDS["switch, whose router has losses"]
    folder, rows = save_kind(kind, tmp_path / "model"), [sequences(i) for i in range(5)]
    losses = {}
    for word in ("without", "micro_batch"):
        training = {"max_steps": 1, "router_loss": word, "micro_batch_size": 5}
        config = make_config(folder, rows, tmp_path / word, training=training, lora={"target_modules": kind.targets})
        losses[word] = streamed_run(config).losses[0]
    model = kind.model.from_pretrained(folder)
    batch = TensorRows(rows).collate(range(5))
    own = model(**batch, output_router_logits=True)
    assert losses["micro_batch"] == pytest.approx(own.loss.item(), rel=1e-5)
    assert losses["without"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert losses["micro_batch"] - losses["without"] > 1e-4
    config = make_config(folder, rows, tmp_path / "global", training={"router_loss": "global_batch"})
    with pytest.raises(UserError, match="SwitchTransformersForConditionalGeneration is no load balance of Transformers' usual"):
        Trainer(config).train()


@pytest.mark.parametrize("name", [*sorted(WITHOUT_ROUTER_LOSS), "llama"])
def test_models_that_have_none_refuse_it(name, mixture, checkpoint, tokens, tmp_path):
    model = checkpoint(name) if name == "llama" else mixture(name)
    for options, words in {
        "global_batch": ({"router_loss": "global_batch"}, r"training\.router_loss: expected config, because \w+ adds no loss"),
        "coefficient": ({"router_loss_coefficient": 0.1}, r"training\.router_loss_coefficient: expected none, because"),
    }.values():
        with pytest.raises(UserError, match=words):
            Trainer(make_config(model, tokens, tmp_path / "out", training=options)).plan()


def test_a_coefficient_of_a_loss_that_is_off_is_refused(mixture, tokens, tmp_path):
    config = make_config(mixture("mixtral"), tokens, tmp_path / "out", training={"router_loss_coefficient": 0.1})
    with pytest.raises(UserError, match="set training.router_loss to micro_batch or global_batch if it has one"):
        Trainer(config).train()


def test_of_encoder_and_decoder_apart_there_is_none():
    """NLLB-MoE calls the usual function for each."""
    for kind, encodes in ((tf.MixtralForCausalLM, False), (tf.NllbMoeForConditionalGeneration, True)):
        model = object.__new__(kind)
        object.__setattr__(model, "config", kind.config_class())
        assert has_balance(model) is not encodes
