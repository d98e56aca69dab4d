"""Text from the streamed model, piece by piece. A token costs one pass over the weights, shared by all prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.data.chat_template import ChatTemplate
from finetune.data.encode import check_ids, prompt_ids
from finetune.decoding import (
    Sampling,
    TextPieces,
    cache_bytes,
    cache_size,
    chooser,
    decode,
    end_tokens,
    load_tokenizer,
)
from finetune.memory.errors import UserError
from finetune.memory.meter import host_bytes
from finetune.memory.plan import PlanRefused
from finetune.methods.results import find_result
from finetune.needs_of_model import check_device_cuts
from finetune.planned_run import BatchShape, PlannedRun
from finetune.reporting.progress import Progress
from finetune.runs.prompts import as_trained, was_trained_on_plain_prompts
from finetune.sequence_chunk_choice import settle_sequence_chunk
from finetune.session import Session


def generate(
    config: Config,
    adapter: Path | str | None,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    chat: bool | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Yields what the model says after each prompt, in pieces of whole characters; with several prompts the texts come
    one after the other with an empty line between.

    adapter: of a PEFT adapter, or of a run, whose adapter or tuned weights are used; None: the model as it is.
    sampling: the fields of `finetune.decoding.Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, seed and more.
    chat: whether a prompt is a user's turn in the tokenizer's chat template; None: where there is a template, unless a run was
    trained on prompts without it.
    A text ends at a token that generation_config.json (else config.json) or the tokenizer calls the end, after
    `max_new_tokens`, or where the model's positions end.
    Raises UserError for bad input and PlanRefused for budgets that are too small.
    """
    how = Sampling(**sampling)
    how.processors()  # refuses now what it would refuse later
    session, config, tokenizer = open_speaker(config, adapter)
    try:
        if chat is None and tokenizer.chat_template and adapter is not None and was_trained_on_plain_prompts(adapter):
            chat = False
            words = "note: the run was trained without the chat template, so the prompt is not put into it; --chat does that"
            print(words, file=sys.stderr)
        ids = [_encode(tokenizer, prompt, chat, config) for prompt in prompts]
        check_ids(tokenizer, list(chain.from_iterable(ids)), session.model.get_input_embeddings().weight.shape[0])
        max_new_tokens = _room(session, max(map(len, ids)), max_new_tokens)
        longest = max(map(len, ids))
        settle_sequence_chunk(session, lambda _: _plan_for(session, longest, max_new_tokens, 1), longest=longest)
        planned = _plan(session, ids, max_new_tokens)
        waiting = Waiting(planned)
        streamed = session.open(planned, config.output / "scratch", waiting)
        ends = end_tokens(session.parts.directory, tokenizer.eos_token_id)
        together, counted = planned.shape.micro_batches, _Counted()
        for first in range(0, len(ids), together):
            group = ids[first : first + together]
            choosers = [chooser(how, prompt, first + i) for i, prompt in enumerate(group)]
            passes = decode(streamed, group, choosers, ends, max_new_tokens, piece=_piece(session.config))
            if first:
                yield "\n\n"
            yield from _texts(waiting.until_the_first(counted(passes)), [TextPieces(tokenizer, one) for one in group], ends)
        if streamed.guesses.chosen:
            print(f"note: {counted.words}; {streamed.guesses.words}", file=sys.stderr)
    finally:
        session.close()


def open_speaker(config: Config, adapter: Path | str | None) -> tuple[Session, Config, Any]:
    """A session with what `adapter` names, the configuration that goes with it, and the tokenizer. Raises UserError."""
    config = as_trained(config, adapter)
    # Nothing waits for a backward pass.
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"activations": "host"})})
    session = Session(find_result(config, adapter))
    try:
        if session.parts.head is None:
            found = type(session.parts.model).__name__
            raise UserError(f"{config.model}: expected a language model to generate with, found {found}")
        return session, config, load_tokenizer(session.parts.directory, config)
    except BaseException:
        session.close()
        raise


