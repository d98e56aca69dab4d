"""What a form is, and what a row of it becomes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.data.errors import DataError
from finetune.data.messages import check_text, kind_of

if TYPE_CHECKING:
    from finetune.data.encode import Encoded, Encoder


class RowEncoder(ABC):
    """Rows of one class to tokens. It is made once for all data, and may carry something over from row to row."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @abstractmethod
    def encode(self, rows: Sequence[tuple[str, Any]]) -> Iterator[Iterable[Encoded]]:
        """The sequences of each (place, row), in order. Raises DataError naming the place."""

    def notes(self) -> list[str]:
        """What the user should know of how rows became examples."""
        return []


class ParsedRow(ABC):
    """A row that is checked, whatever form it had."""

    __slots__ = ()
    encoder: ClassVar[type[RowEncoder]]
    prompts: ClassVar[str | None] = "plain"
    """How a model that is trained on it is asked later: "chat", through the chat template; "plain", with text as it is; None:
    the row came as tokens, and nothing is known."""

    @property
    @abstractmethod
    def size(self) -> int:
        """In characters (tokens, where that is what the row has): batches hold rows of some size together."""

    @property
    def begins(self) -> bool:
        """Whether a row of the data begins with it; the later pieces of a long document do not."""
        return True

    @property
    def ends(self) -> bool:
        """Whether a row of the data ends with it."""
        return True


@dataclass(frozen=True, slots=True)
class Form:
    """One kind of row."""

    needs: tuple[tuple[str, ...], ...]
    """Sets of columns: a row that has all of one set is of this form."""
    reads: frozenset[str]
    """Every column that it looks at."""
    parse: Callable[[dict[str, Any], str, bool], ParsedRow]
    """(row without nulls, its place, whether there is a chat template) to what it becomes. Raises DataError naming the place,
    the key, what was expected and what was found."""
    has_answers: bool = True
    """Whether rows hold answers: then pictures and sounds, and "label" false, say something of them and are refused."""
    leads: bool = False
    """Whether a row that has the columns of other forms too is of this one."""


_NAMES = {str: "a string", list: "a list", dict: "an object"}


def get(row: dict[str, Any], key: str, kind: type, place: str) -> Any:
    """The value of `key`, of that kind. Raises DataError."""
    if key not in row:
        found = ", ".join(f'"{k}"' for k in list(row)[:12]) or "no keys"
        raise DataError(f'{place}: expected "{key}", found {found}')
    if not isinstance(row[key], kind):
        raise DataError(f'{place}: expected "{key}" to be {_NAMES[kind]}, found {kind_of(row[key])}')
    return check_text(row[key], key, place) if kind is str else row[key]
