"""prompt, completion, label: a completion, and whether it is wanted. What `prompt_completion` rows become where that counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.data.errors import DataError
from finetune.data.forms.base import ParsedRow, RowEncoder
from finetune.data.forms.preference import one_text
from finetune.data.messages import kind_of

if TYPE_CHECKING:
    from finetune.data.encode import Encoded


class LabelledEncoder(RowEncoder):
    """One example a row."""

    def encode(self, rows: Sequence[tuple[str, Labelled]]) -> Iterator[list[Encoded]]:
        answers = [(place, row.answer) for place, row in rows]
        for encoded in one_text(self._encoder, answers):
            yield [encoded]


@dataclass(frozen=True, slots=True)
class Labelled(ParsedRow):
    """An answer with its prompt, and whether it is wanted."""

    encoder = LabelledEncoder

    answer: ParsedRow
    label: bool

    @property
    def prompts(self) -> str | None:
        return self.answer.prompts

    @property
    def size(self) -> int:
        return self.answer.size


def with_label(answer: ParsedRow, row: dict[str, Any], place: str) -> Labelled:
    """The parsed row with what it says of itself. Raises DataError."""
    if not isinstance(row.get("label"), bool):
        found = "none" if "label" not in row else kind_of(row["label"])
        raise DataError(f'{place}: expected "label" to be true (wanted) or false, found {found}')
    return Labelled(answer, row["label"])
