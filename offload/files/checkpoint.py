"""Index of a checkpoint: where each tensor's bytes lie, found from the headers alone. Of safetensors here, of GGUF in
`finetune.offload.files.gguf_file`.

No weights are read and torch is not imported. Each header is proved sound the way the safetensors library does it
(`safetensors/src/tensor.rs`, `read_metadata` and `Metadata::validate`) before any offset in it is used.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from finetune.memory.errors import UserError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSOR_BYTES = 1 << 63

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_VARIANT_FILE = re.compile(r"model\.(?P<variant>[^.]+)\.safetensors")
_VARIANT_INDEX = re.compile(r"model\.safetensors\.index\.(?P<variant>[^.]+)\.json")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
GGUF_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""The name of one file of several, as llama.cpp splits a model."""
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_DOWNLOAD = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "tokenizer*")
# Second copies of the same weights that some repositories carry.
_NO_DOWNLOAD = ("original/*", "onnx/*", "consolidated*.safetensors")


class CheckpointError(UserError):
    """A checkpoint that can't be used as it is: missing, damaged, in another format, or not of this model."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a file. `offset` counts bytes from the start of the file, not of its data section."""

    name: str  # in the file
    dtype: str  # safetensors' word, such as BF16; in a GGUF file ggml's, such as Q4_K
    shape: tuple[int, ...]  # of the tensor
    path: Path  # of the file
    offset: int
    num_bytes: int  # of its data


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model by name. `found` says in words which files they came from.

    directory: that of the model; of a GGUF model its file, or the first of several.
    lost: tensors that the index names, in shards that don't hold them. Transformers passes them over, which is right for an
    end of a tie and nothing else.
    """

    directory: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]
    found: str
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def is_gguf(self) -> bool:
        return is_gguf(self.directory)


def is_gguf(model: Path) -> bool:
    """Whether `model`, as `resolve_model` gives it, is a GGUF file rather than a directory."""
    return model.suffix == ".gguf" and not model.is_dir()


def resolve_model(model: str) -> Path:
    """Where `model` is: a local directory as it is, of a GGUF model its file (the first of several); otherwise the directory
    of a hub id, downloaded or from the hub's cache.

    Raises CheckpointError naming what was tried.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        return _find_gguf(local) or local
    if local.suffix == ".gguf" and local.is_file():
        part = GGUF_PART.fullmatch(local.name)
        return local if part is None else local.with_name(f"{part['stem']}-00001-of-{part['count']}.gguf")
    if local.exists():
        raise CheckpointError(
            f"model '{model}' is a file; give the directory that holds config.json and the weights, or a .gguf file"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise CheckpointError(f"model '{model}': no such directory, and not the form of a hub id (owner/name)")

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(_DOWNLOAD), ignore_patterns=list(_NO_DOWNLOAD)))
    except Exception as error:  # the hub's HTTP client, and so the type of its errors, changes with its version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"model '{model}': there is no local directory {local.absolute()}, and the hub didn't give it either "
            f"({reason}). Give the path of a model directory, or check the id, the network and your access to it"
        ) from error


