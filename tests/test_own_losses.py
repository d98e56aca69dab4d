"""Each model has the loss that its own forward has, of all rows of a step, however they are cut into micro-batches.

The reference is plain PyTorch and PEFT: one batch of all rows, the model's own `forward(labels=...)`, autograd over all of it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tiny_models import make_config

from finetune.data.tensor_rows import TensorRows, open_tensor_rows
from finetune.memory.device_kinds import DEVICE_KINDS
from finetune.memory.errors import UserError
from finetune.offload.weights.parts import cut
from finetune.setup import choose_dtype
from finetune.trainer import Trainer

VOCAB = 101
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {
    "vocab_size": VOCAB, "d_model": 40, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "decoder_start_token_id": 2, **IDS,
}  # fmt: skip
T5 = {
    "vocab_size": VOCAB, "d_model": 40, "d_kv": 10, "d_ff": 56, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
BERT = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 40}
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(length: int, seed: int, ignored: int = 0) -> torch.Tensor:
    found = torch.randint(3, VOCAB - 5, (length,), generator=torch.Generator().manual_seed(seed))
    found[:ignored] = -100
    return found


def sequences(i: int) -> dict[str, Any]:
    """Source and target of unlike lengths; some targets have labels that do not count."""
    return {"input_ids": ids(5 + i, i), "labels": ids(9 - i, 10 + i, ignored=i)}


def tokens(i: int) -> dict[str, Any]:
    return {"input_ids": ids(5 + i, i), "labels": ids(5 + i, 20 + i, ignored=2 * i)}


def speech(i: int) -> dict[str, Any]:
    return {"input_features": numbers(8, 20, seed=i), "labels": ids(4, i, ignored=i % 3)}


def picture_and_text(i: int) -> dict[str, Any]:
    """Four tokens stand for the patches of the picture."""
    text = torch.cat([torch.full((4,), VOCAB - 1), ids(6 + i, i)])
    labels = torch.cat([torch.full((4 + i,), -100), text[4 + i :]])
    return {"input_ids": text, "labels": labels, "pixel_values": numbers(3, 8, 8, seed=i)}


def classes(i: int) -> dict[str, Any]:
    return {"input_ids": ids(5 + i, i).tolist(), "labels": i % 3}


def targets(i: int) -> dict[str, Any]:
    return {"input_ids": ids(5 + i, i).numpy(), "labels": 0.3 * i}


def several_classes(i: int) -> dict[str, Any]:
    return {"input_ids": ids(5 + i, i), "labels": torch.tensor([1.0, 0.0, i % 2])}


def answers(i: int) -> dict[str, Any]:
    return {"input_ids": ids(9, i), "start_positions": i % 9, "end_positions": (i + 3) % 9}


@dataclass(frozen=True)
class Kind:
    model: type
    config: Callable[[], tf.PreTrainedConfig]
    row: Callable[[int], dict[str, Any]]
    targets: str | list[str] = "all-linear"


def vision_encoder_decoder() -> tf.PreTrainedConfig:
    encoder = tf.ViTConfig(**VISION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    decoder = tf.GPT2Config(
        vocab_size=VOCAB, n_positions=37, n_embd=40, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS
    )
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def llava() -> tf.PreTrainedConfig:
    vision = tf.CLIPVisionConfig(**VISION)
    text = tf.LlamaConfig(**TEXT, **IDS)
    return tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB - 1)


def switch() -> tf.PreTrainedConfig:
    return tf.SwitchTransformersConfig(
        **T5, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=3,
        router_jitter_noise=0.0,
    )  # fmt: skip


KINDS = {
    "t5": Kind(tf.T5ForConditionalGeneration, lambda: tf.T5Config(**T5), sequences),
    "t5, head of its own": Kind(tf.T5ForConditionalGeneration, lambda: tf.T5Config(**T5, tie_word_embeddings=False), sequences),
    "bart": Kind(tf.BartForConditionalGeneration, lambda: tf.BartConfig(**BART, **NO_DROPOUT), sequences),
    "pegasus": Kind(tf.PegasusForConditionalGeneration, lambda: tf.PegasusConfig(**BART, **NO_DROPOUT), sequences),
    "whisper": Kind(
        tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(
            **BART, **NO_DROPOUT, num_mel_bins=8, max_source_positions=10, max_target_positions=12, suppress_tokens=[]
        ),
        speech,
    ),
    "switch, whose router has losses": Kind(
        tf.SwitchTransformersForConditionalGeneration,
        switch,
        sequences, targets=["q", "v", "o"],  # by default routed experts and their routers are left out
    ),
    "switch, each expert's own layers": Kind(
        tf.SwitchTransformersForConditionalGeneration, switch, sequences, targets=["wi", "wo", "classifier"],
    ),
    "vision-encoder-decoder": Kind(
        tf.VisionEncoderDecoderModel, vision_encoder_decoder,
        lambda i: {"pixel_values": numbers(3, 8, 8, seed=i), "labels": ids(6, i, ignored=i)},
    ),
    "llava": Kind(tf.LlavaForConditionalGeneration, llava, picture_and_text),
    "masked language model": Kind(tf.BertForMaskedLM, lambda: tf.BertConfig(**BERT), tokens),
    "token classes": Kind(
        tf.BertForTokenClassification, lambda: tf.BertConfig(**BERT, num_labels=VOCAB), tokens
    ),
    "token classes, of one row only": Kind(
        tf.BertForTokenClassification, lambda: tf.BertConfig(**BERT, num_labels=VOCAB),
        lambda i: {"input_ids": ids(6, i), "labels": ids(6, 20 + i, ignored=6 * (i != 2))},
    ),
    "classes": Kind(tf.LlamaForSequenceClassification, lambda: tf.LlamaConfig(**TEXT, **IDS, num_labels=3), classes),
    "regression": Kind(tf.BertForSequenceClassification, lambda: tf.BertConfig(**BERT, num_labels=1), targets),
    "several classes": Kind(
        tf.BertForSequenceClassification,
        lambda: tf.BertConfig(**BERT, num_labels=3, problem_type="multi_label_classification"), several_classes,
    ),
    "answers": Kind(tf.BertForQuestionAnswering, lambda: tf.BertConfig(**BERT), answers),
    "decoder that does not shift": Kind(tf.BartForCausalLM, lambda: tf.BartConfig(**BART, **NO_DROPOUT), tokens),
}  # fmt: skip


def save(kind: Kind, folder: Path) -> Path:
    torch.manual_seed(7)
    model = kind.model(kind.config())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape), alpha=0.06)
    model.save_pretrained(folder)
    return folder


def plain_step(kind: Kind, folder: Path, lora: dict[str, Any]) -> tuple[float, float]:
    """(loss, norm of the adapter's gradients) of one batch of five rows."""
    model = kind.model.from_pretrained(folder)
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(**lora)).train()
    batch = TensorRows([kind.row(i) for i in range(5)]).collate(range(5))
    loss = model(**batch).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), float(torch.nn.utils.get_total_norm(grads))


