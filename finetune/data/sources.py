"""Where rows come from: files, folders, globs and hub datasets, read as a stream.

A row's place is "file:line" for text formats and "file:row" (from 1) for Parquet and hub data.
Memory does not grow with a file's size: JSONL and CSV are read by line, JSON arrays by element, Parquet by row group, and
a .txt file, which is one document, in pieces cut at line ends. What gzip, bzip2 and xz wrote is read through them.
"train.jsonl[:90%]" are the first rows of a file, "train.jsonl[90%:]" the others, as `datasets` writes parts of a split.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from finetune.data.errors import DataError
from finetune.data.forms.text import TextPiece
from finetune.data.json_rows import MAX_ROW_CHARS, json_documents, parse_json
from finetune.data.options import split_part
from finetune.data.rows import COLUMNS, MEDIA

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
TEXT_PIECE_CHARS = 1 << 18
_ROWS_WITH_IMAGES = 16  # of Parquet, that are in memory together where they may be
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COMPRESSED = (*_OPENERS, ".zst", ".zip", ".lz4", ".br")
_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(?P<part>:((?P<config>[\w.-]+):)?(?P<split>.+))?")


@dataclass(frozen=True, slots=True)
class File:
    """A local file, with what tells one version of it from another."""

    path: str  # absolute
    size: int  # in bytes
    mtime_ns: int  # of the last change, in nanoseconds
    sha256: str | None = None  # set for rows handed over in memory, whose temporary file has no lasting identity
    part: str = ""  # of its rows, such as [:90%]; empty: all

    @property
    def name(self) -> str:
        return Path(self.path).stem if self.sha256 else Path(self.path).name

    @property
    def label(self) -> str:
        """The name, with the part that is read."""
        return self.name + self.part

    @property
    def format(self) -> str:
        """One of SUFFIXES."""
        return _format(Path(self.path))

    def identity(self) -> dict[str, Any]:
        return {"sha256": self.sha256} if self.sha256 else asdict(self)


@dataclass(frozen=True, slots=True)
class HubSplit:
    """One split of a dataset on the hub."""

    id: str  # of the data set, such as owner/name
    config: str | None  # of the data set; None: its only or default one
    split: str  # such as train or train[:100]
    commit: str | None  # None when the hub could not be asked

    @property
    def name(self) -> str:
        return f"{self.id}:{self.split}"

    @property
    def label(self) -> str:
        """The name, which has the split."""
        return self.name

    def identity(self) -> dict[str, Any]:
        return asdict(self)


def source_of(fields: dict[str, Any]) -> File | HubSplit:
    """The source with these fields."""
    return File(**fields) if "path" in fields else HubSplit(**fields)


def resolve(source: str | Path) -> list[File | HubSplit]:
    """Files in name order behind a path, folder or glob, or the split behind "hubid", "hubid:split" or
    "hubid:config:split" (split: "train" unless given).

    Raises DataError when there is nothing there.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return _files_in(path, text)
    if path.exists():
        return [_file(path)]
    name, part = split_part(text)
    if part and Path(name).expanduser().is_file():
        return [replace(_file(Path(name).expanduser()), part=part)]
    hub = None if isinstance(source, Path) else _HUB.fullmatch(text)
    if hub and _format(Path(hub["id"])) in SUFFIXES:
        hub = None
    # "hubid:train[:100]" has the brackets of a glob too; the colon tells.
    if glob.has_magic(text) and not (hub and hub["part"]):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not found:
            raise DataError(f"no file matches {text}")
        return [_file(p) for p in found if p.is_file()]
    if not hub:
        raise DataError(f"data file not found: {text}")
    return [HubSplit(hub["id"], hub["config"], hub["split"] or "train", _hub_commit(hub["id"]))]


def _files_in(folder: Path, name: str) -> list[File]:
    """name: as the user typed it."""
    # What is compressed otherwise than can be read is refused by its name, not passed over.
    found = sorted(p for p in folder.iterdir() if _format(p) in SUFFIXES and p.is_file() and p.name[0] != ".")
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        raise DataError(
            f"{name} was written by datasets' save_to_disk, which is not read here: write it with to_parquet() or "
            "to_json(), or hand the Dataset object itself over from Python"
        )
    if not found:
        raise DataError(f"no data file in the folder {name}: expected files ending in {', '.join(SUFFIXES)}")
    return [_file(p) for p in found]


