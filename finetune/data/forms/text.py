"""text: a document, of which everything is trained, in consecutive runs of `sequence_length` tokens, bos before the first, eos
after the last. With a stride, they overlap: what an earlier one has trained is seen and not trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.cache import MASKED
from finetune.data.errors import DataError
from finetune.data.forms.base import Form, ParsedRow, RowEncoder, get

if TYPE_CHECKING:
    from finetune.data.encode import Encoded, Encoder


class TextEncoder(RowEncoder):
    """Any number of examples a piece."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self._carry: list[int] = []  # tokens of a document that do not fill a sequence yet
        self._seen = 0  # of these, the first ones, that an earlier sequence has trained

    def encode(self, rows: Sequence[tuple[str, TextPiece]]) -> Iterator[Iterator[Encoded]]:
        for (_, piece), ids in zip(rows, self._encoder.ids([piece.text for _, piece in rows]), strict=True):
            yield self._sequences(piece, ids)

    def _sequences(self, piece: TextPiece, ids: list[int]) -> Iterator[Encoded]:
        encoder = self._encoder
        self._carry += encoder.with_prefix(ids) if piece.first else ids
        if piece.last:
            self._carry = encoder.with_eos(self._carry, piece.text, encoder.append_eos is not False)
        limit, start = encoder.sequence_length, 0
        while len(self._carry) - start >= limit or piece.last and len(self._carry) - start > self._seen:
            chunk = self._carry[start : start + limit]
            labels = np.asarray(chunk, np.int32)
            labels[: self._seen] = MASKED
            yield encoder.cut(chunk, labels)
            start += encoder.stride
            self._seen = limit - encoder.stride
        self._carry = [] if piece.last else self._carry[start:]
        if piece.last:
            self._seen = 0


@dataclass(frozen=True, slots=True)
class TextPiece(ParsedRow):
    """A consecutive part of one plain-text document."""

    encoder = TextEncoder

    text: str
    first: bool  # whether the document begins with it
    last: bool  # whether the document ends with it

    @property
    def size(self) -> int:
        return len(self.text)

    @property
    def begins(self) -> bool:
        return self.first

    @property
    def ends(self) -> bool:
        return self.last


def parse(row: dict[str, Any], place: str, chat: bool) -> TextPiece:
    text = get(row, "text", str, place)
    if not text:
        raise DataError(f'{place}: "text" is empty')
    return TextPiece(text, first=True, last=True)


FORM = Form((("text",),), frozenset({"text"}), parse, has_answers=False)
