"""From text to text with a GGUF file, whose tokenizer and chat template are in it, as with a directory of the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_tools import prepare_in_this_process
from gguf_files import MIXED, write_gguf
from text_models import make_config, write_rows

from finetune import Trainer
from finetune.evaluate import evaluate
from finetune.generate import generate

ROWS = [{"prompt": f"the cat {'sat ' * (i % 3)}on", "completion": " the mat"} for i in range(5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    return write_gguf("llama", tmp_path_factory.mktemp("llama"), MIXED, text=True)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    prepare_in_this_process(monkeypatch)


def test_training_evaluation_and_chat(models, tmp_path):
    rows, results = write_rows(tmp_path / "rows.jsonl", ROWS), []
    for model in models:
        output = tmp_path / model.name
        config = make_config(model, output, data=rows, training={"max_steps": 2, "batch_size": 3, "micro_batch_size": 2})
        losses = Trainer(config).train()
        measured = evaluate(make_config(model, output, data=rows), output)
        texts = ["".join(generate(config, output, ["hello the"], max_new_tokens=6, chat=chat)) for chat in (False, True)]
        assert texts[0] != texts[1]
        results.append((losses.training_loss, measured["loss"], measured["tokens"], texts))
    assert results[0] == results[1]
