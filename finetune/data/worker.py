"""The preparing process: `python -m finetune.data.worker`, started by `finetune.data.preparation`.

It reads one job (JSON) from standard input and writes a token cache into the job's folder. On standard output it writes
JSON lines: {"rows", "tokens"} while it works, {"error"} when the data cannot be used (exit code 1). What libraries
print goes to standard error. Its memory does not grow with the data.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.cache import CacheWriter, trained_tokens
from finetune.data.errors import DataError
from finetune.data.forms import Chat, Pair, Parsed, TextPiece, Tokens, detect_form, parse
from finetune.data.sources import File, HubSplit, read_rows

MAX_CHOICES = 16
BATCH_ROWS = 256
BATCH_CHARS = 1 << 18
ROWS_SEARCHED_FOR_MORE_ERRORS = 100_000
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything the process needs; `folder` exists and is empty."""

    folder: str  # where the cache is written
    sources: list[dict[str, Any]]  # fields of the `File` and `HubSplit` objects to read
    tokenizer: str  # directory of its files
    fingerprint: str  # of the tokenizer's files, which the cache's name holds
    model: str  # its directory or id, for messages
    sequence_length: int  # tokens of an example at most
    form: str  # of the rows, see `finetune.data.forms`; or auto
    completion_only: bool  # see `DatasetOptions`, as for the next three
    append_eos: bool | None
    chat_template: str | None
    trust_remote_code: bool
    choices: bool  # whether every row gets all completions of the data as candidates


def run(job: Job, report: Callable[[int, int], None]) -> None:
    """Write the cache of `job`. `report(rows, tokens)` is called after each batch. Raises DataError."""
    sources = [File(**source) if "path" in source else HubSplit(**source) for source in job.sources]
    if any(isinstance(source, HubSplit) and source.commit is None for source in sources):
        # The hub was just found out of reach: take what was downloaded before, without minutes of trying again.
        os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer = _load_tokenizer(job)
    rows = _Rows(sources, job.form, chat=bool(tokenizer.chat_template))
    choices = _find_choices(rows) if job.choices else None

    from finetune.data.encode import Encoder

    # Candidates are compared by their own likelihood; an eos after them would only add noise.
    append_eos = False if choices and job.append_eos is None else job.append_eos
    vocab_size = _vocab_size(job, tokenizer)
    encoder = Encoder(
        tokenizer,
        vocab_size=vocab_size,
        sequence_length=job.sequence_length,
        completion_only=job.completion_only,
        append_eos=append_eos,
    )
    writer = CacheWriter(Path(job.folder))
    truncated = dropped = dropped_short = 0
    for batch in _batches(rows):
        if choices:
            expanded = [(place, Pair(row.prompt, choice)) for place, row in batch for choice in choices]
            encoded = list(encoder.encode(expanded))
            for index, (_, row) in enumerate(batch):
                candidates = encoded[index * len(choices) : (index + 1) * len(choices)]
                # A candidate that is cut short cannot be compared with the others.
                if any(one.truncated or not trained_tokens(one.labels) for one in candidates):
                    dropped += 1
                    continue
                for one in candidates:
                    writer.add(one.input_ids, one.labels)
                writer.add_answer(choices.index(row.completion))
        else:
            for one in encoder.encode(batch):
                if trained_tokens(one.labels):
                    writer.add(one.input_ids, one.labels)
                    truncated += one.truncated
                else:
                    dropped += 1
                    dropped_short += not one.truncated
        report(rows.count, writer.tokens)
    names = ", ".join(source.name for source in sources)
    if not writer.examples:
        why = "none has a trained token" if dropped else "the data is empty"
        if dropped > dropped_short:
            why += f" in its first {job.sequence_length}: raise sequence_length"
        raise DataError(f"{names}: no example is left of {rows.count} rows: {why}")
    # A padding token that was added to the tokenizer alone has no row in the model's table: any other does as well.
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((i for i in pads if i is not None and i < vocab_size), 0)
    writer.finish(
        {
            "form": "+".join(sorted(rows.forms)),
            "prompts": next(iter(rows.prompts)) if len(rows.prompts) == 1 else None,
            "sources": [source.name for source in sources],
            "rows": rows.count,
            "truncated": truncated,
            "dropped": dropped,
            "notes": _notes(encoder.template.counts),
            "sequence_length": job.sequence_length,
            "completion_only": job.completion_only,
            "tokenizer": job.fingerprint,
            "pad_token_id": pad,
            "eos_token_id": tokenizer.eos_token_id,
            "choices": choices,
            "different_completions": len(rows.completions) if 0 < len(rows.completions) <= MAX_CHOICES else None,
        }
    )


def _notes(counts: Counter[str]) -> list[str]:
    """What the user should know of how conversations became examples."""
    said = {
        "split": "{} conversations became several examples: the chat template writes turns differently when others follow",
        "put back": "{} thoughts that the chat template leaves out are written where its generation prompt opens them",
        "unopened": "{} turns are trained as the chat template writes them, without what its generation prompt adds to it",
    }
    return [words.format(f"{counts[key]:,}") for key, words in said.items() if counts[key]]


