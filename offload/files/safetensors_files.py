"""What a safetensors checkpoint that is written here has around its numbers: headers, names of shards, the index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from finetune.memory.units import round_up
from finetune.offload.files.checkpoint import SINGLE_FILE

SHARD_BYTES = 4 << 30


def file_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], least_bytes: int = 0
) -> tuple[bytes, dict[str, int]]:
    """The header of a file, padded to whole pages and to `least_bytes`, and where each tensor begins in the file.

    tensors: name, safetensors' word for the dtype, shape and bytes of each; they lie one behind the other.
    """
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for name, dtype, shape, num_bytes in tensors:
        starts[name] = end
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    size = max(least_bytes, round_up(len(text) + 8))
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8), {name: size + at for name, at in starts.items()}


def write_new(path: Path, header: bytes) -> None:
    """Begins a file. Raises FileExistsError where there is one."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        file.write(header)


def shard_names(count: int) -> list[str]:
    """Of so many files."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_index(path: Path, homes: Mapping[str, str], num_bytes: int) -> None:
    """homes: name of a tensor -> that of its file. num_bytes: of all."""
    values = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(homes.items()))}
    path.write_text(json.dumps(values, indent=2))


def cut_files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Name of a shard -> which tensors are in it: in order, of some `SHARD_BYTES` each. sizes: bytes of every tensor."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, num_bytes in sizes.items():
        if files[-1] and filled + num_bytes > SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += num_bytes
    return dict(zip(shard_names(len(files)), files, strict=True))
