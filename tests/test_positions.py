"""Rows that are longer than a model has positions for, against what Transformers' own forward takes."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from test_resume import data, data_prepared_here  # noqa: F401  fixtures
from text_models import make_config, write_model, write_rows

from finetune import Trainer
from finetune.evaluate import evaluate
from finetune.memory.errors import UserError
from finetune.offload.sizing.positions import longest_row
from finetune.offload.weights.parts import cut

POSITIONS = 37
IDS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
GPT = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
CONFIGS = {
    "gpt2": tf.GPT2Config(**IDS, **GPT),
    "opt": tf.OPTConfig(**IDS, **TEXT, ffn_dim=40, word_embed_proj_dim=24),
    "roberta": tf.RobertaConfig(**IDS, **TEXT, intermediate_size=40, is_decoder=True),
    "a table within blocks": tf.GPTJConfig(**IDS, **GPT, rotary_dim=4),
    "a mask within blocks": tf.GPTNeoConfig(
        **IDS, hidden_size=24, num_layers=2, num_heads=4, max_position_embeddings=POSITIONS, attention_types=[[["global"], 2]]
    ),
    "biases made before blocks": tf.MptConfig(vocab_size=61, d_model=24, n_layers=2, n_heads=4, max_seq_len=POSITIONS),
    "biases of any length": tf.BloomConfig(**IDS, hidden_size=24, n_layer=2, n_head=4),
    "rotary": tf.LlamaConfig(**IDS, **TEXT, intermediate_size=40),
    "experts": tf.MixtralConfig(**IDS, **TEXT, intermediate_size=40, num_key_value_heads=2, num_local_experts=3),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_longest_row_is_the_models_own(name, tmp_path):
    plain = tf.AutoModelForCausalLM.from_config(CONFIGS[name])
    plain.save_pretrained(tmp_path)
    parts = cut(tmp_path)
    found = longest_row(parts, parts.model, {"input_ids": torch.zeros(1, 50, dtype=torch.int64), "use_cache": False})
    assert found == 50 or found < POSITIONS + 1
    plain(torch.full((1, found), 5))
    if found < 50:
        with pytest.raises((IndexError, RuntimeError)):
            plain(torch.full((1, found + 1), 5))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Of 64 positions."""
    return write_model("gpt2", tmp_path_factory.mktemp("gpt2") / "float32")


def test_longer_rows_are_refused_before_weights_are_read(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.offload.streamed_model.StreamedModel.__init__", None)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "some words of a text " * 40}])
    config = make_config(gpt2, tmp_path / "out", data=rows, sequence_length=100)
    for use in (Trainer(config).plan, Trainer(config).train, lambda: evaluate(config)):
        with pytest.raises(UserError, match=r"rows of 100 tokens are longer than the 64 positions of GPT2LMHeadModel.*64 or"):
            use()


def test_short_rows_train_whatever_the_limit_is(gpt2, data, tmp_path):  # noqa: F811
    config = make_config(gpt2, tmp_path / "out", data=data, sequence_length=1000, training={"max_steps": 1})
    assert Trainer(config).train().global_step == 1


def test_rows_beyond_what_a_rotary_model_was_made_for_are_said_once(tmp_path, capsys):
    model = write_model("llama", tmp_path / "model")
    Trainer(make_config(model, tmp_path / "out", sequence_length=300)).plan()
    assert capsys.readouterr().err.count("rows of 300 tokens are longer than the 256 that LlamaForCausalLM was made for") == 1
    Trainer(make_config(model, tmp_path / "out", sequence_length=256)).plan()
    assert "made for" not in capsys.readouterr().err
