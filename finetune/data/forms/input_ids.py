"""input_ids: tokens that were made elsewhere; where there are any, labels (-100: not trained) or a mask of what is trained
(completion_mask, assistant_masks), and attention_mask (0: padding, removed)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.cache import MASKED
from finetune.data.errors import DataError
from finetune.data.forms.base import Form, ParsedRow, RowEncoder, get
from finetune.data.messages import kind_of

if TYPE_CHECKING:
    from finetune.data.encode import Encoded

_TRAINED = ("completion_mask", "assistant_masks")


class TokensEncoder(RowEncoder):
    """One example a row, as given."""

    def encode(self, rows: Sequence[tuple[str, Tokens]]) -> Iterator[list[Encoded]]:
        encoder, size = self._encoder, self._encoder.vocab_size
        for place, row in rows:
            for key, low, values in (("input_ids", 0, row.input_ids), ("labels", MASKED, row.labels)):
                for index, value in enumerate(values):
                    if not (0 <= value < size or value == low):
                        also = "" if low == 0 else f" or {MASKED}"
                        raise DataError(
                            f"{place}: expected {key}[{index}] between 0 and {size - 1}{also}, found {value}: "
                            "was the file made with another tokenizer?"
                        )
            yield [encoder.cut(row.input_ids, np.asarray(row.labels, np.int32))]


@dataclass(frozen=True, slots=True)
class Tokens(ParsedRow):
    """Token ids and labels of the same length; a label is an id or -100."""

    encoder = TokensEncoder
    prompts = None

    input_ids: list[int]  # as they stand in the row
    labels: list[int]  # -100: not trained

    @property
    def size(self) -> int:
        return len(self.input_ids)


def parse(row: dict[str, Any], place: str, chat: bool) -> Tokens:
    ids = _integers(row, "input_ids", place)
    if not ids:
        raise DataError(f'{place}: "input_ids" is an empty list')
    labels = _same_length(row, "labels", ids, place) or list(ids)
    if "loss_mask" in row:
        raise DataError(
            f'{place}: found "loss_mask", which some tools align with the next token: write "labels" (-100: not trained) or '
            '"completion_mask", as long as "input_ids" and aligned with them'
        )
    for key in _TRAINED:
        if trained := _mask(row, key, ids, place):
            if "labels" in row:
                raise DataError(
                    f'{place}: found "labels" and "{key}", which both say what is trained: keep one of them'
                )
            labels = [label if one else MASKED for label, one in zip(labels, trained, strict=True)]
    kept = _mask(row, "attention_mask", ids, place) or [1] * len(ids)
    start, end = kept.index(1) if 1 in kept else 0, len(kept) - kept[::-1].index(1) if 1 in kept else 0
    if not all(kept[start:end]):
        where = start + kept[start:end].index(0)
        raise DataError(
            f"{place}: attention_mask[{where}] is 0 between tokens that are attended to: only padding at the ends can be "
            "left out"
        )
    return Tokens(ids[start:end], labels[start:end])


def _same_length(row: dict[str, Any], key: str, ids: list[int], place: str) -> list[int] | None:
    values = _integers(row, key, place) if key in row else None
    if values is not None and len(values) != len(ids):
        raise DataError(f'{place}: expected "{key}" as long as "input_ids" ({len(ids)}), found {len(values)}')
    return values


def _mask(row: dict[str, Any], key: str, ids: list[int], place: str) -> list[int] | None:
    values = _same_length(row, key, ids, place)
    if values is not None and set(values) - {0, 1}:
        raise DataError(f'{place}: expected "{key}" of 0 and 1, found {max(set(values) - {0, 1})}')
    return values


def _integers(row: dict[str, Any], key: str, place: str) -> list[int]:
    values = get(row, key, list, place)
    for index, value in enumerate(values):
        if type(value) is not int and not (key.endswith(("mask", "masks")) and type(value) is bool):
            raise DataError(f"{place}: expected {key}[{index}] to be an integer, found {kind_of(value)}")
    return values


FORM = Form(
    (("input_ids",),),
    frozenset({"input_ids", "labels", "loss_mask", "attention_mask", *_TRAINED}),
    parse,
    has_answers=False,
    leads=True,
)
