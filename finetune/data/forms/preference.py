"""prompt, chosen, rejected: a pair of answers to one prompt, of which one is preferred. Strings, or lists of messages.

Each answer is an example of its own, with the prompt before it: as `prompt` and `completion` are tokenised and masked. Of lists
of messages the prompt may be left out: then it is what both begin with. Where texts get scores, it may be left out of strings
too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.data.errors import DataError
from finetune.data.forms.base import Form, ParsedRow, RowEncoder, get
from finetune.data.forms.chat import CONTEXT, Chat, make_chat, refuse_context
from finetune.data.forms.prompt_completion import Pair, parse_completion
from finetune.data.messages import parse_messages

if TYPE_CHECKING:
    from finetune.data.encode import Encoded, Encoder


class PreferenceEncoder(RowEncoder):
    """Two examples a row: the chosen one, then the rejected one."""

    def encode(self, rows: Sequence[tuple[str, Preference]]) -> Iterator[list[Encoded]]:
        answers = one_text(self._encoder, [(place, one) for place, row in rows for one in (row.chosen, row.rejected)])
        for pair in zip(answers, answers, strict=True):
            yield list(pair)


def one_text(encoder: Encoder, answers: Sequence[tuple[str, ParsedRow]]) -> Iterator[Encoded]:
    """The (place, answer)s in order, each of which is to be one text. Raises DataError naming the place of one that is not."""
    kinds = dict.fromkeys(answer.encoder for _, answer in answers)
    found = {kind: encoder.of(kind).encode([one for one in answers if one[1].encoder is kind]) for kind in kinds}
    for place, answer in answers:
        texts = list(next(found[answer.encoder]))
        if len(texts) != 1:
            raise DataError(
                f"{place}: expected an answer that is one text, but the chat template writes its turns as {len(texts)}: leave "
                "the earlier turns to the prompt"
            )
        yield texts[0]


@dataclass(frozen=True, slots=True)
class Preference(ParsedRow):
    """Two answers to one prompt; by how much their scores should differ, for those who give scores."""

    encoder = PreferenceEncoder

    chosen: Chat | Pair
    rejected: Chat | Pair
    margin: float = 0.0

    @property
    def prompts(self) -> str | None:
        return self.chosen.prompts

    @property
    def size(self) -> int:
        return self.chosen.size + self.rejected.size


def parse(row: dict[str, Any], place: str, chat: bool) -> Preference:
    if not isinstance(row.get("prompt"), list) and all(isinstance(row.get(key), list) for key in ("chosen", "rejected")):
        row = _with_prompt(row, place)
    return Preference(*(parse_completion(row, key, place) for key in ("chosen", "rejected")))


def parse_scored(row: dict[str, Any], place: str) -> Preference:
    """A row whose texts get scores: without a prompt they are whole texts or conversations. Raises DataError."""
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f'{place}: expected "margin" to be a finite number, found {margin!r:.40}')
    if "prompt" in row:
        parsed = parse(row, place, True)
        return Preference(parsed.chosen, parsed.rejected, float(margin))
    return Preference(*(_whole_text(row, key, place) for key in ("chosen", "rejected")), float(margin))


def _whole_text(row: dict[str, Any], key: str, place: str) -> Chat | Pair:
    if isinstance(row.get(key), list):
        messages, flags = parse_messages(row[key], key, place)
        return make_chat(row, messages, flags, place)
    text = get(row, key, str, place)
    if not text:
        raise DataError(f'{place}: "{key}" is empty')
    refuse_context(row, place, 'give "chosen" and "rejected" as lists of messages')
    return Pair("", text)


def _with_prompt(row: dict[str, Any], place: str) -> dict[str, Any]:
    """The row with what both of its conversations begin with as the prompt; a text that is given as it must be there."""
    chosen, rejected = row["chosen"], row["rejected"]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    asked = row.get("prompt")
    if not prompt or asked is not None and asked not in [one.get("content") for one in prompt if isinstance(one, dict)]:
        raise DataError(
            f'{place}: expected "chosen" and "rejected" to begin with the same messages, the prompt'
            f'{"" if asked is None else " in the column of this name among them"}, found that they do not: give "prompt" as a '
            "list of messages"
        )
    return {**row, "prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}


FORM = Form((("chosen", "rejected"),), frozenset({"prompt", "chosen", "rejected", "margin", *CONTEXT}), parse)