def read_rows(
    source: File | HubSplit, every_column: bool = False, streaming: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) in order. A row that cannot be read is a DataError in the row's stead, so that a caller can
    count further ones; a source that cannot be read at all raises it.

    every_column: of Parquet and hub data, not only those that some form of text reads. streaming: hub data are not downloaded
    whole before the first row.
    """
    if isinstance(source, HubSplit):
        yield from _hub_rows(source, every_column, streaming)
        return
    parquet_rows = partial(_parquet_rows, every_column=every_column)
    readers = {".txt": _text_pieces, ".parquet": parquet_rows, ".csv": _table_rows, ".tsv": _table_rows}
    reader = readers.get(source.format, _json_rows)
    try:
        if not source.part:
            yield from reader(source)
            return
        if source.format == ".txt":
            raise DataError(f"{source.name}{source.part}: a .txt file is one document, not rows: leave {source.part} out")
        yield from islice(reader(source), *_bounds(source.part, lambda: sum(1 for _ in reader(source))))
    except OSError as error:
        raise DataError(f"cannot read {source.path}: {error.strerror or error}") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot decompress {source.path}: {error}: the file is damaged or was cut") from error


def _bounds(part: str, count: Callable[[], int]) -> tuple[int, int | None]:
    """The rows of [start:stop], from 0. count: how many there are, asked for where a bound is a share."""
    num_rows = count() if "%" in part else 0
    words = part[1:-1].split(":")
    first, last = (num_rows * int(word[:-1]) // 100 if word[-1:] == "%" else int(word or -1) for word in words)
    return max(first, 0), None if last < 0 else last


def without_added_nulls(value: Any) -> Any:
    """A row of Arrow's without the keys that are null: a column of objects has one type, so that each object there has
    the keys of all, those that it was not given as null."""
    if isinstance(value, dict):
        return {key: without_added_nulls(one) for key, one in value.items() if one is not None}
    return [without_added_nulls(one) for one in value] if isinstance(value, list) else value


def with_encoded_images(rows: Any) -> Any:
    """Of a datasets.Dataset of conversations with images, its rows with these as in Arrow, as bytes or paths; else `rows`."""
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping) or "messages" not in features or rows.format["type"] == "custom":
        return rows
    return (row for table in rows.with_format("arrow") for row in table.to_pylist()) if _has_images(features) else rows


def _has_images(feature: Any) -> bool:
    """feature: one of datasets, or columns or a list of them."""
    inner = feature.values() if isinstance(feature, Mapping) else feature if isinstance(feature, list) else ()
    inner = [feature.feature] if hasattr(feature, "feature") else inner
    return type(feature).__name__ == "Image" or any(map(_has_images, inner))


def _format(path: Path) -> str:
    """The suffix that says what a file holds: the one before that of a compression."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _open(file: File) -> IO[bytes]:
    return _OPENERS.get(Path(file.path).suffix, open)(file.path, "rb")


