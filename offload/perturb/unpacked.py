"""A journal applied to a model of which some weights are packed: a checkpoint in which all are plain, written as a stream.

Packed weights take no update up, so the result can't be in their format: each is decoded, moved, and written in the dtype that
most of the other weights have. What was plain keeps its dtype. Tensors are named as the model names its parameters, in files of
their own: memory does not depend on the model's size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.offload.files.checkpoint import INDEX_FILE
from finetune.offload.files.safetensors_files import cut_files, file_header, write_index, write_new
from finetune.offload.noise import noise
from finetune.offload.perturb.replay import CHUNK_BYTES
from finetune.offload.residency.io import IOEngine
from finetune.offload.weights.checkpoint_directory import new_checkpoint
from finetune.offload.weights.formats import PlainTensor, StoredWeight
from finetune.offload.weights.formats.plain import DTYPE_NAMES, dense_bytes
from finetune.offload.weights.parts import ModelParts
from finetune.offload.weights.streamed_parts import read_tensor


class _Chunk(NamedTuple):
    """Some neighbouring numbers of a weight."""

    part: StoredWeight  # they alone
    first_element: int  # in the weight
    count: int  # of the numbers


def write_unpacked(
    parts: ModelParts,
    keys: Mapping[str, int],
    kind: noise.Noise,
    groups: Sequence[noise.Group],
    directory: Path,
    side_files: Mapping[Path, Path],
    io_backend: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the model of `parts` with what `groups` of this kind of noise add, to `directory`, which appears once it is whole.

    keys: fully qualified name -> key of its noise. side_files: as `new_checkpoint` takes them; of config.json, what says that
    weights are packed is left out. progress: bytes written, and of all.
    Raises UserError when the disk is full or the directory cannot be written, IOFailure for failed reads and writes.
    """
    weights = {name: weight for name, weight in parts.sources.items() if name not in parts.sources.tied}
    dtypes = {name: w.dtype if isinstance(w, PlainTensor) else parts.dtype for name, w in weights.items()}
    sizes = {name: dense_bytes(weight.shape, dtypes[name]) for name, weight in weights.items()}
    files = cut_files(sizes)
    written, total = 0, sum(sizes.values())
    with new_checkpoint(directory, parts.checkpoint, side_files) as temporary, IOEngine(io_backend) as io:
        sources: dict[Path, int] = {}
        for file_name, names in files.items():
            path = temporary / file_name
            tensors = [(name, DTYPE_NAMES[dtypes[name]], weights[name].shape, sizes[name]) for name in names]
            header, offsets = file_header(tensors)
            write_new(path, header)
            target = io.open(path, writable=True)
            for name in names:
                for start, moved in _moved_chunks(io, sources, weights[name], dtypes[name], keys.get(name), kind, groups):
                    at = offsets[name] + start * moved.itemsize
                    io.wait(io.submit_writes([(target, at, moved.nbytes, moved.data_ptr())]))
                    written += moved.nbytes
                    progress(written, total)
            io.sync(target)
            io.close_file(target)
        for file in sources.values():
            io.close_file(file)
        _describe(temporary, files, total)


def _moved_chunks(
    io: IOEngine,
    files: dict[Path, int],
    weight: StoredWeight,
    dtype: torch.dtype,
    key: int | None,
    kind: noise.Noise,
    groups: Sequence[noise.Group],
) -> Iterator[tuple[int, Tensor]]:
    """(first element, numbers in `dtype`) of every chunk of a weight, brought up to date. key: None: it has no noise."""
    columns = weight.shape[-1] if len(weight.shape) > 1 else 0
    for part, first_element, count in _chunks(weight):
        stored = part.load(lambda tensor: read_tensor(io, files, tensor))
        clean = stored if isinstance(part, PlainTensor) else part.decode(stored, torch.float32).view(-1)
        moved = clean
        if key is not None:
            moved = torch.empty(count, dtype=dtype)
            noise.move(kind, noise.Parameter(key, columns, dtype), clean, groups, [noise.Target(moved)], first_element)
        yield first_element, moved.to(dtype)


def _chunks(weight: StoredWeight) -> Iterator[_Chunk]:
    """Of a packed matrix, whole rows."""
    if isinstance(weight, PlainTensor):
        weight, columns, itemsize = replace(weight, shape=(prod(weight.shape),)), 1, weight.dtype.itemsize
    else:
        columns, itemsize = weight.shape[1], torch.float32.itemsize
    step = max(1, CHUNK_BYTES // (itemsize * columns))
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        yield _Chunk(weight.rows([(start, stop)]), start * columns, (stop - start) * columns)


def _describe(directory: Path, files: Mapping[str, Sequence[str]], num_bytes: int) -> None:
    """Says beside the weights which file has what, and no longer that they are packed."""
    for path in directory.glob("*.safetensors.index.json"):  # of the original
        path.unlink()
    if len(files) > 1:
        homes = {name: file for file, names in files.items() for name in names}
        write_index(directory / INDEX_FILE, homes, num_bytes)
    config = directory / "config.json"
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("quantization_config", None)
        config.write_text(json.dumps(values, indent=2) + os.linesep, encoding="utf-8")
