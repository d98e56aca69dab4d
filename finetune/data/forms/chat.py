"""Conversations: what several forms become, and how they are tokenised.

The assistant's turns are trained with what ends them, see `finetune.data.chat_template`. The text is tokenised whole, so tokens
are those that the model meets in use; but a token that would reach over the end of a prompt, which nothing could generate after
that prompt, is cut there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.cache import MASKED
from finetune.data.errors import DataError
from finetune.data.forms.base import ParsedRow, RowEncoder
from finetune.data.messages import Message, parse_history, parse_system, parse_tools

if TYPE_CHECKING:
    from finetune.data.chat_template import ChatTemplate, Rendered
    from finetune.data.encode import Encoded

CONTEXT = ("system", "history", "tools", "functions", "chat_template_kwargs")
"""Columns that belong to a conversation."""

_NOTES = {
    "split": "{} conversations became several examples: the chat template writes turns differently when others follow",
    "put back": "{} thoughts that the chat template leaves out are written where its generation prompt opens them",
    "unopened": "{} turns are trained as the chat template writes them, without what its generation prompt adds to it",
}


class ChatEncoder(RowEncoder):
    """One example a row, or more."""

    @cached_property
    def template(self) -> ChatTemplate:
        from finetune.data.chat_template import ChatTemplate  # which imports Transformers

        return ChatTemplate(self._encoder.tokenizer)

    def notes(self) -> list[str]:
        counts = self.template.counts
        return [words.format(f"{counts[key]:,}") for key, words in _NOTES.items() if counts[key]]

    def encode(self, rows: Sequence[tuple[str, Chat]]) -> Iterator[list[Encoded]]:
        tokenizer, completion_only = self._encoder.tokenizer, self._encoder.completion_only
        place = rows[0][0]
        if not tokenizer.chat_template:
            raise DataError(
                f"{place}: the row is a conversation, but the model's tokenizer has no chat template: give one with "
                "chat_template, or use prompt and completion"
            )
        if completion_only and not tokenizer.is_fast:
            raise DataError(
                f"{place}: training on completions of conversations needs a tokenizer that knows offsets, and "
                f"{type(tokenizer).__name__} does not: use completion_only=false, or prompt and completion"
            )
        rendered = [self.template.examples(row, place, completion_only=completion_only) for place, row in rows]
        encoded = self._encode_rendered([one for examples in rendered for one in examples])
        for examples in rendered:
            yield [next(encoded) for _ in examples]

    def _encode_rendered(self, examples: list[Rendered]) -> Iterator[Encoded]:
        encoder = self._encoder
        out = encoder.tokenizer(
            [one.text for one in examples],
            add_special_tokens=False,
            return_offsets_mapping=encoder.completion_only,
            verbose=False,
        )
        for index, one in enumerate(examples):
            ids = out["input_ids"][index]
            labels = np.asarray(ids, np.int32)
            if encoder.completion_only:
                ids, starts = self._cut_at_prompts(one, ids, np.asarray(out["offset_mapping"][index]).reshape(-1, 2))
                trained = np.zeros(len(ids), bool)
                for start, end in one.spans:
                    trained |= (starts >= start) & (starts < end)
                labels = np.where(trained, np.asarray(ids, np.int32), MASKED).astype(np.int32)
            longer = encoder.with_eos(ids, one.text, encoder.append_eos)
            labels = np.append(labels, np.asarray(longer[len(ids) :], np.int32))
            yield encoder.cut(longer, labels)

    def _cut_at_prompts(self, one: Rendered, ids: list[int], offsets: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The ids, and where in the text each begins, with no token reaching over the begin of a trained span."""
        begins = [begin for begin, _ in one.spans if ((offsets[:, 0] < begin) & (begin < offsets[:, 1])).any()]
        if not begins:
            return ids, offsets[:, 0]
        bounds = [0, *sorted(begins), len(one.text)]
        pieces = [one.text[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        out = self._encoder.tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [
            [bound + start for start, _ in mapping]
            for bound, mapping in zip(bounds[:-1], out["offset_mapping"], strict=True)
        ]
        return [token for piece in out["input_ids"] for token in piece], np.concatenate(starts).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Chat(ParsedRow):
    """A conversation. trained: indices of the assistant's turns that are trained. excludes: the row says of a message that it
    is not to be trained. options: what the row gives the chat template beside messages and tools."""

    encoder = ChatEncoder
    prompts = "chat"

    messages: list[Message]
    trained: list[int]
    excludes: bool = False
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(message.get("content") or "") for message in self.messages)


def make_chat(row: dict[str, Any], messages: list[Message], flags: list[bool], place: str) -> Chat:
    """The conversation with what the row's other columns say of it. flags: whether each message may be trained."""
    system, history = parse_system(row, place), parse_history(row, place)
    if messages[0]["role"] == "system":
        if system and system[0]["content"] != messages[0]["content"]:
            raise DataError(f'{place}: found "system" and a first message of the system that differ: keep one of them')
        system, messages, flags = messages[:1], messages[1:], flags[1:]
    options = row.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or {"messages", "tools", "add_generation_prompt"} & options.keys():
        raise DataError(f'{place}: expected "chat_template_kwargs" to be an object of options, found {options!r:.80}')
    messages, flags = [*system, *history, *messages], [True] * len(system + history) + flags
    trained = [i for i, one in enumerate(messages) if one["role"] == "assistant" and flags[i]]
    return Chat(messages, trained, not all(flags), parse_tools(row, place), options)


def refuse_context(row: dict[str, Any], place: str, remedy: str) -> None:
    """Raises DataError for a row that is no conversation and has a column of one."""
    if found := [key for key in CONTEXT if row.get(key)]:
        raise DataError(f'{place}: "{found[0]}" belongs to a conversation, and this row is none: {remedy}')
