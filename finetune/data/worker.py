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
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.data.cache import CacheWriter
from finetune.data.choices import MAX_CHOICES, Candidates, Examples, Labels, Pairs, ScoredPairs, find_choices
from finetune.data.encode import Encoder
from finetune.data.errors import DataError
from finetune.data.forms.base import ParsedRow
from finetune.data.forms.prompt_completion import Pair
from finetune.data.job import MOST_READ, Job
from finetune.data.mixing import interleave
from finetune.data.rows import check_judged, detect_form, parse
from finetune.data.sources import File, HubSplit, read_rows, source_of

BATCH_ROWS = 256
BATCH_CHARS = 1 << 18
ROWS_SEARCHED_FOR_MORE_ERRORS = 100_000
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_WRITERS = {"": Examples, "pairs": Pairs, "scores": ScoredPairs, "labels": Labels}  # by `TokenOptions.judged`


def run(job: Job, report: Callable[[int, int], None]) -> None:
    """Write the cache of `job`. `report(rows, tokens)` is called after each batch. Raises DataError."""
    sources = [[source_of(fields) for fields in source] for source in job.sources]
    parts = list(chain.from_iterable(sources))
    if any(isinstance(part, HubSplit) and part.commit is None for part in parts):
        # The hub was just found out of reach: take what was downloaded before, without minutes of trying again.
        os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer = _load_tokenizer(job)
    rows = _Rows(job, sources, chat=bool(tokenizer.chat_template))
    choices = find_choices(rows) if job.choices else None
    encoder = Encoder(
        tokenizer,
        vocab_size=_vocab_size(job, tokenizer),
        sequence_length=job.sequence_length,
        stride=job.stride,
        completion_only=job.completion_only and job.judged != "scores",
        # Candidates are compared by their own likelihood; an eos after them would only add noise.
        append_eos=False if choices and job.append_eos is None else job.append_eos,
    )
    writer = CacheWriter(Path(job.folder))
    if choices:
        examples = Candidates(encoder, writer, choices)
    else:
        examples = _WRITERS[job.judged](encoder, writer)
    missing = partial(_missing, job, examples, writer)
    for batch in _batches(rows, missing):
        examples.add(batch)
        report(rows.count, writer.tokens)
        if missing() <= 0:
            break
    names = [part.label for part in parts]
    if not writer.examples:
        why = "none has a trained token" if examples.dropped else "the data is empty"
        if examples.dropped > examples.dropped_short:
            why += f" in its first {job.sequence_length}: raise sequence_length"
        raise DataError(f"{', '.join(names)}: no example is left of {rows.count} rows: {why}")
    writer.finish(
        {
            "form": "+".join(sorted(rows.forms)),
            "prompts": next(iter(rows.prompts)) if len(rows.prompts) == 1 else None,
            "sources": names,
            "rows": rows.count,
            "rows_of": [[_label(source), count] for source, count in zip(sources, rows.counts, strict=True)],
            "truncated": examples.truncated,
            "dropped": examples.dropped,
            "notes": encoder.notes() + _repeats(job, examples, writer, rows.count),
            "enough": missing() <= 0,
            "sequence_length": job.sequence_length,
            "completion_only": job.completion_only,
            "tokenizer": job.fingerprint,
            "pad_token_id": _padding(tokenizer, encoder.vocab_size),
            "eos_token_id": tokenizer.eos_token_id,
            "choices": choices,
            "judged": job.judged,
            "different_completions": rows.different_completions,
        }
    )


def _missing(job: Job, examples: Examples, writer: CacheWriter) -> float:
    """Rows that are still to be written for all steps, of packed ones tokens; infinity: all that there are."""
    if job.most_tokens is not None:
        return job.most_tokens - writer.tokens
    return math.inf if job.most_rows is None else job.most_rows - writer.examples // examples.of_a_row


