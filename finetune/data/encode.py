"""Parsed rows to token ids and labels: the one place that knows the tokenizer.

Which tokens are trained:

- Chat: the assistant's turns with what ends them. From the template's {% generation %} blocks where it has them. Else
  the conversation is rendered once whole and once up to each assistant turn; what the whole text adds between the
  generation prompt and the end of the turn is trained. This needs a template whose rendering of a part is how the
  whole begins; another is refused. The text is tokenised whole, so tokens are those that the model meets in use.
- Pair: the completion. The prompt is tokenised alone, as it is in use; the rest is the completion's tokens in context
  where the prompt's tokens stay the same there, else the completion tokenised alone. Either way the boundary between
  prompt and completion is a boundary between tokens. The tokenizer's leading special tokens (bos) stand once in front.
- TextPiece: everything; consecutive runs of `sequence_length` tokens, bos before the first, eos after the last.
- Tokens: as given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from finetune.data.cache import MASKED
from finetune.data.errors import DataError
from finetune.data.forms import Chat, Pair, Parsed, TextPiece, Tokens

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence, int32 [tokens] each, not longer than the sequence length; `truncated`: it was."""

    input_ids: np.ndarray
    labels: np.ndarray
    truncated: bool


class Encoder:
    """Encodes batches of parsed rows in order.

    tokenizer        a Transformers tokenizer; for chats it must give offsets (a "fast" one)
    vocab_size       ids of pre-tokenised rows must be below it
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
    ) -> None:
        if append_eos and tokenizer.eos_token_id is None:
            raise DataError("append_eos is on, but the tokenizer has no eos token: set append_eos to false")
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._sequence_length = sequence_length
        self._completion_only = completion_only
        self._append_eos = append_eos
        self._prefix = _leading_special_ids(tokenizer)
        # Longest first: one special token may begin another.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._enders = tuple(sorted(special, key=len, reverse=True))
        self._carry: list[int] = []  # tokens of a document that do not fill a sequence yet

    def encode(self, batch: Sequence[tuple[str, Parsed]]) -> Iterator[Encoded]:
        """Yield the sequences of (place, row) in order: one a row, any number for a TextPiece.

        Raises DataError naming the place.
        """
        chats = self._encode_chats([(place, row) for place, row in batch if isinstance(row, Chat)])
        pairs = self._encode_pairs([row for _, row in batch if isinstance(row, Pair)])
        pieces = iter(self._ids([row.text for _, row in batch if isinstance(row, TextPiece)]))
        for place, row in batch:
            match row:
                case Chat():
                    yield next(chats)
                case Pair():
                    yield next(pairs)
                case TextPiece():
                    yield from self._chunks(row, next(pieces))
                case Tokens():
                    yield self._encode_tokens(row, place)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _cut(self, ids: list[int], labels: np.ndarray) -> Encoded:
        limit = self._sequence_length
        return Encoded(np.asarray(ids[:limit], np.int32), labels[:limit], len(ids) > limit)

    def _with_eos(self, ids: list[int], wanted: bool | None) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return [*ids, eos] if wanted and eos is not None and ids[-1:] != [eos] else ids

    def _encode_tokens(self, row: Tokens, place: str) -> Encoded:
        for key, low, values in (("input_ids", 0, row.input_ids), ("labels", MASKED, row.labels)):
            for index, value in enumerate(values):
                if not (0 <= value < self._vocab_size or value == low):
                    also = "" if low == 0 else " or -100"
                    raise DataError(
                        f"{place}: expected {key}[{index}] between 0 and {self._vocab_size - 1}{also}, found {value}: "
                        "was the file made with another tokenizer?"
                    )
        return self._cut(row.input_ids, np.asarray(row.labels, np.int32))

    def _chunks(self, piece: TextPiece, ids: list[int]) -> Iterator[Encoded]:
        self._carry += (self._prefix if piece.first else []) + ids
        if piece.last:
            self._carry = self._with_eos(self._carry, self._append_eos is not False)
        limit = self._sequence_length
        whole = len(self._carry) // limit * limit
        for start in range(0, len(self._carry) if piece.last else whole, limit):
            chunk = self._carry[start : start + limit]
            yield self._cut(chunk, np.asarray(chunk, np.int32))
        self._carry = [] if piece.last else self._carry[whole:]

    def _encode_pairs(self, rows: list[Pair]) -> Iterator[Encoded]:
        prompts = self._ids([row.prompt for row in rows])
        joint = self._ids([row.prompt + row.completion for row in rows])
        unstable = [i for i, prompt in enumerate(prompts) if joint[i][: len(prompt)] != prompt]
        alone = dict(zip(unstable, self._ids([rows[i].completion for i in unstable]), strict=True))
        for index, prompt in enumerate(prompts):
            completion = alone.get(index, joint[index][len(prompt) :])
            head = self._prefix + prompt
            ids = head + self._with_eos(completion, self._append_eos is not False)
            labels = np.asarray(ids, np.int32)
            if self._completion_only:
                labels[: len(head)] = MASKED
            yield self._cut(ids, labels)

    def _encode_chats(self, rows: list[tuple[str, Chat]]) -> Iterator[Encoded]:
        if not rows:
            return
        place = rows[0][0]
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{place}: the row is a conversation, but the model's tokenizer has no chat template: give one with "
                "chat_template, or use prompt and completion"
            )
        if self._completion_only and not self._tokenizer.is_fast:
            raise DataError(
                f"{place}: training on completions of conversations needs a tokenizer that knows offsets, and "
                f"{type(self._tokenizer).__name__} does not: use completion_only=false, or prompt and completion"
            )
        rendered = [self._render_trained(row, place) for place, row in rows]
        out = self._tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=self._completion_only,
            verbose=False,
        )
        for index, (_, spans) in enumerate(rendered):
            ids = out["input_ids"][index]
            labels = np.asarray(ids, np.int32)
            if self._completion_only:
                # A token belongs to the span it starts in: one that began in the prompt is the prompt's.
                starts = np.asarray([start for start, _ in out["offset_mapping"][index]], np.int64)
                trained = np.zeros(len(ids), bool)
                for start, end in spans:
                    trained |= (starts >= start) & (starts < end)
                labels[~trained] = MASKED
            longer = self._with_eos(ids, self._append_eos)
            labels = np.append(labels, np.asarray(longer[len(ids) :], np.int32))
            yield self._cut(longer, labels)

    def _render(self, chat: Chat, messages: list[dict[str, Any]], place: str, *, prompt: bool) -> tuple[str, list]:
        """The text of some messages, and the (start, end) of its generation blocks."""
        template = self._tokenizer.get_chat_template(tools=chat.tools)
        try:
            texts, blocks = render_jinja_template(
                [messages],
                tools=chat.tools,
                chat_template=template,
                return_assistant_tokens_mask=_GENERATION.search(template) is not None,
                add_generation_prompt=prompt,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise DataError(f"{place}: the chat template refuses the conversation: {error}") from error
        return texts[0], list(blocks[0]) if blocks else []

    def _render_trained(self, chat: Chat, place: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the (start, end) of what is trained in it, in characters."""
        text, blocks = self._render(chat, chat.messages, place, prompt=False)
        if not self._completion_only:
            return text, []
        if _GENERATION.search(self._tokenizer.get_chat_template(tools=chat.tools)):
            start = self._turn_start(chat, chat.trained_from, text, place) if chat.trained_from else 0
            return text, [block for block in blocks if block[0] >= start]
        turns = [
            index
            for index, message in enumerate(chat.messages)
            if message["role"] == "assistant" and index >= chat.trained_from
        ]
        return text, [self._turn(chat, index, text, place) for index in turns]

    def _turn_start(self, chat: Chat, index: int, text: str, place: str) -> int:
        """Where message `index` begins to differ from the prompt that asks for it."""
        if index == 0:
            raise DataError(
                f"{place}: the conversation begins with the assistant: put a user message first, or use a chat "
                "template with {% generation %} blocks"
            )
        head, _ = self._render(chat, chat.messages[:index], place, prompt=True)
        if not text.startswith(head):
            raise self._unstable(place, f"the messages before message {index}")
        return len(head)

    def _turn(self, chat: Chat, index: int, text: str, place: str) -> tuple[int, int]:
        start = self._turn_start(chat, index, text, place)
        head, _ = self._render(chat, chat.messages[: index + 1], place, prompt=False)
        if text.startswith(head) and len(head) > start:
            turn = head[start:]
            body = turn.rstrip()
            # White space after the token that ends a turn is never generated: the turn is over by then.
            return start, start + (len(body) if body.endswith(self._enders) else len(turn))
        # Templates that write a last turn otherwise than an earlier one (Qwen3's reasoning): the turn ends where its
        # content and the token after it do.
        content = (chat.messages[index].get("content") or "").strip()
        found = text.find(content, start) if content else -1
        if found < 0:
            raise self._unstable(place, f"message {index}")
        end = found + len(content)
        ender = next((ender for ender in self._enders if text.startswith(ender, end)), "")
        return start, end + len(ender)

    def _unstable(self, place: str, what: str) -> DataError:
        return DataError(
            f"{place}: the chat template writes {what} differently once others follow, so what the assistant said "
            "cannot be told apart: give a chat_template with {% generation %} blocks, or set completion_only to false"
        )


def _leading_special_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text of its own accord: [bos] or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []
