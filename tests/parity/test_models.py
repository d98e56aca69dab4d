"""Architectures, dtypes and adapters: the streamed run against the plain loop, bit for bit."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tiny_models import (
    CONFIGS,
    HEADS,
    IDS,
    TEXT,
    VOCAB,
    assert_same_bits,
    load_plain,
    make_config,
    plain_batches,
    reference_run,
    streamed_run,
    token_loss,
)

import finetune.offload.weights.binding
import finetune.offload.weights.parts
from finetune.memory.errors import UserError
from finetune.trainer import Trainer

LORA = {
    "opt-layerdrop": {"target_modules": r".*layers\.\d+\..*(k_proj|fc1)"},
    # Experts are trained when they are asked for; PEFT has no dropout for adapters of stacked ones.
    "mixtral": {"dropout": 0.0, "target_modules": "all-linear"},
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architectures(name, dtype, checkpoint, tokens, images, tmp_path):
    model = checkpoint(name, getattr(torch, dtype))
    data = images if name == "vit" else tokens
    config = make_config(model, data, tmp_path / "out", engine={"dtype": dtype}, lora=LORA.get(name, {}))
    expected = reference_run(config)
    assert len(set(expected.losses)) == 4
    assert_same_bits(streamed_run(config), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_steps(dtype, checkpoint, tokens, tmp_path):
    config = make_config(
        checkpoint("llama", getattr(torch, dtype)), tokens, tmp_path / "out",
        engine={"dtype": dtype, "resident_blocks": 1}, training={"max_steps": 20, "micro_batch_size": 3},
    )  # fmt: skip
    expected = reference_run(config)
    assert_same_bits(streamed_run(config), expected)
    assert expected.losses[-1] < expected.losses[0]


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2", "opt", "mixtral", "vit"])
def test_stored_bf16_computed_in_fp32(name, checkpoint, tokens, images, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 1)
    data = images if name == "vit" else tokens
    config = make_config(checkpoint(name, torch.bfloat16), data, tmp_path / "out", lora=LORA.get(name, {}))
    assert_same_bits(streamed_run(config), reference_run(config))


def test_stored_fp32_computed_in_bf16(checkpoint, tokens, tmp_path):
    config = make_config(checkpoint("llama"), tokens, tmp_path / "out", engine={"dtype": "bfloat16"})
    assert_same_bits(streamed_run(config), reference_run(config))


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2", "opt"])
def test_embedding_rows_on_demand(name, checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    config = make_config(checkpoint(name), tokens, tmp_path / "out")
    assert_same_bits(streamed_run(config), reference_run(config))


def test_dora_over_converted_weights(checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 1)
    config = make_config(checkpoint("llama", torch.bfloat16), tokens, tmp_path / "out", lora={"use_dora": True})
    assert_same_bits(streamed_run(config), reference_run(config))


REFUSED = {
    "dropout of experts": ("mixtral", {"dropout": 0.1, "target_modules": "all-linear"}),
    "no such module": ("llama", {"target_modules": ["no_such_proj"]}),
}


@pytest.mark.parametrize("variant", REFUSED)
def test_what_cannot_be_streamed_is_refused(variant, checkpoint, tokens, tmp_path):
    name, lora = REFUSED[variant]
    with pytest.raises(UserError):
        Trainer(make_config(checkpoint(name), tokens, tmp_path / "out", lora=lora)).train()
    assert not (tmp_path / "out" / "adapter").exists()


def test_packed_rows(checkpoint, tokens, tmp_path):
    packed = make_config(
        checkpoint("llama"), tokens, tmp_path / "out", dataset={"packing": True, "sequence_length": 47},
        training={"batch_size": 3, "max_steps": 3},
    )  # fmt: skip
    assert any(len(row) > 1 for batch in plain_batches(packed)[0] for row in batch.get("position_ids", torch.zeros(1, 1)))
    assert_same_bits(streamed_run(packed), reference_run(packed))


def test_packing_gives_the_losses_of_separate_rows(checkpoint, tokens, tmp_path):
    """All examples in one step: the loss is over the same tokens, only the shapes differ."""
    training = {"batch_size": 13, "max_steps": 3, "warmup_steps": 0}
    runs = [
        streamed_run(
            make_config(
                checkpoint("llama"), tokens, tmp_path / str(packing), lora={"dropout": 0.0}, training=training,
                dataset={"packing": packing, "sequence_length": 64},
            )  # fmt: skip
        )
        for packing in (False, True)
    ]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=2e-6)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral"])
def test_packing_in_bf16_is_told_from_rounding(name, checkpoint, tokens, tmp_path):
    config = make_config(
        checkpoint(name, torch.bfloat16), tokens, tmp_path / "out", lora=LORA.get(name, {}), engine={"dtype": "bfloat16"},
        dataset={"packing": True, "sequence_length": 32}, training={"max_steps": 1},
    )  # fmt: skip
    assert len(streamed_run(config).losses) == 1


MORE_THAN_ATTENTION = {
    "a convolution": (
        lambda: tf.Lfm2Config(**TEXT, **HEADS, **IDS, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3),
        r"Lfm2ForCausalLM does not keep the texts of a row apart \(what it says of a text changes by",
    ),
    "a state": (
        lambda: tf.RwkvConfig(vocab_size=VOCAB, hidden_size=40, num_hidden_layers=2, context_length=64, **IDS),
        "RwkvForCausalLM does not keep the texts of a row apart .*takes no position_ids",
    ),
}


@pytest.mark.parametrize("name", MORE_THAN_ATTENTION)
def test_packing_is_refused_where_a_text_reaches_the_next(name, tokens, tmp_path):
    build, words = MORE_THAN_ATTENTION[name]
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(build())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.06)
    model.save_pretrained(tmp_path / "model")
    config = make_config(
        tmp_path / "model", tokens, tmp_path / "out", lora={"target_modules": ["w1", "key"]},
        dataset={"packing": True, "sequence_length": 32},
    )  # fmt: skip
    with pytest.raises(UserError, match=words):
        Trainer(config).train()
    assert not (config.output / "adapter").exists()


def test_the_reference_loss_is_transformers_own(checkpoint, tokens, tmp_path):
    config = make_config(checkpoint("gemma2"), tokens, tmp_path / "out", lora={"dropout": 0.0})
    model = load_plain(config)
    for batch in plain_batches(config)[0]:
        labels = batch.pop("labels")
        own = model(**batch, labels=labels, num_items_in_batch=torch.tensor(17)).loss
        assert own.equal(token_loss(model(**batch).logits, labels) / 17)
