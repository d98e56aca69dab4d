"""GGUF files, as llama.cpp writes them: their metadata, and where the bytes of each tensor lie. No weights are read.

Every size is proved against the file before it is used, because other readers (Transformers, gguf) believe them.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3; block sizes: `ggml/src/ggml-common.h`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from finetune.offload.files.checkpoint import (
    GGUF_PART,
    MAX_HEADER_BYTES,
    MAX_TENSOR_BYTES,
    Checkpoint,
    CheckpointError,
    TensorEntry,
    damaged,
)

MAGIC = b"GGUF"


class BlockType(NamedTuple):
    """How a row of numbers is stored: in blocks of so many elements, each of so many bytes."""

    word: str
    elements: int
    num_bytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18), 3: BlockType("Q4_1", 32, 20), 6: BlockType("Q5_0", 32, 22), 7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34), 10: BlockType("Q2_K", 256, 84), 11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144), 13: BlockType("Q5_K", 256, 176), 14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18), 23: BlockType("IQ4_XS", 256, 136),
}  # fmt: skip
"""By ggml's number of the type: those that are read."""
BLOCKS = {block.word: block for block in BLOCK_TYPES.values()}

# Of metadata values, by GGUF's number: `struct`'s letter. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_NAME_BYTES = 65535
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says before its data."""

    path: Path
    values: dict[str, Any]
    """Metadata that is one number, bool or string, by key."""
    counts: dict[str, int]
    """Of metadata that is an array, how many elements it has."""
    spans: dict[str, tuple[int, int]]
    """Of all metadata: bytes [start, stop) of the file that hold key and value."""
    tensors: tuple[TensorEntry, ...]
    """In file order. The dtypes are ggml's words; shapes are as PyTorch has them, rows first."""


def read_gguf(path: Path) -> Checkpoint:
    """All tensors of a GGUF model, by the names in its files. path: the file, of a split one any part.

    Raises CheckpointError for a damaged or truncated file, missing parts, and types of tensors that are not read.
    """
    paths = _parts(path)
    tensors: dict[str, TensorEntry] = {}
    for number, part in enumerate(paths):
        header = read_gguf_header(part)
        for key, expected in {"split.no": number, "split.count": len(paths)}.items():
            if len(paths) > 1 and header.values.get(key) != expected:
                damaged(part, f"{key} to be {expected}", repr(header.values.get(key)))
        for entry in header.tensors:
            if entry.name in tensors:
                damaged(part, f"tensor '{entry.name}' in one part", f"it in {tensors[entry.name].path.name} too")
            tensors[entry.name] = entry
        wanted = header.values.get("split.tensors.count") if len(paths) > 1 else None
    if wanted is not None and wanted != len(tensors):
        damaged(path, f"{wanted} tensors in its {len(paths)} parts", str(len(tensors)))
    return Checkpoint(paths[0], tuple(paths), tensors, f"GGUF, {len(paths)} file(s)")


def _parts(path: Path) -> list[Path]:
    shard = GGUF_PART.fullmatch(path.name)
    if shard is None:
        return [path]
    count = int(shard["count"])
    names = [f"{shard['stem']}-{number:05d}-of-{shard['count']}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{path}: one of {count} parts, and {len(missing)} are missing, the first {missing[0] if missing else path.name}: "
            "download the model again"
        )
    return [path.parent / name for name in names]


def metadata_digest(path: Path) -> bytes:
    """Of all metadata, less how the model is split."""
    digest = hashlib.blake2b(digest_size=16)
    header = read_gguf_header(path)
    for piece in raw_metadata(path, [span for key, span in header.spans.items() if not key.startswith("split.")]):
        digest.update(piece)
    return digest.digest()


