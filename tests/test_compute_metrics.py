"""`training.compute_metrics` is given what Transformers' Trainer gives, with the likeliest token in place of logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from test_head import Case, Chunks
from text_models import make_config, plain_model, write_model, write_rows

from finetune import Config, Trainer
from finetune.config import ConfigError
from finetune.data import preparation, worker
from finetune.data.preparation import prepare_for
from finetune.evaluate import evaluate
from finetune.memory.errors import UserError
from finetune.offload.step.deferred_logits import DeferredLogits
from finetune.offload.step.head import TiledHead
from finetune.reporting.report import read_metrics

ROWS = [{"prompt": "the cat sat on"[: 3 + i], "completion": " mat hello"[: 4 + i % 5]} for i in range(5)]
SHARES = """
import numpy as np

def share_right(found):
    labels, right = found.label_ids[:, 1:], found.predictions[:, :-1] == found.label_ids[:, 1:]
    return {"right": right[labels != -100].mean(), "eval_shape": found.predictions.shape[1]}

def broken(found):
    return found.nothing

def called_loss(found):
    return {"loss": 1.0}
"""


@pytest.fixture(autouse=True)
def data_prepared_here(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_load_tokenizer", lambda job: tf.AutoTokenizer.from_pretrained(job.tokenizer))
    monkeypatch.setattr(
        preparation, "_run_worker", lambda job, _: worker.run(worker.Job(**job), lambda rows, tokens: None)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("gemma2", tmp_path_factory.mktemp("models") / "float32")


def test_predictions_are_those_of_the_plain_model(model, tmp_path):
    seen: list[Any] = []

    def keep(found: Any) -> dict[str, float]:
        seen.append(found)
        return {}

    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = make_config(model, tmp_path / "out", data=data, eval_data=data, training={"compute_metrics": keep})
    evaluate(config)
    (found,) = seen
    plain, cache = plain_model(model), prepare_for(config, data, model, choices=True, append_eos=True)
    examples = [cache[row * cache.num_choices + int(answer)] for row, answer in enumerate(cache.answers)]
    assert found.predictions.shape == found.label_ids.shape == (len(ROWS), max(cache.lengths)) and cache.num_choices > 1
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        labels = example.labels.copy()
        labels[0] = -100
        assert (found.label_ids[row, :length] == labels).all() and (found.label_ids[row, length:] == -100).all()
        with torch.no_grad():
            likeliest = plain(torch.from_numpy(example.input_ids[None]).long()).logits[0].argmax(-1).numpy()
        asked = np.flatnonzero(labels[1:] != -100)
        assert (found.predictions[row, asked] == likeliest[asked]).all()
        assert (np.delete(found.predictions[row], asked) == -100).all()


def test_a_function_in_a_file_measures_runs_and_names_the_best(model, tmp_path):
    (tmp_path / "metrics.py").write_text(SHARES)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    training = {
        "compute_metrics": f"{tmp_path}/metrics.py:share_right", "eval_steps": 1, "max_steps": 2, "batch_size": 2,
        "metric_for_best_model": "eval_right", "load_best_model_at_end": True, "learning_rate": 0.05,
    }  # fmt: skip
    config = make_config(model, tmp_path / "out", data=data, eval_data=data, training=training, lora={"r": 2})
    report = Trainer(config).train().report
    shares = [row["eval_right"] for row in read_metrics(config.output / "metrics.jsonl")]
    assert report["best"] == {"step": 1 + shares.index(max(shares)), "metric": "right", "value": max(shares)}
    assert 0 < max(shares) <= 1 and report["evaluation"]["shape"] == 10
    assert evaluate(Config.load(config.output), config.output)["right"] == pytest.approx(max(shares))

    def with_function(word: Any) -> Config:
        return config.model_copy(update={"training": config.training.model_copy(update={"compute_metrics": word})})

    for word, words in [
        ("broken", "compute_metrics: broken failed: AttributeError"),
        ("called_loss", "expected finite numbers from called_loss, under other names than loss, .* found loss: 1.0"),
        ("missing", "training.compute_metrics: expected a function named missing in"),
    ]:
        with pytest.raises(UserError, match=words):
            evaluate(with_function(f"{tmp_path}/metrics.py:{word}"))
    assert "compute_metrics: null" in with_function(print).to_yaml()
    with pytest.raises(ConfigError, match="compute_metrics: expected FILE.py:FUNCTION, MODULE:FUNCTION or a function, found 3"):
        Config(model="m", training={"compute_metrics": 3})


def test_the_likeliest_token_of_a_head_in_chunks_is_the_first_of_the_highest():
    case = Case()
    with torch.no_grad():
        case.head.weight[70] = case.head.weight[20]  # of two chunks, with the same logits
    hidden = torch.randn(9, case.head.weight.shape[1], generator=torch.Generator().manual_seed(2))
    hidden[3] = case.head.weight[20] * 3
    labels = torch.arange(9)
    labels[5] = -100
    expected = (hidden @ case.head.weight.t()).max(dim=1).indices
    assert expected[3] == 20
    expected[5] = -100
    for tile_vocab in (101, 30):
        chunks = Chunks(case.head, tile_vocab)
        tiled = TiledHead(case.head, chunks, len(chunks.starts), tile_tokens=4)
        (found,) = tiled.token_scores([DeferredLogits(hidden, 101)], [labels], predicts=True)
        del case.head.forward
        assert found.tokens.equal(torch.where(labels == -100, 0, expected)) or found.tokens.equal(expected)
