"""Data to token cache: finds the cache that fits, or has another process make it.

This module runs in the trainer and imports no tokenizer and no torch. Call it before anything heavy is imported
where memory is short: the preparing process needs its own 70 to 150 MiB while it runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import finetune
from finetune.config import Config
from finetune.data.cache import FORMAT_VERSION, TokenDataset
from finetune.data.errors import DataError
from finetune.data.forms import FORMS
from finetune.data.job import MOST_READ, Job, TokenOptions
from finetune.data.options import is_stream, sources_in
from finetune.data.rows import COLUMNS, MEDIA
from finetune.data.sources import File, HubSplit, resolve, source_of, without_added_nulls
from finetune.data.tokenizer_files import tokenizer_folder, write_tokenizer
from finetune.offload.files.checkpoint import is_gguf
from finetune.offload.files.gguf_file import metadata_digest
from finetune.offload.files.lock import lock

# What a tokenizer is made of; config.json says the size of the vocabulary.
_TOKENIZER_FILES = (
    "tokenizer*", "*.model", "vocab*", "merges.txt", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*", "config.json", "tokenization_*.py",
)  # fmt: skip

_PREPARING = ".preparing-"
_BYTES_OF_A_TOKEN = 8
"""Of rows of a stream that are read at first, where they are packed."""
_TIMES = (1, 4, 16, MOST_READ)
"""As much of a stream is read, one after the other, until the steps have enough: rows may be left out or cut."""


def prepare(
    source: str | Path | Iterable[Any], *, model: str | Path, cache_dir: str | Path, **options: Any
) -> TokenDataset:
    """Return the token cache of `source`, made now or earlier.

    source            path of a .jsonl, .json, .csv, .tsv, .parquet or .txt file, "FILE[:90%]", a folder or glob of files,
                      "hubid", "hubid:split", "hubid:config:split", or rows (a list of dicts, a datasets.Dataset or
                      IterableDataset); or a list of these
    model             folder, GGUF file or hub id of the tokenizer
    options           the fields of `finetune.data.job.TokenOptions`, of which sequence_length must be given

    A cache is made in a separate process, under a temporary name, and renamed when whole. It is used again while the
    files (path, size, time of change), the tokenizer's files, these options and the tokenizer libraries are the same, and
    made again when it is damaged.
    Raises DataError for data, tokenizer or template that cannot be used, and when the process dies.
    """
    wanted = TokenOptions(**options)
    if wanted.form != "auto" and wanted.form not in FORMS:
        raise DataError(f"form: expected one of auto, {', '.join(FORMS)}, found {wanted.form!r}")
    if wanted.sequence_length < 2:
        raise DataError(f"sequence_length: expected at least 2 tokens, found {wanted.sequence_length}")
    cache_dir = Path(cache_dir)
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder for token caches, {cache_dir}, cannot be made: {error.strerror}") from error
    tokenizer = _tokenizer_place(str(model))
    counting = asdict(replace(wanted, chat_template=template_text(wanted.chat_template)))
    counting["fingerprint"] = _fingerprint(tokenizer)
    with _preparing(cache_dir), tempfile.TemporaryDirectory(prefix=_PREPARING, dir=cache_dir) as scratch:
        for times in _TIMES:
            (folder := Path(scratch) / str(times)).mkdir(mode=0o700)
            sources, limits = _find_sources(source, wanted, folder, times)
            data = _prepared(sources, counting, tokenizer, str(model), cache_dir, folder)
            if not _is_short(data.meta, limits):
                return data
    print(f"note: no more than {data.meta['rows']:,} rows of a stream were read, and the steps use more", file=sys.stderr)
    return data


def _prepared(
    sources: list[list[File | HubSplit]], counting: dict[str, Any], tokenizer: Path, model: str, cache_dir: Path, scratch: Path
) -> TokenDataset:
    """The cache in `cache_dir`, found or made. counting: what a cache depends on beside its rows and the libraries. model: what
    the user calls it. scratch: an own directory for this."""
    key = _key(sources, counting)
    if (cache_dir / key).exists():
        try:
            return TokenDataset.open(cache_dir / key)
        except DataError as error:
            print(f"note: {error}; it is made again from the data", file=sys.stderr)
            shutil.rmtree(cache_dir / key, ignore_errors=True)
    folder = scratch / key
    folder.mkdir(mode=0o700)
    if is_gguf(tokenizer):
        tokenizer = _unpacked(tokenizer, scratch / "tokenizer")
    where = {"folder": str(folder), "tokenizer": str(tokenizer), "model": model}
    job = Job(sources=[[asdict(part) for part in one] for one in sources], **where, **counting)
    _run_worker(asdict(job), scratch / "stderr.txt")
    try:
        folder.rename(cache_dir / key)
    except OSError:
        # Another run made the same cache meanwhile; if it is not whole, opening it says so.
        pass
    return TokenDataset.open(cache_dir / key)


def _is_short(meta: Mapping[str, Any], limits: list[int | None]) -> bool:
    """Whether more of a stream would be used than was read. limits: as `_find_sources` gives them."""
    counts = [count for _, count in meta["rows_of"]]
    ended = [count for count, limit in zip(counts, limits, strict=True) if limit is not None and count >= limit]
    # Of several sources, others came after, or this one began again.
    return any(not meta["enough"] or meta["rows"] > count for count in ended)


def prepare_for(
    config: Config, source: Any, model: Path, *, choices: bool, append_eos: bool | None, judged: str = "",
    is_trained_on: bool = False, stride: int | None = None,
) -> TokenDataset:  # fmt: skip
    """The token cache of `source` as the configuration has it, beside its run. model: folder or GGUF file of the tokenizer.
    choices, judged: as in `TokenOptions`. is_trained_on: it is `config.data`, which may be a mixture or a stream. stride: as in
    `TokenOptions`."""
    options = config.dataset
    return prepare(
        source,
        model=model,
        cache_dir=config.output / "tokens",
        sequence_length=options.sequence_length,
        stride=stride,
        form=options.form,
        completion_only=options.completion_only,
        append_eos=append_eos,
        chat_template=options.chat_template,
        trust_remote_code=config.trust_remote_code,
        choices=choices,
        judged=judged,
        **(_mixture(config) if is_trained_on else {}),
    )


def _mixture(config: Config) -> dict[str, Any]:
    """How the training data are put together, and how much of a stream the steps can use."""
    options, training, mixture = config.dataset, config.training, {}
    if options.probabilities:
        strategy = options.stopping_strategy
        mixture |= {"probabilities": options.probabilities, "stopping_strategy": strategy, "mixing_seed": training.seed}
    if options.streaming or any(map(is_stream, sources_in(config.data))):
        most_rows = training.max_steps * training.batch_size
        packed = {"most_tokens": most_rows * options.sequence_length}
        mixture |= {"streaming": options.streaming, **(packed if options.packing else {"most_rows": most_rows})}
    return mixture


def _find_sources(
    data: Any, options: TokenOptions, scratch: Path, times: int
) -> tuple[list[list[File | HubSplit]], list[int | None]]:
    """Of each source its files, and how many rows were read of it where there may be more. Rows in memory are written into the
    directory `scratch`, of a stream so many times what `options` ask for."""
    found, limits, several = [], [], len(sources_in(data)) > 1
    for index, source in enumerate(sources_in(data)):
        if isinstance(source, str | Path):
            found.append(resolve(source))
            limits.append(None)
        else:
            path = scratch / (f"data[{index}].jsonl" if several else "data.jsonl")
            file, limit = _write_rows(source, path, options, times)
            found.append([file])
            limits.append(limit)
    return found, limits


def describe(data: TokenDataset) -> list[str]:
    """What became of the rows, in lines for the user: how many there are, which are cut or left out, and notes. Nothing of
    those that came as tokens."""
    meta = data.meta
    if "rows" not in meta:
        return []
    compared = meta["choices"] is not None or bool(meta.get("judged"))
    count = meta["rows"] if compared else len(data) + meta["dropped"]
    rows = f"{meta['rows']:,} rows"
    if len(of_each := meta.get("rows_of", ())) > 1:
        rows += f" ({' + '.join(f'{count:,} of {name}' for name, count in of_each)})"
    parts = [rows] + ([f"{count:,} examples"] if count != meta["rows"] else [])
    if meta["truncated"]:
        parts.append(f"{meta['truncated']:,} cut at {meta['sequence_length']:,} tokens")
    if meta["dropped"]:
        longer = f"longer than sequence_length ({meta['sequence_length']:,})"
        why = longer if compared else "no token of them would be trained"
        parts.append(f"{meta['dropped']:,} of {count:,} left out: {why}")
    if not compared:
        can_be = max(1, meta["tokens"] - meta["examples"])  # nothing predicts a first token
        parts.append(f"{meta['tokens']:,} tokens, {_percent(meta['label_tokens'] / can_be)} of them trained")
    return [f"{'+'.join(meta['sources'])}: {', '.join(parts)}", *(f"note: {note}" for note in meta["notes"])]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 or not share else f"{100 * share:.2g}%"


@contextmanager
def _preparing(cache_dir: Path) -> Iterator[None]:
    """Removes what killed processes have left, where no other process prepares anything; while it lasts, none does that."""
    folder = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(BlockingIOError):
            if lock(folder):
                for path in cache_dir.glob(f"{_PREPARING}*"):
                    shutil.rmtree(path, ignore_errors=True)
        lock(folder, shared=True, wait=True)
        yield
    finally:
        os.close(folder)


def _tokenizer_place(model: str) -> Path:
    """A directory, or the GGUF file that has it in itself."""
    if is_gguf(Path(model)):
        path = Path(model).absolute()  # not what a link leads to, which the hub's cache names otherwise
        return tokenizer_folder(path) or path
    if Path(model).is_dir():
        return Path(model).resolve()
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError(f"{model} is not a folder, and huggingface_hub, to download it, is not installed") from None
    try:
        return Path(snapshot_download(model, allow_patterns=list(_TOKENIZER_FILES)))
    except Exception as error:  # network, hub, and naming errors have no common root
        raise DataError(
            f"model {model!r} is neither a folder here nor could its tokenizer be loaded from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _unpacked(gguf: Path, folder: Path) -> Path:
    """`folder` with the tokenizer of a GGUF file."""
    try:
        write_tokenizer(gguf, folder)
    except Exception as error:  # Transformers raises whatever its parts do
        raise DataError(
            f"the tokenizer in {gguf} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}): put the "
            "model's tokenizer.json and tokenizer_config.json beside the file"
        ) from error
    return folder


def _fingerprint(place: Path) -> str:
    if is_gguf(place):
        return metadata_digest(place).hex()
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _TOKENIZER_FILES for path in place.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(place)}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _key(sources: list[list[File | HubSplit]], options: dict[str, Any]) -> str:
    libraries = {}
    for name in ("transformers", "tokenizers"):
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            raise DataError(f"preparing data needs {name}, which is not installed: pip install {name}") from None
    what = [FORMAT_VERSION, libraries, [[part.identity() for part in one] for one in sources], options]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def template_text(template: str | None) -> str | None:
    if template is None or "{" in template or "\n" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template: expected Jinja text or a file, found {template!r}: {error}") from error


def _write_rows(
    rows: Iterable[Mapping[str, Any]], path: Path, options: TokenOptions, times: int
) -> tuple[File, int | None]:
    """Rows in memory as JSON lines: tokens are made in another process, which needs them on disk. Of a stream, which may be
    endless, no more than so many times what `options` ask for: then also how many rows these are."""
    if isinstance(rows, Mapping):  # a datasets.DatasetDict
        raise DataError(f"data: expected rows, found a mapping with {', '.join(map(str, rows))}: hand over one of them")
    most_rows = math.inf if options.most_rows is None else times * options.most_rows
    most_bytes = math.inf if options.most_tokens is None else times * _BYTES_OF_A_TOKEN * options.most_tokens
    limit = None
    digest = hashlib.sha256()
    from_arrow = type(rows).__module__.partition(".")[0] == "datasets"
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
        for index, row in enumerate(rows):
            place = f"{path.stem}[{index}]"
            if not isinstance(row, Mapping):
                raise DataError(f"{place}: expected a dict, found {type(row).__name__}")
            # Other columns may hold anything; their names alone are kept, for messages about missing ones.
            known = {key: value if key in COLUMNS else None for key, value in row.items()}
            if from_arrow:
                known = {key: without_added_nulls(value) for key, value in known.items()}
            # a picture, an array, or anything else that is there
            media = {key: row[key] for key in MEDIA & known.keys()}
            known |= {key: True for key, one in media.items() if one or not isinstance(one, list | str | None)}
            try:
                line = json.dumps(known, default=_plain).encode() + b"\n"
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{place}: expected strings, numbers, lists and dicts: {error}") from error
            digest.update(line)
            stream.write(line)
            if index + 1 >= most_rows or stream.tell() >= most_bytes:
                limit = index + 1
                break
    stat = path.stat()
    return File(str(path), stat.st_size, stat.st_mtime_ns, digest.hexdigest()), limit


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # arrays and tensors of token ids
        return value.tolist()
    raise TypeError(f"found {type(value).__name__}")


def _run_worker(job: dict[str, Any], stderr_path: Path) -> None:
    """Run the preparing process to its end. Raises DataError with its message, or with how it died."""
    # -P: a file in the user's folder named like a library must not be imported in its stead.
    command = [sys.executable, "-P", "-m", "finetune.data.worker"]
    home = str(Path(finetune.__file__).parents[1])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    error, line_open = None, False
    name = "+".join(source_of(part).label for part in chain.from_iterable(job["sources"]))
    with (
        open(stderr_path, "wb") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={"TRANSFORMERS_VERBOSITY": "error", **os.environ, "PYTHONPATH": path},
            encoding="utf-8",
            start_new_session=True,  # a signal to the terminal's group is for us, who end it
        ) as process,
    ):
        try:
            try:
                json.dump(job, process.stdin)
                process.stdin.close()
            except BrokenPipeError:
                pass  # it is dead: the exit code says more
            for line in process.stdout:
                message = json.loads(line)
                error = message.get("error", error)
                if "rows" in message and sys.stderr.isatty():
                    line_open = True
                    counts = f"{message['rows']:,} rows, {message['tokens']:,} tokens"
                    print(f"\rpreparing {name:.40}: {counts}", end="", file=sys.stderr, flush=True)
            code = process.wait()
        finally:
            process.kill()  # Ctrl-C here must not leave it running; does nothing once it has ended
            if line_open:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if error is not None:
        raise DataError(error)
    if code == 0:
        return
    words = stderr_path.read_text(errors="replace").strip()[-2000:]
    tail = f"; its last words:\n{words}" if words else ""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (often the kernel's answer to a lack of memory)" if -code == signal.SIGKILL else ""
        raise DataError(f"the process that prepares the data was killed by {name}{hint}{tail}")
    raise DataError(f"the process that prepares the data crashed with exit code {code}{tail}")
