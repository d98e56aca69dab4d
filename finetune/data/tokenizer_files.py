"""Where a model's tokenizer is: in its directory, or in its GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.offload.files.checkpoint import is_gguf
from finetune.offload.files.gguf_file import read_gguf, read_gguf_header


def tokenizer_folder(model: Path) -> Path | None:
    """The directory of tokenizer files that belongs to `model`, a directory or a GGUF file; None: it is in the file itself. A
    tokenizer.json that lies beside a GGUF file goes before what is in that."""
    if not is_gguf(model):
        return model
    return model.parent if (model.parent / "tokenizer.json").is_file() else None


def read_tokenizer(model: Path, trust_remote_code: bool) -> Any:
    """Transformers' own, of a directory or GGUF file. Raises whatever its parts do."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = tokenizer_folder(model)
    if folder is not None:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # AutoTokenizer gives the same, after it has made Python objects of every token in the file to find the configuration.
    return PreTrainedTokenizerFast.from_pretrained(model.parent, gguf_file=model.name)


def write_tokenizer(model: Path, folder: Path) -> None:
    """Makes `folder` what a directory of the GGUF file's tokenizer would be, for processes without torch, which Transformers
    needs to read GGUF. Raises whatever its parts do."""
    read_tokenizer(model, trust_remote_code=False).save_pretrained(folder)
    rows = read_gguf(model).tensors["token_embd.weight"].shape[0]
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))


def split_note(model: Path) -> str | None:
    """What the user of a GGUF file should know when Transformers does not know how its text is cut into words."""
    if tokenizer_folder(model) is not None:
        return None
    values = read_gguf_header(model).values
    kind, split = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split in _known_splits():
        return None
    return (
        f"note: Transformers does not know how text is split for this file's tokenizer ({split!r:.40}), and splits it as GPT-2 "
        "does, which may give other tokens than the model was trained on: put the original tokenizer.json and "
        "tokenizer_config.json beside the file to use those"
    )


def _known_splits() -> frozenset[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # before Transformers 5.24
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS) | {"gpt-2"}