def streamed_step(kind: Kind, folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    training = {"max_steps": 1, "max_grad_norm": None, "warmup_steps": 0}
    rows = [kind.row(i) for i in range(5)]
    config = make_config(folder, rows, out, training=training, **changes)
    Trainer(config).train()
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])


LORA = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": "gaussian"}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradient_are_the_models_own(name, tmp_path):
    kind = KINDS[name]
    folder = save(kind, tmp_path / "model")
    loss, norm = plain_step(kind, folder, LORA | {"target_modules": kind.targets})
    lora = {"r": 3, "alpha": 7, "dropout": 0.0, "init_lora_weights": "gaussian", "target_modules": kind.targets}
    found = streamed_step(kind, folder, tmp_path / "out", lora=lora)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1e-3


def test_rows_are_the_same_from_python_files_and_hub(tmp_path, monkeypatch):
    kind = KINDS["llava"]
    parts = cut(save(kind, tmp_path / "model"))
    plain = [{name: value.tolist() for name, value in kind.row(i).items()} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    dataset = datasets.Dataset.from_list(plain)
    dataset.to_parquet(tmp_path / "rows.parquet")
    expected = TensorRows([kind.row(i) for i in range(4)]).collate(range(4))
    assert expected["attention_mask"].sum(dim=1).tolist() == [10, 11, 12, 13]
    monkeypatch.setattr("finetune.data.sources._hub_commit", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: dataset)
    for source in (plain, dataset, str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.parquet"), "some/rows:train"):
        found = open_tensor_rows(source, parts).collate(range(4))
        assert found.keys() == expected.keys()
        assert all(found[name].equal(value) for name, value in expected.items())
    text = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    assert open_tensor_rows(text, parts) is None
    for wrong, words in {
        "a column that it does not take": ({"pixels": [[0.5]]}, 'forward takes no "pixels"'),
        "a column that some rows lack": ({"position_ids": list(range(13))}, 'one of them lacks "position_ids"'),
        "pictures of unlike shapes": ({"pixel_values": [[[0.5]]]}, 'samples of one shape in "pixel_values"'),
        "no numbers": ({"pixel_values": [["a"]]}, "expected numbers"),
    }.values():
        rows = [*plain[:3], plain[3] | wrong]
        with pytest.raises(UserError, match=words):
            open_tensor_rows(rows, parts).collate(range(4))


def test_two_towers_have_no_loss_of_rows(tmp_path):
    """Theirs is of how all rows of a batch differ. They have parameters without a dimension, and no one table of tokens."""
    text = {"vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    clip = Kind(tf.CLIPModel, lambda: tf.CLIPConfig(text_config=text, vision_config=VISION), picture_and_text)
    folder = save(clip, tmp_path / "model")
    rows = [{"input_ids": ids(6, i), "pixel_values": numbers(3, 8, 8, seed=i)} for i in range(2)]
    with pytest.raises(UserError, match="CLIPModel gives no loss for these rows"):
        Trainer(make_config(folder, rows, tmp_path / "out")).train()


@pytest.mark.parametrize("name", ["t5", "masked language model", "classes", "decoder that does not shift"])
def test_models_that_predict_no_next_token_refuse_text(name, tmp_path):
    config = make_config(save(KINDS[name], tmp_path / "model"), None, tmp_path / "out")
    with pytest.raises(UserError, match="expected a causal language model for text, found"):
        Trainer(config).plan()


def test_gradients_are_not_in_float16():
    """They are not scaled."""
    gpu = SimpleNamespace(traits=DEVICE_KINDS["cuda"], multiplies=lambda dtype: True)
    assert choose_dtype("auto", gpu, True, torch.float16) == torch.bfloat16
    assert choose_dtype("auto", gpu, False, torch.float16) == torch.float16
    with pytest.raises(UserError, match=r"engine\.dtype: expected bfloat16 or float32"):
        choose_dtype("float16", gpu, True, torch.float32)


@pytest.mark.parametrize("name", ["classes", "regression"])
def test_all_weights_of_models_without_a_head_are_trained(name, tmp_path):
    kind = KINDS[name]
    folder = save(kind, tmp_path / "model")
    model = kind.model.from_pretrained(folder).train()
    loss = model(**TensorRows([kind.row(i) for i in range(5)]).collate(range(5))).loss
    loss.backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    found = streamed_step(kind, folder, tmp_path / "out", method="full")
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1e-3