def _repeats(job: Job, examples: Examples, writer: CacheWriter, count: int) -> list[str]:
    """A note where the steps take more than there is. count: rows that were read."""
    missing = _missing(job, examples, writer)
    if math.isinf(missing) or missing <= 0:
        return []
    word, wanted = ("rows", job.most_rows) if job.most_tokens is None else ("tokens", job.most_tokens)
    found = wanted - missing
    return [
        f"the steps take {wanted:,} {word}, and the {count:,} rows that were read of the data give {found:,}: each is used "
        f"{wanted / max(1, found):.1f} times"
    ]


def _label(source: list[File | HubSplit]) -> str:
    return source[0].label + (f" and {len(source) - 1} more" if source[1:] else "")


class _Rows:
    """The parsed rows of all sources, one source after the other or mixed, as often as they are asked for.

    counts: how many of each source were given since.
    """

    def __init__(self, job: Job, sources: list[list[File | HubSplit]], *, chat: bool) -> None:
        self._job = job
        self._sources = sources
        self._form = job.form
        self._judged = job.judged
        self._chat = chat
        # Rows may be left out: even then an endless stream is to end. Choices are those of no more rows than are needed.
        times = 1 if job.choices else MOST_READ
        self._most_rows = job.most_tokens if job.most_rows is None else times * job.most_rows
        self.counts = [0] * len(sources)
        self.forms: set[str] = set()
        self.prompts: set[str] = set()  # see `ParsedRow.prompts`
        self.completions: set[str] = set()  # no more than one above MAX_CHOICES are kept

    @property
    def count(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[tuple[str, ParsedRow]]:
        job, self.counts = self._job, [0] * len(self._sources)
        if job.probabilities:
            sources = [partial(self._of, parts) for parts in self._sources]
            rows = interleave(sources, job.probabilities, job.mixing_seed, job.stopping_strategy)
        else:
            rows = ((i, place, row) for i, parts in enumerate(self._sources) for place, row in self._of(parts))
        for index, place, row in rows:
            if row.prompts is not None:
                self.prompts.add(row.prompts)
            if isinstance(row, Pair) and len(self.completions) <= MAX_CHOICES:
                self.completions.add(row.completion)
            self.counts[index] += row.begins
            yield place, row
            if row.ends and self.count == self._most_rows:
                return

    @property
    def different_completions(self) -> int | None:
        """Of rows of prompt and completion, so far; None: there are none, or more than can be compared."""
        return len(self.completions) if 0 < len(self.completions) <= MAX_CHOICES else None

    def _of(self, source: list[File | HubSplit]) -> Iterator[tuple[str, ParsedRow]]:
        return chain.from_iterable(map(self._of_part, source))

    def _of_part(self, part: File | HubSplit) -> Iterator[tuple[str, ParsedRow]]:
        form = None if self._form == "auto" else self._form
        rows = read_rows(part, streaming=self._job.streaming)
        for place, row in rows:
            try:
                if isinstance(row, DataError):
                    raise row
                if form is None:
                    form = detect_form(row, place, self._judged)
                check_judged(form, self._judged, place)
                self.forms.add(form)
                parsed = parse(row, form, place, chat=self._chat, judged=self._judged)
            except DataError as error:
                raise DataError(f"{error}{self._more(rows, form)}") from error
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
                    parse(row, form, place, chat=self._chat, judged=self._judged)
                except DataError:
                    bad += 1
        return f" (and {bad} more bad row{'s' if bad > 1 else ''})" if bad else ""


def _until_unreadable(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    try:
        yield from rows
    except DataError as error:
        yield "", error


def _batches(rows: _Rows, missing: Callable[[], float]) -> Iterator[list[tuple[str, ParsedRow]]]:
    """Rows in batches that stay small in rows and in characters, of no more rows than are missing."""
    batch, size = [], 0
    for place, row in rows:
        batch.append((place, row))
        size += row.size
        if len(batch) >= min(BATCH_ROWS, missing()) or size >= BATCH_CHARS:
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


def _padding(tokenizer: Any, vocab_size: int) -> int:
    """A padding token that was added to the tokenizer alone has no row in the model's table: any other does as well."""
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in pads if i is not None and i < vocab_size), 0)


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