def raw_metadata(path: Path, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of these spans of a header."""
    with open(path, "rb") as file:
        for start, stop in spans:
            yield os.pread(file.fileno(), stop - start, start)


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises CheckpointError naming the file, what was expected and what was found."""
    try:
        with open(path, "rb") as file:
            reader = _Reader(path, file)
            num_tensors, num_values = _start(reader)
            values, counts, spans = _metadata(reader, num_values)
            alignment = values.get("general.alignment", 32)
            if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
                damaged(path, "general.alignment to be a power of 2 from 8 to 2**20", repr(alignment))
            infos = [_tensor_info(reader) for _ in range(num_tensors)]
            start = -(-reader.position // alignment) * alignment
            return GgufHeader(path, values, counts, spans, _entries(reader, infos, start, alignment))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


class _Reader:
    """Reads a header from the front, never beyond the file or MAX_HEADER_BYTES."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file_bytes = os.fstat(file.fileno()).st_size
        self.position = 0
        self._end = min(self.file_bytes, MAX_HEADER_BYTES)
        self._file = file

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self._end - self.position:
            limit = "" if self._end == self.file_bytes else f" (of which a header may have {self._end})"
            damaged(
                self.path, f"{num_bytes} more bytes of its header at byte {self.position}",
                f"a file of {self.file_bytes} bytes{limit}",
            )  # fmt: skip
        self.position += num_bytes
        return self._file.read(num_bytes)

    def numbers(self, letters: str) -> tuple:
        return struct.unpack(f"<{letters}", self.take(struct.calcsize(f"<{letters}")))

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        (num_bytes,) = self.numbers("Q")
        if num_bytes > most:
            damaged(self.path, f"{what} of at most {most} bytes", str(num_bytes))
        try:
            return self.take(num_bytes).decode("utf-8")
        except UnicodeDecodeError:
            damaged(self.path, f"{what} in UTF-8", f"other bytes before byte {self.position}")


def _start(reader: _Reader) -> tuple[int, int]:
    """How many tensors and metadata values follow."""
    magic = reader.take(4)
    if magic != MAGIC:
        damaged(reader.path, f"a file that starts with {MAGIC!r}", repr(magic))
    (version,) = reader.numbers("I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{reader.path}: expected GGUF version 2 or 3 in little-endian, found version {version:#x}: take a newer file"
        )
    return reader.numbers("QQ")


def _metadata(reader: _Reader, count: int) -> tuple[dict[str, Any], dict[str, int], dict[str, tuple[int, int]]]:
    """Values, counts and spans of `GgufHeader`."""
    values: dict[str, Any] = {}
    counts: dict[str, int] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        start = reader.position
        key = reader.text("a metadata key", _MAX_NAME_BYTES)
        if key in spans:
            damaged(reader.path, f"metadata '{key}' once", "it twice")
        (kind,) = reader.numbers("I")
        if kind == _ARRAY:
            counts[key] = _skip_array(reader, key)
        elif kind == _STRING:
            values[key] = reader.text(f"metadata '{key}'")
        elif kind in _SCALARS:
            (values[key],) = reader.numbers(_SCALARS[kind])
        else:
            damaged(reader.path, f"metadata '{key}' of a type from 0 to 12", str(kind))
        spans[key] = (start, reader.position)
    return values, counts, spans


def _skip_array(reader: _Reader, key: str) -> int:
    """How many elements it has."""
    kind, count = reader.numbers("IQ")
    if kind == _STRING:
        for _ in range(count):
            reader.take(int.from_bytes(reader.take(8), "little"))
    elif kind in _SCALARS:
        reader.take(count * struct.calcsize(_SCALARS[kind]))
    else:
        damaged(reader.path, f"metadata '{key}' to be an array of numbers or strings", f"type {kind}")
    return count


class _TensorInfo(NamedTuple):
    name: str
    block: BlockType
    shape: tuple[int, ...]
    offset: int  # from where the data begins
    num_bytes: int


def _tensor_info(reader: _Reader) -> _TensorInfo:
    name = reader.text("a tensor's name", _MAX_NAME_BYTES)
    (dimensions,) = reader.numbers("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        damaged(reader.path, f"tensor '{name}' to have 1 to {_MAX_DIMENSIONS} dimensions", str(dimensions))
    shape = tuple(reversed(reader.numbers(f"{dimensions}Q")))
    kind, offset = reader.numbers("IQ")
    if kind not in BLOCK_TYPES:
        known = ", ".join(block.word for block in BLOCK_TYPES.values())
        raise CheckpointError(
            f"{reader.path}: tensor '{name}' is stored as {_type_name(kind)}, which isn't read: take a file of the model with "
            f"tensors in {known} only"
        )
    block = BLOCK_TYPES[kind]
    if shape[-1] % block.elements:
        damaged(
            reader.path, f"tensor '{name}' of {block.word} to have rows in whole blocks of {block.elements}",
            f"a shape of {list(shape)}",
        )  # fmt: skip
    num_bytes = block.num_bytes
    for size in (shape[-1] // block.elements, *shape[:-1]):
        num_bytes *= size  # checked at each factor: a product of hostile sizes would otherwise grow without bound
        if not 0 < num_bytes < MAX_TENSOR_BYTES:
            damaged(reader.path, f"tensor '{name}' to have between 1 and 2**63 bytes", f"a shape of {list(shape)}")
    return _TensorInfo(name, block, shape, offset, num_bytes)


def _type_name(kind: int) -> str:
    """The word for a type that is not read."""
    with suppress(ImportError, ValueError):
        from gguf.constants import GGMLQuantizationType

        return GGMLQuantizationType(kind).name
    return f"type {kind}"


def _entries(reader: _Reader, infos: Sequence[_TensorInfo], start: int, alignment: int) -> tuple[TensorEntry, ...]:
    """In file order, after proving that no two share a byte and that the file has them all. start: of the data."""
    entries, end, names = [], 0, set()
    for name, block, shape, offset, num_bytes in sorted(infos, key=lambda info: info.offset):
        if name in names:
            damaged(reader.path, f"tensor '{name}' once", "it twice")
        names.add(name)
        if offset % alignment or offset < end:
            expected = f"tensor '{name}' to start at a multiple of {alignment}, not before {end}"
            damaged(reader.path, expected, f"it at {offset}")
        end = offset + num_bytes
        if start + end > reader.file_bytes:
            damaged(
                reader.path, f"{start + end} bytes, the end of tensor '{name}'",
                f"{reader.file_bytes} bytes (the file is truncated)",
            )  # fmt: skip
        entries.append(TensorEntry(name, block.word, shape, reader.path, start + offset, num_bytes))
    return tuple(entries)