class Waiting:
    """Says what is waited for until the first token is there; then the line is the text's."""

    def __init__(self, planned: PlannedRun) -> None:
        self._budget_bytes = planned.plan.host_budget_bytes
        self._progress: Progress | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress.inside("first token, block", done, total)

    def until_the_first(self, passes: Iterator[list[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
        """The same passes, as `decode` yields them."""
        self._progress = Progress(None, host_budget_bytes=self._budget_bytes, peak_bytes=host_bytes)
        try:
            yield from self._ending(passes)
        finally:
            self._end()

    def _ending(self, passes: Iterator[list[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
        for tokens in passes:
            self._end()
            yield tokens

    def _end(self) -> None:
        if self._progress is not None:
            self._progress.clear()
            self._progress = None


class _Counted:
    """How many tokens came, and in which time."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def __call__(self, passes: Iterator[list[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
        """The same passes, as `decode` yields them."""
        started = time.perf_counter()
        for tokens in passes:
            self.seconds += time.perf_counter() - started
            self.tokens += len(tokens)
            yield tokens
            started = time.perf_counter()

    @property
    def words(self) -> str:
        return f"{self.tokens} tokens, {self.tokens / max(self.seconds, 1e-9):.2f} a second"


def _texts(passes: Iterable[list[tuple[int, int]]], texts: list[TextPieces], ends: frozenset[int]) -> Iterator[str]:
    """The first text as it comes, then the others, with an empty line before each. passes: as `decode` yields them."""
    later: list[list[str]] = [[] for _ in texts]
    for tokens in passes:
        for i, token in tokens:
            if token in ends:
                continue
            if i == 0:
                yield from filter(None, [texts[0].add(token)])
            else:
                later[i].append(texts[i].add(token))
    yield texts[0].rest()
    for text, pieces in zip(texts[1:], later[1:], strict=True):
        yield "\n\n" + "".join(pieces) + text.rest()


def _encode(tokenizer: Any, prompt: str, chat: bool | None, config: Config) -> list[int]:
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {config.model} has no chat template: leave --chat out, or set dataset.chat_template"
        )
    if chat or (chat is None and tokenizer.chat_template):
        text = ChatTemplate(tokenizer).prompt([{"role": "user", "content": prompt}], config.model)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes them
    else:
        ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise UserError("expected a prompt, found one without any token: give --prompt TEXT")
    return ids


def _room(session: Session, prompt_tokens: int, max_new_tokens: int) -> int:
    """New tokens that the model has positions for. Raises UserError when the prompt takes them all."""
    positions = getattr(session.parts.model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        positions -= session.adapter.positions
    if not positions or prompt_tokens + max_new_tokens <= positions:
        return max_new_tokens
    if prompt_tokens >= positions:
        raise UserError(f"the prompt has {prompt_tokens} tokens, the model {positions} positions: shorten the prompt")
    return positions - prompt_tokens


def _plan(session: Session, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> PlannedRun:
    """A plan that holds the key-value caches too, for as many prompts at once as fit."""
    together = len(prompts)
    while True:
        try:
            return _plan_for(session, max(map(len, prompts)), max_new_tokens, together)
        except PlanRefused:
            if together == 1:
                raise
            together = -(-together // 2)


def _piece(config: Config) -> int | None:
    """Tokens of a prompt that go through the model together; None: all."""
    return config.engine.sequence_chunk


def _plan_for(session: Session, prompt_tokens: int, max_new_tokens: int, together: int) -> PlannedRun:
    piece = _piece(session.config)
    if piece is not None and piece < prompt_tokens + max_new_tokens:
        check_device_cuts(session.device)
        tokens = min(piece, prompt_tokens)
        size = cache_size(session, tokens, prompt_tokens + max_new_tokens, together, piece=piece)
        shape = BatchShape.of_text(1, tokens, together, train=False).filling_caches(size.near_bytes)
        return session.plan(replace(shape, cache_bytes=size.kept_bytes))
    kept = cache_bytes(session, prompt_tokens, max_new_tokens, together)
    return session.plan(BatchShape.of_text(1, prompt_tokens, together, train=False).filling_caches(kept))