def _file(path: Path) -> File:
    if _format(path) not in SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}, found {path.suffix!r}")
    if path.suffix in _COMPRESSED and (path.suffix not in _OPENERS or _format(path) == ".parquet"):
        raise DataError(f"{path}: a {_format(path)} file in {path.suffix} is not read here: decompress it first")
    if not path.is_file():
        raise DataError(f"{path}: expected a file, for it is read more than once, found a pipe or a device: write it to a file")
    stat = path.stat()
    return File(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def _json_rows(file: File) -> Iterator[tuple[str, Any]]:
    """A .json file may hold arrays, objects over several lines or, as often, JSON lines."""
    if not file.format == ".json" or _is_json_lines(file):
        yield from _lines(file)
        return
    with _open(file) as stream:
        yield from json_documents(io.TextIOWrapper(stream, encoding="utf-8-sig"), file.name)


def _is_json_lines(file: File) -> bool:
    """Whether the first line is an object of its own, or no JSON at all: lines are named one by one then."""
    with _open(file) as stream:
        while line := stream.readline(4096):
            start = line.removeprefix(codecs.BOM_UTF8).lstrip()
            if start[:1] == b"{":
                try:
                    parse_json((start + (b"" if line.endswith(b"\n") else stream.readline(MAX_ROW_CHARS))).decode())
                except UnicodeDecodeError:
                    return True
                except ValueError:
                    return False
            if start:
                return start[:1] != b"["
    return True


def _lines(file: File) -> Iterator[tuple[str, Any]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            # Rows handed over in memory are named as Python does: data[0] is the first.
            place = f"{file.name}[{number - 1}]" if file.sha256 else f"{file.name}:{number}"
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode())
            except UnicodeDecodeError as error:
                row = DataError(f"{place}: not UTF-8 (byte {error.start + 1} of the line): save it as UTF-8")
            except ValueError as error:
                row = DataError(f"{place}: expected one JSON object, found what is not JSON: {error}")
            yield place, row


def _table_rows(file: File) -> Iterator[tuple[str, Any]]:
    """Of CSV, whose first line names the columns: every cell is text."""
    csv.field_size_limit(MAX_ROW_CHARS)
    with _open(file) as binary:
        stream = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        header = stream.readline()
        separator = "\t" if file.format == ".tsv" else ";" if ";" in header and "," not in header else ","
        names = next(csv.reader([header], delimiter=separator), [])
        if len(set(names)) < len(names):
            raise DataError(f"{file.name}:1: expected a name for each column, found one twice in {', '.join(names)}")
        reader = csv.reader(stream, delimiter=separator, strict=True)
        while True:
            line = reader.line_num + 2
            try:
                cells = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(f"{file.name}:{line}: expected CSV in UTF-8: {error}") from error
            if cells is None:
                return
            if len(cells) not in (0, len(names)):
                found = f"expected {len(names)} cells as in the first line, found {len(cells)}"
                yield f"{file.name}:{line}", DataError(f"{file.name}:{line}: {found}")
            elif cells:
                yield f"{file.name}:{line}", dict(zip(names, cells, strict=True))


def _text_pieces(file: File) -> Iterator[tuple[str, Any]]:
    with _open(file) as binary:
        stream = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        line, first, held = 1, True, ""
        while True:
            try:
                more = stream.read(TEXT_PIECE_CHARS)
            except UnicodeDecodeError as error:
                raise DataError(f"{file.name}: not UTF-8 after line {line}: save the file as UTF-8") from error
            place = f"{file.name}:{line}"
            if not more:
                if held or not first:
                    yield place, TextPiece(held, first, True)
                return
            held += more
            cut = held.rfind("\n") + 1 or len(held)
            yield place, TextPiece(held[:cut], first, False)
            line += held.count("\n", 0, cut)
            held, first = held[cut:], False


def _parquet_rows(file: File, every_column: bool) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"reading {file.name} needs pyarrow, which is not installed: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            known = [] if every_column else _known(names)
            media = {} if every_column else dict.fromkeys(MEDIA.intersection(names), True)
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS_WITH_IMAGES if every_column else 256, columns=known or names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.name}:{number}", without_added_nulls(row) | media
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name}: cannot be read as Parquet: {error}") from error


def _known(names: list[str]) -> list[str]:
    """Columns that are read; none: a message about what is missing is to name all that there are."""
    known = [name for name in names if name in COLUMNS]
    return [] if known == ["label"] else known


def _hub_commit(dataset_id: str) -> str | None:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return None  # reading the rows says what is missing
    try:
        return HfApi().dataset_info(dataset_id, timeout=10).sha
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{dataset_id} is not a file here, and it could not be loaded from the hub: {reason}") from error
    except Exception:  # no network, in the many forms that takes: an earlier download may serve
        return None


def _hub_rows(source: HubSplit, every_column: bool, streaming: bool) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source.id} is not a file here, and loading it from the hub needs the package datasets, which is not "
            "installed: pip install datasets, or give a path to a file"
        ) from None
    try:
        rows = datasets.load_dataset(
            source.id, source.config, split=source.split, revision=source.commit, streaming=streaming
        )
    except Exception as error:  # the library raises its own, the hub's, the network's and built-in errors
        raise DataError(
            f"{source.id} is neither a file here nor could it be loaded from the hub (split {source.split!r}): "
            f"{type(error).__name__}: {error}"
        ) from error
    names = rows.column_names or []  # of a stream they may not be known yet
    known = [] if every_column else _known(names)
    media = {} if every_column else dict.fromkeys(MEDIA.intersection(names), True)
    if known:
        rows = rows.select_columns(known)
    if every_column:
        rows = with_encoded_images(rows)
    for number, row in enumerate(rows, 1):
        yield f"{source.name}:{number}", without_added_nulls(row) | media