def _find_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory without safetensors, of a split one the first part; None where there is none.

    Raises CheckpointError where there are several models.
    """
    paths = list(directory.iterdir())
    if any(path.suffix == ".safetensors" for path in paths):
        return None
    names = sorted(path.name for path in paths if path.suffix == ".gguf")
    parts = [GGUF_PART.fullmatch(name) for name in names]
    models = {part["stem"] if part else name for name, part in zip(names, parts, strict=True)}
    if len(models) > 1:
        few = ", ".join(sorted(models)[:4]) + (", ..." if len(models) > 4 else "")
        raise CheckpointError(f"{directory} holds {len(models)} GGUF models ({few}): name the file of one")
    return directory / names[0] if names else None


def read_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Find the safetensors files of a model directory and read their headers.

    Taken, in this order: `model.safetensors`; the shards named by `model.safetensors.index.json`; the same with one
    variant name (`model.fp16.safetensors`); all `*.safetensors` files where there is no index.

    Raises CheckpointError when there are none, when a shard of the index is missing, when two files hold one tensor, or when
    a header is unsound or disagrees with the file's size.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory, expected a model directory with safetensors files")
    names = sorted(entry.name for entry in directory.iterdir())
    if SINGLE_FILE in names:
        return _from_files(directory, [SINGLE_FILE], SINGLE_FILE)
    if INDEX_FILE in names:
        return _from_index(directory, INDEX_FILE)

    indices = {m["variant"]: name for name in names if (m := _VARIANT_INDEX.fullmatch(name))}
    singles = {m["variant"]: name for name in names if (m := _VARIANT_FILE.fullmatch(name))}
    variants = sorted(indices.keys() | singles.keys())
    if len(variants) > 1:
        raise CheckpointError(
            f"{directory} holds several variants of the weights ({', '.join(variants)}) and no {SINGLE_FILE}: "
            "keep the one to use in a directory of its own, with config.json and the tokenizer"
        )
    if variants:
        variant = variants[0]
        if variant in singles:
            return _from_files(directory, [singles[variant]], singles[variant])
        return _from_index(directory, indices[variant])

    files = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if not files:
        _refuse_without_safetensors(directory, names)
    _check_shards_complete(directory, files)
    return _from_files(directory, files, f"{len(files)} safetensors file(s) without an index: {', '.join(files)}")


def _refuse_without_safetensors(directory: Path, names: list[str]) -> NoReturn:
    pickled = [name for name in names if name.endswith(_UNSAFE_SUFFIXES)]
    if pickled:
        raise CheckpointError(
            f"{directory} holds a PyTorch checkpoint ({', '.join(pickled[:3])}), expected safetensors: convert it by "
            "loading it with Transformers' from_pretrained and writing it with save_pretrained"
        )
    if any(name.startswith("adapter_") for name in names):
        raise CheckpointError(f"{directory} holds an adapter, expected a whole model: give its base model's directory")
    raise CheckpointError(
        f"{directory} has no safetensors files, expected {SINGLE_FILE} or {INDEX_FILE} with its shards; "
        f"found {', '.join(names[:8]) or 'nothing'}"
    )


def _check_shards_complete(directory: Path, files: list[str]) -> None:
    present = set(files)
    for match in filter(None, map(_SHARD.fullmatch, files)):
        count, width = int(match["count"]), len(match["number"])
        numbers = (f"{number:0{width}d}" for number in range(1, min(count, 100_000) + 1))
        missing = [
            name for n in numbers if (name := f"{match['stem']}-{n}-of-{match['count']}.safetensors") not in present
        ]
        if missing:
            raise CheckpointError(
                f"{directory}: {match[0]} is one of {count} shards and {len(missing)} are missing, the first "
                f"{missing[0]}: download the model again"
            )


def _from_files(directory: Path, names: list[str], found: str) -> Checkpoint:
    tensors = _tensors_of(directory, names)
    return Checkpoint(directory, tuple(directory / name for name in names), tensors, found)


def _tensors_of(directory: Path, names: list[str]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for name in names:
        for entry in read_header(directory / name):
            if entry.name in tensors:
                raise CheckpointError(
                    f"{directory}: tensor '{entry.name}' is in both {tensors[entry.name].path.name} and {name}, "
                    "expected once: remove the files that aren't part of the model, or save it again"
                )
            tensors[entry.name] = entry
    return tensors


def _from_index(directory: Path, index_name: str) -> Checkpoint:
    index_path = directory / index_name
    try:
        weight_map = parse_json(index_path.read_bytes(), str(index_path)).get("weight_map")
    except OSError as error:
        raise CheckpointError(f"{index_path}: can't be read: {error.strerror}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: expected an object 'weight_map', tensors to files: download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _stays_inside(name):
            raise CheckpointError(
                f"{index_path}: tensor '{tensor}' is said to be in {name!r:.120}, expected a file of the directory"
            )
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index_path} names {len(shards)} shards and {len(missing)} are missing, the first {missing[0]}: "
            "download the model again"
        )
    # Transformers takes what a shard holds, whatever the index says of it.
    tensors = _tensors_of(directory, shards)
    lost = {tensor: name for tensor, name in weight_map.items() if tensor not in tensors}
    found = f"{index_name}, {len(shards)} shard(s)"
    return Checkpoint(directory, tuple(directory / name for name in shards), tensors, found, lost)


@cache  # an index names the same few files for every tensor
def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, in file order, after proving that their extents tile its data exactly.

    Raises CheckpointError naming the file, the tensor, what was expected and what was found.
    """
    text, file_bytes = _header_text(path)
    header = parse_json(text, f"{path}: header")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        damaged(path, "'__metadata__' to be an object of strings", f"{metadata!r:.60}")

    data_start = 8 + len(text)
    infos = sorted(((name, *_tensor_info(path, name, info)) for name, info in header.items()), key=lambda row: row[3:])
    entries, end = [], 0
    for name, dtype, shape, begin, stop in infos:
        if begin != end or stop < begin:
            damaged(path, f"tensor '{name}' to start at data byte {end}, where another ends", f"{begin} to {stop}")
        expected = _num_bytes(path, name, dtype, shape)
        if expected != stop - begin:
            damaged(path, f"tensor '{name}' of {dtype} {list(shape)} to have {expected} bytes", f"{stop - begin}")
        entries.append(TensorEntry(name, dtype, shape, path, data_start + begin, stop - begin))
        end = stop
    if data_start + end != file_bytes:
        last = f"tensor '{entries[-1].name}'" if entries else "the header"
        state = "truncated" if file_bytes < data_start + end else "longer than it should be"
        damaged(path, f"{data_start + end} bytes, the end of {last}", f"{file_bytes} bytes (the file is {state})")
    return entries


