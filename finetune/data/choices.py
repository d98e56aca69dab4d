"""Rows that choose among a few completions: every row becomes one example for each completion of the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finetune.data.cache import CacheWriter, trained_tokens
from finetune.data.encode import Encoded, Encoder
from finetune.data.errors import DataError
from finetune.data.forms.base import ParsedRow
from finetune.data.forms.labelled import Labelled
from finetune.data.forms.preference import Preference
from finetune.data.forms.prompt_completion import Pair

MAX_CHOICES = 16


def find_choices(rows: Iterable[tuple[str, ParsedRow]]) -> list[str]:
    """The different completions of all (place, row), sorted. Raises DataError for other rows, and for too many."""
    found: set[str] = set()
    for place, row in rows:
        if not isinstance(row, Pair):
            raise DataError(f'{place}: comparing choices needs rows with "prompt" and "completion" as strings')
        found.add(row.completion)
        if len(found) > MAX_CHOICES:
            raise DataError(
                f"{place}: comparing choices needs at most {MAX_CHOICES} different completions in the data, and this "
                f"row brings the {MAX_CHOICES + 1}th: for free text measure the loss instead"
            )
    return sorted(found)


class Examples:
    """Writes rows as examples. truncated, dropped: how many were cut, and left out because no trained token was left of them.
    dropped_short: of those, how many were not even cut."""

    of_a_row = 1
    """Examples that a row becomes."""

    def __init__(self, encoder: Encoder, writer: CacheWriter) -> None:
        self.truncated = self.dropped = self.dropped_short = 0
        self._encoder = encoder
        self._writer = writer

    def add(self, batch: Sequence[tuple[str, ParsedRow]]) -> None:
        for one in self._encoder.encode(batch):
            if trained_tokens(one.labels):
                self._writer.add(one.input_ids, one.labels)
                self.truncated += one.truncated
            else:
                self.dropped += 1
                self.dropped_short += not one.truncated


class Pairs(Examples):
    """Writes rows of two answers as two examples; dropped: rows of which an answer has no trained token left."""

    of_a_row = 2

    def add(self, batch: Sequence[tuple[str, Preference]]) -> None:
        encoded = self._encoder.encode(batch)
        for (_, row), chosen, rejected in zip(batch, encoded, encoded, strict=True):
            is_cut = chosen.truncated or rejected.truncated
            if not self._takes(chosen) or not self._takes(rejected):
                self.dropped += 1
                self.dropped_short += not is_cut
                continue
            for one in (chosen, rejected):
                self._writer.add(one.input_ids, one.labels)
            self._note(row)
            self.truncated += is_cut

    def _takes(self, one: Encoded) -> bool:
        return bool(trained_tokens(one.labels))

    def _note(self, row: Preference) -> None:
        """Of a pair that was written."""


class ScoredPairs(Pairs):
    """The same with their margins; dropped: rows of which an answer is cut, whose score is that of its end."""

    def _takes(self, one: Encoded) -> bool:
        return super()._takes(one) and not one.truncated

    def _note(self, row: Preference) -> None:
        self._writer.add_margin(row.margin)


class Labels(Examples):
    """Writes rows of a completion and its label as one example each, with the label as the row's answer."""

    def add(self, batch: Sequence[tuple[str, Labelled]]) -> None:
        for (_, row), one in zip(batch, self._encoder.encode(batch), strict=True):
            if trained_tokens(one.labels):
                self._writer.add(one.input_ids, one.labels)
                self._writer.add_answer(int(row.label))
                self.truncated += one.truncated
            else:
                self.dropped += 1
                self.dropped_short += not one.truncated


class Candidates(Examples):
    """Writes each row with every one of `choices` as its completion; dropped: rows of which a candidate had to be cut."""

    def __init__(self, encoder: Encoder, writer: CacheWriter, choices: Sequence[str]) -> None:
        super().__init__(encoder, writer)
        self._choices = choices
        self.of_a_row = len(choices)

    def add(self, batch: Sequence[tuple[str, Pair]]) -> None:
        expanded = [(place, Pair(row.prompt, choice)) for place, row in batch for choice in self._choices]
        encoded = list(self._encoder.encode(expanded))
        for index, (_, row) in enumerate(batch):
            candidates = encoded[index * len(self._choices) : (index + 1) * len(self._choices)]
            # A candidate that is cut short cannot be compared with the others.
            if any(one.truncated or not trained_tokens(one.labels) for one in candidates):
                self.dropped += 1
                continue
            for one in candidates:
                self._writer.add(one.input_ids, one.labels)
            self._writer.add_answer(self._choices.index(row.completion))
