"""A checkpoint compressed without loss into another, in a stream: [Note: lossless weights] in `formats/lossless.py`.

Matrices in bf16 that are parameters as they are stored are compressed, where that makes them shorter. Everything else is
copied: small weights, other dtypes, what Transformers puts together from several tensors. Files keep their names. A tensor is
read twice: to count its exponents, and to encode it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes, round_up
from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.files.safetensors_files import file_header, write_index
from finetune.offload.weights.checkpoint_directory import new_checkpoint
from finetune.offload.weights.formats import PlainTensor, StoredWeight
from finetune.offload.weights.formats.lossless import CODE, CODE_BYTES, METHOD, OFFSETS, VERSION
from finetune.offload.weights.formats.lossless_code import CHUNK, code_lengths, count_exponents, encode, room_bytes
from finetune.offload.weights.formats.plain import DTYPE_NAMES
from finetune.offload.weights.parts import ModelParts, stored_dtype

LAYER_CHUNK = CHUNK  # numbers
TABLE_CHUNK = 2048  # of weights whose rows are read alone: a chunk is the least that can be read
MIN_BYTES = 1 << 17  # shorter weights gain nothing
MOST_PIECE_NUMBERS = 1 << 23
LEAST_BUDGET_BYTES = 5 * CHUNK
SHARE = 0.97  # of its bytes that a weight must come below


@dataclass(frozen=True, slots=True)
class Compressed:
    """What has come of a checkpoint."""

    weights: int
    """That were compressed."""
    plain_bytes: int
    """Of all tensors, before."""
    num_bytes: int
    """And after."""


def compress_checkpoint(
    parts: ModelParts,
    directory: Path,
    budget_bytes: int,
    side_files: Mapping[Path, Path],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compressed:
    """Writes the model of `parts`, compressed, to `directory`, which appears only once it is whole and durable.

    budget_bytes: for the buffers that numbers go through. side_files: path in the directory -> file, of all that stands beside
    the weights; config.json among them gets a `quantization_config`. progress: is told the bytes that are done, and of all.

    Raises UserError for a model that has no such weights, and for what cannot be written; CheckpointError for what cannot be
    read.
    """
    chunks = _chunks(parts)
    checkpoint = parts.checkpoint
    if not chunks:
        raise UserError(
            f"{parts.directory}: expected matrices in bf16 of at least {format_bytes(MIN_BYTES)} to compress, found none: use "
            "the model as it is"
        )
    if budget_bytes < LEAST_BUDGET_BYTES:
        raise ValueError(f"expected a budget of at least {LEAST_BUDGET_BYTES} bytes, found {budget_bytes}")
    copies = {copy.extents[0][:2] for _, copy in parts.sources.copies if len(copy.extents) == 1}
    entries = [entry for entry in checkpoint.tensors.values() if (entry.path, entry.offset) not in copies]
    with new_checkpoint(directory, checkpoint, side_files) as temporary:
        writer = _Writer(budget_bytes // 5 // CHUNK * CHUNK, chunks, progress, sum(entry.num_bytes for entry in entries))
        homes: dict[str, str] = {}
        for path in checkpoint.files:
            mine = [entry for entry in entries if entry.path == path]
            names = writer.write(temporary / path.name, sorted(mine, key=lambda entry: entry.offset))
            homes |= dict.fromkeys(names, path.name)
        for index in temporary.glob("*.safetensors.index.json"):
            write_index(index, homes, writer.written_bytes)
        _say_so(temporary / "config.json", DTYPE_NAMES[stored_dtype(checkpoint, None)])
    return Compressed(writer.weights, writer.plain_bytes, writer.written_bytes)


def is_compressible(weight: StoredWeight) -> bool:
    """Whether it is compressed where it is a parameter as it is stored."""
    is_matrix = isinstance(weight, PlainTensor) and len(weight.shape) == 2 and len(weight.extents) == 1
    return is_matrix and weight.dtype == torch.bfloat16 and weight.num_bytes >= MIN_BYTES


def _chunks(parts: ModelParts) -> dict[str, int]:
    """The tensors of a checkpoint to compress, and numbers of a chunk."""
    found: dict[str, int] = {}
    for name, key in parts.sources.direct.items():
        if is_compressible(parts.sources[name]):
            found[key] = LAYER_CHUNK
    for name, home in ((name, parts.sources.tied.get(name, name)) for name in parts.sources):
        is_table = isinstance(parts.model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        if is_table and (key := parts.sources.direct.get(home)) in found:
            found[key] = TABLE_CHUNK
    return found


def _say_so(config: Path, dtype: str) -> None:
    values = json.loads(config.read_bytes())
    values["quantization_config"] = {"quant_method": METHOD, "version": VERSION, "dtype": dtype}
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


class _Writer:
    """Writes safetensors files whose sizes are known only at their end."""

    def __init__(
        self, piece_numbers: int, chunks: Mapping[str, int], progress: Callable[[int, int], None], total_bytes: int
    ) -> None:
        self.weights = self.plain_bytes = self.written_bytes = 0
        self._chunks, self._progress, self._total_bytes = chunks, progress, total_bytes
        self._piece = min(piece_numbers, MOST_PIECE_NUMBERS)
        self._numbers = torch.empty(self._piece, dtype=torch.bfloat16)
        self._coded = torch.empty(room_bytes(self._piece, min(chunks.values())), dtype=torch.uint8)

    def write(self, path: Path, entries: list[TensorEntry]) -> list[str]:
        """One file of these tensors; returns the names of what is in it."""
        tensors = []
        with open(path, "wb") as file:
            start = end = _room_of_header(entries)
            file.seek(start)
            for entry in entries:
                for name, dtype, shape in self._write_tensor(file, entry):
                    begin, end = end, file.tell()
                    tensors.append((name, dtype, shape, end - begin))
                self.plain_bytes += entry.num_bytes
                self._progress(self.plain_bytes, self._total_bytes)
            self.written_bytes += end - start
            header, starts = file_header(tensors, start)
            file.seek(0)
            file.write(header)
        return list(starts)

    def _write_tensor(self, file: BinaryIO, entry: TensorEntry) -> Iterator[tuple[str, str, list[int]]]:
        """Gives name, dtype and shape of each tensor once its bytes are written."""
        chunk = self._chunks.get(entry.name)
        lengths = None if chunk is None else self._lengths(entry, chunk)
        if lengths is None:
            for piece in self._pieces(entry):
                file.write(_bytes(piece))
            yield entry.name, entry.dtype, list(entry.shape)
            return
        offsets = torch.zeros(-(-(entry.num_bytes // 2) // chunk) + 1, dtype=torch.int64)
        done, start = 0, file.tell()
        for piece in self._pieces(entry):
            sizes = encode(piece.view(torch.bfloat16), lengths, chunk, done, self._coded)
            offsets[done + 1 : done + 1 + len(sizes)] = torch.tensor(sizes)
            done += len(sizes)
            file.write(_bytes(self._coded[: sum(sizes)]))
        torch.cumsum(offsets, 0, out=offsets)
        file.write(bytes(-(file.tell() - start) % 8))
        yield entry.name, "U8", [file.tell() - start]
        file.write(_bytes(offsets))
        yield entry.name + OFFSETS, "I64", [offsets.numel()]
        file.write(bytes([*lengths.tolist(), chunk.bit_length() - 1]).ljust(CODE_BYTES, b"\0"))
        yield entry.name + CODE, "U8", [CODE_BYTES]
        self.weights += 1

    def _lengths(self, entry: TensorEntry, chunk: int) -> Tensor | None:
        """Of the words of this tensor's code, uint8 [256]; None where it is better left as it is."""
        counts = sum(count_exponents(piece.view(torch.bfloat16)) for piece in self._pieces(entry)).tolist()
        lengths = code_lengths(counts)
        numbers = entry.num_bytes // 2
        bits = sum(count * bits for count, bits in zip(counts, lengths, strict=True))
        expected = numbers + bits / 8 + 24 * (numbers / chunk + 1) + CODE_BYTES
        return torch.tensor(lengths, dtype=torch.uint8) if expected < SHARE * entry.num_bytes else None

    def _pieces(self, entry: TensorEntry) -> Iterator[Tensor]:
        """Its bytes, uint8, a piece at a time, in one buffer."""
        buffer = self._numbers.view(torch.uint8)
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            left = entry.num_bytes
            while left:
                piece = buffer[: min(left, buffer.numel())]
                got = 0
                while got < piece.numel():
                    count = file.readinto(memoryview(piece.numpy())[got:])
                    if not count:
                        raise CheckpointError(f"{entry.path}: tensor '{entry.name}' ends early: download the model again")
                    got += count
                yield piece
                left -= piece.numel()


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy().data


def _room_of_header(entries: list[TensorEntry]) -> int:
    """Bytes in front of the data: enough for any numbers, in whole pages."""
    most = sum(3 * (2 * len(json.dumps(entry.name)) + 40 * (len(entry.shape) + 1) + 160) for entry in entries) + 200
    return round_up(8 + most)
