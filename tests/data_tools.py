"""What the tests of data share: a tiny tokenizer, rows on disk, and what became of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from finetune.data import TokenDataset, preparation, prepare, worker

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = ["the cat sat on the mat", "hello there world", "what is it about", "user assistant", "It was great terrible"]
CHAT = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "the mat"},
]


def write_tokenizer(folder: Path, template: str | None = None) -> str:
    """A byte-level BPE with a bos token that the tokenizer puts in front, as Llama's does."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )
    fast.save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(source, model: str, tmp_path: Path, **options) -> TokenDataset:
    return prepare(source, model=model, cache_dir=tmp_path / "cache", **{"sequence_length": 200, **options})


def prepare_in_this_process(monkeypatch) -> None:
    """The same code, without the seconds that a new process takes to start."""

    def run(job, stderr_path):
        # With remote code allowed, torch is left importable, which the other tests of this process need.
        worker.run(worker.Job(**{**job, "trust_remote_code": True}), lambda rows, tokens: None)

    monkeypatch.setattr(preparation, "_run_worker", run)


def texts(model: str, data: TokenDataset) -> list[tuple[str, list[str]]]:
    """Per example: its text, and the runs of it that are trained."""
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    out = []
    for index in range(len(data)):
        one, runs = data[index], [[]]
        assert one.input_ids.dtype == one.labels.dtype == np.int32
        for token, label in zip(one.input_ids, one.labels, strict=True):
            assert label in (token, -100)
            if label != -100:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        decoded = [tokenizer.decode([int(t) for t in run], skip_special_tokens=False) for run in runs if run]
        out.append((tokenizer.decode(one.input_ids.tolist(), skip_special_tokens=False), decoded))
    return out
