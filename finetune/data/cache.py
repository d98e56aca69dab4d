"""The token cache: flat arrays in a folder, written once as a stream, memory-mapped ever after.

    tokens.int32    every example's token ids, one after the other
    labels.int32    as long; -100 where a token is not trained
    offsets.int64   number of examples + 1; example i is tokens[offsets[i]:offsets[i + 1]]
    answers.int32   choices: per row, which of its candidates is the right one; labels: per row, whether it is wanted;
                    scores: per row, its margin, whose bits are those of a float32
    meta.json       counts, tokenizer, form, and checksums of the arrays and of itself; written last

A folder appears under its name by one rename, complete or not at all. When it is opened all of it is read and checked, in
small blocks: tokens that were damaged or exchanged are not trained on.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.errors import DataError
from finetune.offload.files.sealed import crc_text, file_checksum, json_digest, seal, unseal

MASKED = -100
FORMAT_VERSION = 5  # part of every cache key: raise it when the same rows would give other tokens
_ITEM_BYTES = {"tokens.int32": 4, "labels.int32": 4, "offsets.int64": 8, "answers.int32": 4}


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: `input_ids` and `labels`, int32 [tokens]; labels are -100 where not trained and not yet shifted."""

    input_ids: np.ndarray
    labels: np.ndarray


class TokenDataset:
    """Examples of a token cache, read from the memory map when they are asked for.

    `meta` holds, among others: form, rows (of the source), examples, tokens, label_tokens, truncated, dropped, notes,
    sequence_length, tokenizer (fingerprint), eos_token_id, choices (texts of the candidates, or null),
    enough (whether there are as many as `most_rows` or `most_tokens` ask for), different_completions (of prompt + completion
    rows; null when there are more than choices can compare, or none).
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta
        self._tokens = np.memmap(path / "tokens.int32", np.int32, "r")
        self._labels = np.memmap(path / "labels.int32", np.int32, "r")
        self._offsets = np.memmap(path / "offsets.int64", np.int64, "r")

    @classmethod
    def open(cls, path: str | Path) -> TokenDataset:
        """Raises DataError where the folder is not a whole, undamaged cache of this version and under its own name."""
        path = Path(path)
        try:
            meta = unseal(json.loads((path / "meta.json").read_text(encoding="utf-8")))
            if meta["format_version"] != FORMAT_VERSION:
                raise DataError(f"{path}: token cache of version {meta['format_version']}, expected {FORMAT_VERSION}")
            counts = {
                "tokens.int32": meta["tokens"],
                "labels.int32": meta["tokens"],
                "offsets.int64": meta["examples"] + 1,
            }
            if meta["choices"] is not None:
                counts["answers.int32"] = meta["examples"] // len(meta["choices"])
            elif meta.get("judged") == "labels":
                counts["answers.int32"] = meta["examples"]
            elif meta.get("judged") == "scores":
                counts["answers.int32"] = meta["examples"] // 2
            for name, count in counts.items():
                wanted, found = count * _ITEM_BYTES[name], (path / name).stat().st_size
                if found != wanted:
                    raise DataError(f"{path / name}: expected {wanted} bytes, found {found}")
            if meta["name"] != path.name:
                raise DataError(f"{path}: expected the token cache of this name, found {meta['name']}")
            for name, checksum in meta["checksums"].items():
                if file_checksum(path / name) != checksum:
                    raise DataError(f"{path / name} is damaged: its checksum does not fit")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a token cache: {type(error).__name__}: {error}") from error
        return cls(path, meta)

    def __len__(self) -> int:
        return self.meta["examples"]

    @cached_property
    def digest(self) -> str:
        """Of all examples and their order, in hexadecimal: another one where a token, label, length or answer differs."""
        return json_digest(self.meta["checksums"])

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        span = slice(self._offsets[index], self._offsets[index + 1])
        return Example(np.array(self._tokens[span]), np.array(self._labels[span]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        return np.diff(self._offsets)

    @property
    def pad_token_id(self) -> int:
        return self.meta["pad_token_id"]

    @property
    def num_choices(self) -> int | None:
        """Candidates a row; examples [row * num_choices, (row + 1) * num_choices) are a row's. None without choices."""
        return None if self.meta["choices"] is None else len(self.meta["choices"])

    @cached_property
    def answers(self) -> np.ndarray | None:
        """Index of the right candidate, int32 [examples / num_choices]; of rows with labels 1 where the completion is wanted,
        else 0, int32 [examples]. None where there is neither."""
        has_answers = self.meta["choices"] is not None or self.meta.get("judged") == "labels"
        return np.fromfile(self.path / "answers.int32", np.int32) if has_answers else None

    @cached_property
    def margins(self) -> np.ndarray:
        """Of rows that are judged by scores, fp32 [examples / 2]; 0 where a row says none."""
        return np.fromfile(self.path / "answers.int32", np.float32)


def trained_tokens(labels: np.ndarray) -> int:
    """Labels that count towards a loss: nothing predicts the first token."""
    return int(np.count_nonzero(labels[1:] != MASKED))


class CacheWriter:
    """Writes a cache into an existing folder, example by example; `finish` writes meta.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: open(folder / name, "wb", opener=_private) for name in _ITEM_BYTES}
        self._checksums = dict.fromkeys(_ITEM_BYTES, 0)
        self.examples = 0
        self.tokens = 0
        self.label_tokens = 0
        self._write("offsets.int64", [0])

    def add(self, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """Append one example; both int32 [tokens]."""
        self.examples += 1
        self.tokens += len(input_ids)
        self.label_tokens += trained_tokens(labels)
        self._write("tokens.int32", input_ids)
        self._write("labels.int32", labels)
        self._write("offsets.int64", [self.tokens])

    def add_answer(self, choice: int) -> None:
        self._write("answers.int32", [choice])

    def add_margin(self, margin: float) -> None:
        self._write("answers.int32", np.array([margin], np.float32).view(np.int32))

    def _write(self, name: str, values: np.ndarray | list[int]) -> None:
        data = np.asarray(values, dtype=name.rpartition(".")[2]).tobytes()
        self._files[name].write(data)
        self._checksums[name] = zlib.crc32(data, self._checksums[name])

    def finish(self, meta: dict[str, Any]) -> None:
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        about = {
            "format_version": FORMAT_VERSION,
            "name": self._folder.name,
            "examples": self.examples,
            "tokens": self.tokens,
            "label_tokens": self.label_tokens,
            "checksums": {name: crc_text(value) for name, value in self._checksums.items()},
        }
        text = json.dumps(seal(about | meta), ensure_ascii=False, indent=1)
        with open(self._folder / "meta.json", "w", opener=_private, encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