class _Rows:
    """The parsed rows of all sources, in order, as often as they are asked for."""

    def __init__(self, sources: list[File | HubSplit], form: str, *, chat: bool) -> None:
        self._sources = sources
        self._form = form
        self._chat = chat
        self.count = 0
        self.forms: set[str] = set()
        self.prompts: set[str] = set()  # "chat": through the chat template; "plain": as they are
        self.completions: set[str] = set()  # no more than one above MAX_CHOICES are kept

    def __iter__(self) -> Iterator[tuple[str, Parsed]]:
        self.count = 0
        for source in self._sources:
            yield from self._of(source)

    def _of(self, source: File | HubSplit) -> Iterator[tuple[str, Parsed]]:
        form = None if self._form == "auto" else self._form
        rows = read_rows(source)
        for place, row in rows:
            try:
                if isinstance(row, DataError):
                    raise row
                if form is None:
                    form = detect_form(row, place)
                self.forms.add(form)
                parsed = parse(row, form, place, chat=self._chat)
            except DataError as error:
                raise DataError(f"{error}{self._more(rows, form)}") from error
            if not isinstance(parsed, Tokens):
                self.prompts.add("chat" if isinstance(parsed, Chat) else "plain")
            # The pieces of a text file are one row.
            if isinstance(parsed, Pair) and len(self.completions) <= MAX_CHOICES:
                self.completions.add(parsed.completion)
            self.count += not isinstance(parsed, TextPiece) or parsed.first
            yield place, parsed

    def _more(self, rows: Iterator[tuple[str, Any]], form: str | None) -> str:
        """How many of the rows that follow a bad one are bad too, in words."""
        bad = 0
        if form is not None:
            for searched, (place, row) in enumerate(_until_unreadable(rows)):
                if searched == ROWS_SEARCHED_FOR_MORE_ERRORS:
                    return f" (and at least {bad} more bad rows)"
                try:
                    if isinstance(row, DataError):
                        raise row
                    parse(row, form, place, chat=self._chat)
                except DataError:
                    bad += 1
        return f" (and {bad} more bad row{'s' if bad > 1 else ''})" if bad else ""


def _until_unreadable(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    try:
        yield from rows
    except DataError as error:
        yield "", error


def _find_choices(rows: _Rows) -> list[str]:
    for place, row in rows:
        if not isinstance(row, Pair):
            raise DataError(f'{place}: comparing choices needs rows with "prompt" and "completion" as strings')
        if len(rows.completions) > MAX_CHOICES:
            raise DataError(
                f"{place}: comparing choices needs at most {MAX_CHOICES} different completions in the data, and this "
                f"row brings the {MAX_CHOICES + 1}th: for free text measure the loss instead"
            )
    return sorted(rows.completions)


def _batches(rows: _Rows) -> Iterator[list[tuple[str, Parsed]]]:
    """Rows in batches that stay small in rows and in characters."""
    batch, size = [], 0
    for place, row in rows:
        batch.append((place, row))
        match row:
            case TextPiece():
                size += len(row.text)
            case Pair():
                size += len(row.prompt) + len(row.completion)
            case Chat():
                size += sum(len(message.get("content") or "") for message in row.messages)
            case Tokens():
                size += len(row.input_ids)
        if len(batch) >= BATCH_ROWS or size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _load_tokenizer(job: Job) -> Any:
    if not job.trust_remote_code:
        # Transformers' tokenizers work without torch, which would more than triple this process' memory. It looks for
        # torch once, while it is imported.
        sys.modules["torch"] = None
    from transformers import AutoTokenizer

    if not job.trust_remote_code:
        del sys.modules["torch"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(job.tokenizer, trust_remote_code=job.trust_remote_code)
    except Exception as error:  # Transformers raises whatever its parts do
        raise DataError(
            f"the tokenizer of {job.model} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}): bring "
            "its files (tokenizer.json, ...) from where the model came from"
        ) from error
    if job.chat_template is not None:
        tokenizer.chat_template = job.chat_template
    return tokenizer


def _vocab_size(job: Job, tokenizer: Any) -> int:
    """Rows of the model's embedding, which is often longer than its tokenizer, and shorter where tokens were added to that
    alone; of the tokenizer where config.json does not say."""
    try:
        config = json.loads((Path(job.tokenizer) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return len(tokenizer)
    sizes = (config.get("vocab_size"), (config.get("text_config") or {}).get("vocab_size"))
    return max((size for size in sizes if isinstance(size, int)), default=len(tokenizer))


def _die_with_parent() -> None:
    """Also where the parent is killed and can't end us."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> int:
    _die_with_parent()
    # Libraries may print: keep the way to the parent to ourselves.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.load(sys.stdin))
    last = 0.0

    def report(rows: int, tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            print(json.dumps({"rows": rows, "tokens": tokens}), file=channel, flush=True)

    try:
        run(job, report)
    except DataError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"no room for the token cache in {Path(job.folder).parents[1]}: {error.strerror}"
    else:
        return 0
    print(json.dumps({"error": message}), file=channel, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