def _header_text(path: Path) -> tuple[bytes, int]:
    """The JSON of the header, and the size of the file."""
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                damaged(path, "8 bytes of header length", f"a file of {file_bytes} bytes")
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > MAX_HEADER_BYTES:
                damaged(path, f"a header of at most {MAX_HEADER_BYTES} bytes", f"a length of {header_bytes}")
            if 8 + header_bytes > file_bytes:
                damaged(path, f"a header of {header_bytes} bytes", f"a file of {file_bytes} bytes")
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    if not text.startswith(b"{"):
        damaged(path, "a header that starts with '{'", repr(text[:8]))
    return text, file_bytes


def _tensor_info(path: Path, name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(info, dict):
        damaged(path, f"tensor '{name}' to have dtype, shape and data_offsets", f"{info!r:.60}")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        damaged(path, f"tensor '{name}' to have a dtype out of {', '.join(DTYPE_BITS)}", f"{dtype!r:.60}")
    if not _are_sizes(shape):
        damaged(path, f"tensor '{name}' to have a shape of non-negative integers", f"{shape!r:.60}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        damaged(path, f"tensor '{name}' to have two data_offsets", f"{offsets!r:.60}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _num_bytes(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> int:
    # Checked at each factor: a product of hostile sizes would otherwise grow without bound.
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits >= MAX_TENSOR_BYTES:
            damaged(path, f"tensor '{name}' to have fewer than 2**63 bits", f"a shape of {list(shape[:8])}")
    if bits % 8:
        damaged(path, f"tensor '{name}' to end at a whole byte", f"{bits} bits")
    return bits // 8


def _are_sizes(values: Any) -> bool:
    # `type` and not `isinstance`: JSON's true and false are integers to Python.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MAX_TENSOR_BYTES for value in values)


def parse_json(text: bytes, subject: str) -> dict[str, Any]:
    """A JSON object without repeated keys. subject: what is read, for the message. Raises CheckpointError for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{subject}: damaged: key '{key}' is there twice: download the model again")
            result[key] = value
        return result

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{subject}: damaged: not JSON ({error}): download the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{subject}: damaged: expected a JSON object, found {type(value).__name__}: download the model again"
        )
    return value


def damaged(path: Path, expected: str, found: str) -> NoReturn:
    """Raises CheckpointError."""
    raise CheckpointError(f"{path}: damaged: expected {expected}, found {found}: download the file again")
