"""JSON as rows are written in it: one object a line, or arrays and objects one after the other, read as a stream.

What cannot be read whole is refused: a key that stands twice in an object would lose one of its values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from finetune.data.errors import DataError

JSON_BUFFER_CHARS = 1 << 16
MAX_ROW_CHARS = 1 << 26
_SPACE = re.compile(r"[\s\ufeff]*")  # joined files bring a byte order mark each
_UNFINISHED_CHARS = 16  # a literal, a number or an escape that the end of the buffer cuts is no longer


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key "{next(key for key in keys if keys.count(key) > 1)}" stands twice in one object')
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse_json(text: str) -> Any:
    """Raises ValueError with the reason, in words for the user."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "an integer of thousands of digits" if "integer string conversion" in str(error) else str(error)


def json_documents(stream: TextIO, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, object): the elements of top-level arrays, and top-level objects. `name` is the file's, for places.

    Raises DataError where what follows is neither, and at a file that ends within an array.
    """
    text = _Buffered(stream, name)
    while first := text.peek():
        if first == "{":
            yield text.row("the object")
        elif first == "[":
            text.skip()
            yield from _elements(text)
        else:
            raise DataError(f"{text.place}: expected an array or an object of JSON, found {text.ahead!r}")


def _elements(text: _Buffered) -> Iterator[tuple[str, Any]]:
    while (found := text.peek()) != "]":
        if not found:
            raise DataError(f"{text.place}: the file ends within the array: it was cut, or not written to its end")
        if found != "{":
            raise DataError(f"{text.place}: expected an object in the array, found {text.ahead!r}")
        yield text.row("the array's element")
        if text.peek() == ",":
            text.skip()
        elif text.peek() not in ("]", ""):
            raise DataError(f"{text.place}: expected a comma or the array's end, found {text.ahead!r}")
    text.skip()


class _Buffered:
    """A text read in pieces, and where in it one is."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._buffer, self._at, self._line = "", 0, 1

    @property
    def place(self) -> str:
        return f"{self._name}:{self._line}"

    @property
    def ahead(self) -> str:
        return self._buffer[self._at : self._at + 20]

    def peek(self) -> str:
        """The next character that is not space; empty at the end."""
        while True:
            self._move(_SPACE.match(self._buffer, self._at).end())
            if self._at < len(self._buffer) or not self._read(JSON_BUFFER_CHARS):
                return self._buffer[self._at : self._at + 1]

    def skip(self) -> None:
        self._at += 1

    def row(self, what: str) -> tuple[str, Any]:
        """The place of the value that begins here, and the value."""
        place, want = self.place, JSON_BUFFER_CHARS
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _UNFINISHED_CHARS
                # Read in growing steps, so that parsing it again stays cheap.
                if cut and len(self._buffer) - self._at <= MAX_ROW_CHARS and self._read(want):
                    want *= 2
                    continue
                self._move(min(error.pos, len(self._buffer)))
                raise DataError(f"{self.place}: {what} is not JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: {what} cannot be read: {_reason(error)}") from None
            self._move(end)
            return place, value

    def _move(self, end: int) -> None:
        self._line += self._buffer.count("\n", self._at, end)
        self._at = end

    def _read(self, chars: int) -> bool:
        try:
            more = self._stream.read(chars)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._name}: not UTF-8 after line {self._line}: save the file as UTF-8") from error
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)
