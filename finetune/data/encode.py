"""Parsed rows to token ids and labels: what all classes of rows share of the tokenizer. How each becomes tokens, and which of
them are trained, is in its file in `finetune.data.forms`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.errors import DataError
from finetune.data.forms.base import ParsedRow, RowEncoder


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence, int32 [tokens] each, not longer than the sequence length; `truncated`: it was."""

    input_ids: np.ndarray  # token ids
    labels: np.ndarray  # the ids again, -100 where nothing is trained
    truncated: bool


class Encoder:
    """The tokenizer and how rows are to be encoded, for the classes of rows; and batches of rows, encoded in order.

    tokenizer        a Transformers tokenizer; for chats it must give offsets (a "fast" one)
    vocab_size       ids must be below it
    stride           as in `TokenOptions`
    append_eos       True, False, or None: True for pairs and text, left to the template for chats
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        sequence_length: int,
        completion_only: bool,
        append_eos: bool | None,
        stride: int | None = None,
    ) -> None:
        if append_eos and tokenizer.eos_token_id is None:
            raise DataError("append_eos is on, but the tokenizer has no eos token: set append_eos to false")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.stride = sequence_length if stride is None else stride
        self.completion_only = completion_only
        self.append_eos = append_eos
        self._prefix = leading_special_ids(tokenizer)
        self._encoders: dict[type[RowEncoder], RowEncoder] = {}

    def encode(self, batch: Sequence[tuple[str, ParsedRow]]) -> Iterator[Encoded]:
        """The sequences of (place, row) in order, any number a row. Raises DataError naming the place."""
        groups: dict[type[RowEncoder], list[tuple[str, ParsedRow]]] = {}
        for place, row in batch:
            groups.setdefault(row.encoder, []).append((place, row))
        found = {kind: self.of(kind).encode(rows) for kind, rows in groups.items()}
        for _, row in batch:
            yield from next(found[row.encoder])

    def notes(self) -> list[str]:
        """What the user should know of how rows became examples."""
        return [note for encoder in self._encoders.values() for note in encoder.notes()]

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def cut(self, ids: list[int], labels: np.ndarray) -> Encoded:
        """One sequence of ids and labels [tokens], no longer than it may be. Raises DataError for unknown ids."""
        limit = self.sequence_length
        check_ids(self.tokenizer, ids[:limit], self.vocab_size)
        return Encoded(np.asarray(ids[:limit], np.int32), labels[:limit], len(ids) > limit)

    def with_prefix(self, ids: list[int]) -> list[int]:
        """The tokenizer's leading special tokens once, where the text brings them too."""
        return with_prefix(self._prefix, ids)

    def with_eos(self, ids: list[int], text: str, wanted: bool | None) -> list[int]:
        """With the end token, unless `text`, which the ids end with, has it at its end."""
        eos = self.tokenizer.eos_token_id
        has_it = eos is None or ids[-1:] == [eos] or text.rstrip().endswith(self.tokenizer.eos_token)
        return [*ids, eos] if wanted and not has_it else ids

    def of(self, kind: type[RowEncoder]) -> RowEncoder:
        """The one encoder of this class."""
        if kind not in self._encoders:
            self._encoders[kind] = kind(self)
        return self._encoders[kind]


def check_ids(tokenizer: Any, ids: Sequence[int], vocab_size: int) -> None:
    """Raises DataError for a token that the model, whose embedding has `vocab_size` rows, does not know."""
    if (largest := max(ids, default=0)) >= vocab_size:
        raise DataError(
            f"token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but the model's embedding has {vocab_size} "
            f"rows; the tokenizer knows {len(tokenizer)} tokens: leave it out, or give a model that was resized for it "
            "(resize_token_embeddings)"
        )


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt as they stand in front of a completion in training: nothing that would end the text."""
    return with_prefix(leading_special_ids(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"])


def with_prefix(prefix: list[int], ids: list[int]) -> list[int]:
    """The tokenizer's leading special tokens once, where the text brings them too."""
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def leading_special_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text of its own accord: [bos] or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []
