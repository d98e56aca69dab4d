"""A conversation with the streamed model. The model is opened once; each turn reads all that was said before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.data.chat_template import ChatTemplate
from finetune.data.encode import check_ids
from finetune.decoding import Sampling, TextPieces, cache_bytes, chooser, decode, end_tokens
from finetune.generate import Waiting, open_speaker
from finetune.memory.errors import UserError
from finetune.planned_run import BatchShape
from finetune.runs.prompts import was_trained_on_plain_prompts

LEAST_TOKENS = 1024
"""That a conversation may have at least, with its last answer, where the model has as many positions."""


class Conversation:
    """`say` gives the answer to a turn. What no longer fits, the oldest turns, is forgotten.

    sampling: as in `finetune.generate`. Raises UserError for bad input, a model without a chat template among it, and
    PlanRefused for budgets that are too small.
    """

    def __init__(self, config: Config, adapter: Path | str | None, max_new_tokens: int = 256, **sampling: Any) -> None:
        self._how = Sampling(**sampling)
        self._how.processors()  # refuses now what it would refuse later
        self._session, self._config, self._tokenizer = open_speaker(config, adapter)
        try:
            self._open(adapter, max_new_tokens)
        except BaseException:
            self.close()
            raise

    def _open(self, adapter: Path | str | None, max_new_tokens: int) -> None:
        session, config = self._session, self._config
        if not self._tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {config.model} has no chat template: use finetune generate, or set dataset.chat_template"
            )
        text_config = session.parts.model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None) or sys.maxsize
        room = min(positions - session.adapter.positions, max(config.dataset.sequence_length, LEAST_TOKENS))
        self._most_new = min(max_new_tokens, room // 2)
        self._most_prompt = room - self._most_new
        kept = cache_bytes(session, self._most_prompt, self._most_new, 1)
        planned = session.plan(BatchShape.of_text(1, self._most_prompt, 1, train=False).keeping(kept))
        self._waiting = Waiting(planned)
        self._streamed = session.open(planned, config.output / "scratch", self._waiting)
        if adapter is not None and was_trained_on_plain_prompts(adapter):
            print("note: the run was trained without the chat template, which a conversation is written with", file=sys.stderr)
        self._ends = end_tokens(session.parts.directory, self._tokenizer.eos_token_id)
        self._template = ChatTemplate(self._tokenizer)
        self._messages: list[dict[str, str]] = []
        self._turns = 0

    def say(self, text: str) -> Iterator[str]:
        """The answer, in pieces of whole characters; it is part of the conversation when the last one was taken."""
        self._messages.append({"role": "user", "content": text})
        ids = self._prompt()
        chooses = chooser(self._how, ids, self._turns)
        passes = decode(self._streamed, [ids], [chooses], self._ends, self._most_new)
        pieces, said = TextPieces(self._tokenizer, ids), ""
        for tokens in self._waiting.until_the_first(passes):
            piece = "".join(pieces.add(token) for _, token in tokens if token not in self._ends)
            said += piece
            yield piece
        rest = pieces.rest()
        self._messages.append({"role": "assistant", "content": said + rest})
        self._turns += 1
        yield rest

    def _prompt(self) -> list[int]:
        """Token ids of the newest turns that fit. Raises UserError when the last one alone does not."""
        forgotten = 0
        while True:
            text = self._template.prompt(self._messages, self._config.model)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) <= self._most_prompt:
                break
            if len(self._messages) == 1:
                del self._messages[0]
                raise UserError(
                    f"a turn has {len(ids)} tokens, {self._most_prompt} have room: say less, or raise --set "
                    "dataset.sequence_length"
                )
            del self._messages[:2]
            forgotten += 1
        if forgotten:
            print(f"note: the oldest {forgotten} turns no longer fit and are forgotten", file=sys.stderr)
        check_ids(self._tokenizer, ids, self._session.model.get_input_embeddings().weight.shape[0])
        return ids

    def close(self) -> None:
        """Frees the model."""
        self._session.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
