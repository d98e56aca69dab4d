"""prompt, completion: both strings, or both lists of messages, which may have what messages may.

Of strings, the completion is trained. The prompt is tokenised alone, as it is in use; the rest is the completion's tokens in
context where the prompt's tokens stay the same there, else the completion tokenised alone. Either way the boundary between
prompt and completion is a boundary between tokens. The tokenizer's leading special tokens (bos) stand once in front, whether
the tokenizer or the text itself brings them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.cache import MASKED
from finetune.data.errors import DataError
from finetune.data.forms.base import Form, ParsedRow, RowEncoder, get
from finetune.data.forms.chat import CONTEXT, Chat, make_chat, refuse_context
from finetune.data.messages import parse_messages

if TYPE_CHECKING:
    from finetune.data.encode import Encoded


class PairEncoder(RowEncoder):
    """One example a row."""

    def encode(self, rows: Sequence[tuple[str, Pair]]) -> Iterator[list[Encoded]]:
        encoder, pairs = self._encoder, [row for _, row in rows]
        prompts = encoder.ids([row.prompt for row in pairs])
        joint = encoder.ids([row.prompt + row.completion for row in pairs])
        unstable = [i for i, prompt in enumerate(prompts) if joint[i][: len(prompt)] != prompt]
        alone = dict(zip(unstable, encoder.ids([pairs[i].completion for i in unstable]), strict=True))
        for index, prompt in enumerate(prompts):
            completion = alone.get(index, joint[index][len(prompt) :])
            head = encoder.with_prefix(prompt)
            ids = head + encoder.with_eos(completion, pairs[index].completion, encoder.append_eos is not False)
            labels = np.asarray(ids, np.int32)
            if encoder.completion_only:
                labels[: len(head)] = MASKED
            yield [encoder.cut(ids, labels)]


@dataclass(frozen=True, slots=True)
class Pair(ParsedRow):
    """A prompt and the completion that is trained, as plain text."""

    encoder = PairEncoder

    prompt: str
    completion: str

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.completion)


def parse(row: dict[str, Any], place: str, chat: bool) -> Chat | Pair:
    return parse_completion(row, "completion", place)


def parse_completion(row: dict[str, Any], key: str, place: str) -> Chat | Pair:
    """The prompt of the row with what it has under `key` as the completion."""
    prompt, completion = row.get("prompt"), row.get(key)
    if isinstance(prompt, list) and isinstance(completion, list):
        head, head_flags = parse_messages(prompt, "prompt", place)
        tail, tail_flags = parse_messages(completion, key, place)
        if not any(message["role"] == "assistant" for message in tail):
            raise DataError(f'{place}: "{key}" has no message of the assistant')
        parsed = make_chat(row, head + tail, head_flags + tail_flags, place)
        # What is before the completion is given, history too.
        return replace(parsed, trained=[i for i in parsed.trained if i >= len(parsed.messages) - len(tail)])
    prompt = get(row, "prompt", str, place)
    completion = get(row, key, str, place)
    if not completion:
        raise DataError(f'{place}: "{key}" is empty: there is nothing to learn in the row')
    refuse_context(row, place, "give prompt and completion as lists of messages, or write it into the prompt")
    return Pair(prompt, completion)


FORM = Form((("prompt", "completion"),), frozenset({"prompt", "completion", *CONTEXT}), parse)
