"""Parsed rows to token ids and labels: the one place that knows the tokenizer.

Which tokens are trained:

- Chat: the assistant's turns with what ends them, see `finetune.data.chat_template`. The text is tokenised whole, so tokens
  are those that the model meets in use; but a token that would reach over the end of a prompt, which nothing could generate
  after that prompt, is cut there.
- Pair: the completion. The prompt is tokenised alone, as it is in use; the rest is the completion's tokens in context
  where the prompt's tokens stay the same there, else the completion tokenised alone. Either way the boundary between
  prompt and completion is a boundary between tokens. The tokenizer's leading special tokens (bos) stand once in front,
  whether the tokenizer or the text itself brings them.
- TextPiece: everything; consecutive runs of `sequence_length` tokens, bos before the first, eos after the last.
- Tokens: as given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.cache import MASKED
from finetune.data.chat_template import ChatTemplate, Rendered
from finetune.data.errors import DataError
from finetune.data.forms import Chat, Pair, Parsed, TextPiece, Tokens


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence, int32 [tokens] each, not longer than the sequence length; `truncated`: it was."""

    input_ids: np.ndarray  # token ids
    labels: np.ndarray  # the ids again, -100 where nothing is trained
    truncated: bool


class Encoder:
    """Encodes batches of parsed rows in order.

    tokenizer        a Transformers tokenizer; for chats it must give offsets (a "fast" one)
    vocab_size       ids must be below it
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
        self._prefix = leading_special_ids(tokenizer)
        self.template = ChatTemplate(tokenizer)
        self._carry: list[int] = []  # tokens of a document that do not fill a sequence yet

    def encode(self, batch: Sequence[tuple[str, Parsed]]) -> Iterator[Encoded]:
        """Yield the sequences of (place, row) in order: one a row, any number for a TextPiece, one or more for a Chat.

        Raises DataError naming the place.
        """
        chats = self._encode_chats([(place, row) for place, row in batch if isinstance(row, Chat)])
        pairs = self._encode_pairs([row for _, row in batch if isinstance(row, Pair)])
        pieces = iter(self._ids([row.text for _, row in batch if isinstance(row, TextPiece)]))
        for place, row in batch:
            match row:
                case Chat():
                    yield from next(chats)
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
        check_ids(self._tokenizer, ids[:limit], self._vocab_size)
        return Encoded(np.asarray(ids[:limit], np.int32), labels[:limit], len(ids) > limit)

    def _with_eos(self, ids: list[int], text: str, wanted: bool | None) -> list[int]:
        """With the end token, unless `text`, which the ids end with, has it at its end."""
        eos = self._tokenizer.eos_token_id
        has_it = eos is None or ids[-1:] == [eos] or text.rstrip().endswith(self._tokenizer.eos_token)
        return [*ids, eos] if wanted and not has_it else ids

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
        self._carry += with_prefix(self._prefix, ids) if piece.first else ids
        if piece.last:
            self._carry = self._with_eos(self._carry, piece.text, self._append_eos is not False)
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
            head = with_prefix(self._prefix, prompt)
            ids = head + self._with_eos(completion, rows[index].completion, self._append_eos is not False)
            labels = np.asarray(ids, np.int32)
            if self._completion_only:
                labels[: len(head)] = MASKED
            yield self._cut(ids, labels)

    def _encode_chats(self, rows: list[tuple[str, Chat]]) -> Iterator[list[Encoded]]:
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
        rendered = [self.template.examples(row, place, completion_only=self._completion_only) for place, row in rows]
        encoded = self._encode_rendered([one for examples in rendered for one in examples])
        for examples in rendered:
            yield [next(encoded) for _ in examples]

    def _encode_rendered(self, examples: list[Rendered]) -> Iterator[Encoded]:
        out = self._tokenizer(
            [one.text for one in examples],
            add_special_tokens=False,
            return_offsets_mapping=self._completion_only,
            verbose=False,
        )
        for index, one in enumerate(examples):
            ids = out["input_ids"][index]
            labels = np.asarray(ids, np.int32)
            if self._completion_only:
                ids, starts = self._cut_at_prompts(one, ids, np.asarray(out["offset_mapping"][index]).reshape(-1, 2))
                trained = np.zeros(len(ids), bool)
                for start, end in one.spans:
                    trained |= (starts >= start) & (starts < end)
                labels = np.where(trained, np.asarray(ids, np.int32), MASKED).astype(np.int32)
            longer = self._with_eos(ids, one.text, self._append_eos)
            labels = np.append(labels, np.asarray(longer[len(ids) :], np.int32))
            yield self._cut(longer, labels)

    def _cut_at_prompts(self, one: Rendered, ids: list[int], offsets: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The ids, and where in the text each begins, with no token reaching over the begin of a trained span."""
        begins = [begin for begin, _ in one.spans if ((offsets[:, 0] < begin) & (begin < offsets[:, 1])).any()]
        if not begins:
            return ids, offsets[:, 0]
        bounds = [0, *sorted(begins), len(one.text)]
        pieces = [one.text[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        out = self._tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [
            [bound + start for start, _ in mapping]
            for bound, mapping in zip(bounds[:-1], out["offset_mapping"], strict=True)
        ]
        return [token for piece in out["input_ids"] for token in piece], np.concatenate(starts).astype(np.int64)


def check_ids(tokenizer: Any, ids: Sequence[int], vocab_size: int) -> None:
    """Raises DataError for a token that the model, whose embedding has `vocab_size` rows, does not know."""
    if (largest := max(ids, default=0)) >= vocab_size:
        raise DataError(
            f"token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but the model's embedding has {vocab_size} "
            f"rows; the tokenizer knows {len(tokenizer)} tokens: leave it out, or give a model that was resized for it "
            "(resize_token_embeddings)"
        )


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt as they stand in front of a completion in training: nothing that would end the text."""
    return with_prefix(leading_special_ids(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"])


def with_prefix(prefix: list[int], ids: list[int]) -> list[int]:
    """The tokenizer's leading special tokens once, where the text brings them too."""
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def leading_special_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text of its own accord: [bos] or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []
