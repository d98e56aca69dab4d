"""bf16 weights that are compressed without loss, a format of this project: 66% of the bytes, and every bit of the numbers.

[Note: lossless weights]
The numbers of a weight are cut into chunks, which are coded on their own: `csrc/lossless.h`. A weight `NAME` is three tensors
of a safetensors file: `NAME` (uint8, the chunks one after another, filled up to a multiple of 8 bytes),
`NAME.lossless_offsets` (int64, where each chunk begins, and where the last one ends) and `NAME.lossless_code` (uint8: the
lengths of the code's 256 words, the binary logarithm of the numbers of a chunk, zeros). `quantization_config` of config.json
has `quant_method` "finetune_lossless", `version` 1, and `dtype`, the word of safetensors for the dtype that most weights had.
Every chunk has a checksum: a damaged file is noticed where it is used.

Sources: Zhang et al. 2025, "70% size, 100% accuracy" (DFloat11); Hershcovitch et al. 2024, "ZipNN".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.weights.formats.base import StoredWeight
from finetune.offload.weights.formats.lossless_code import CHUNK, decode, is_complete
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.formats.stored_parts import check, check_tensor, gather, read_bytes

METHOD = "finetune_lossless"
VERSION = 1
OFFSETS, CODE = ".lossless_offsets", ".lossless_code"
CODE_BYTES = 264


class Span(NamedTuple):
    """Numbers of a matrix, and where what is stored of them begins among what is here."""

    start: int
    """The first number, in the whole matrix."""
    stop: int
    """The one behind the last."""
    offset_index: int
    """Of the offset of the first number's chunk."""
    byte_start: int
    """Of that chunk."""
    byte_stop: int
    """Where the last number's chunk ends."""


@dataclass(frozen=True, slots=True)
class LosslessWeight(StoredWeight):
    """A weight in bf16, or rows of one. See [Note: lossless weights]."""

    word = "lossless bf16"
    needs_host = True

    packed: PlainTensor
    """uint8 [bytes]"""
    offsets: PlainTensor
    """int64 [chunks + 1]"""
    code: PlainTensor
    """uint8 [CODE_BYTES]"""
    shape: tuple[int, ...]
    """[rows, columns]"""
    chunk: int
    """Numbers in one."""
    numbers: int
    """Of the whole weight."""
    spans: tuple[Span, ...]
    """What is here of it: of the whole, one."""

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        if quantization is None or quantization.get("quant_method") != METHOD:
            return {}
        if quantization.get("version") != VERSION:
            raise CheckpointError(
                f"the weights are compressed in version {quantization.get('version')!r:.40} of {METHOD} (quantization_config "
                f"in config.json), expected version {VERSION}: compress the original model again"
            )
        return gather(entries, {"offsets": OFFSETS, "code": CODE}, needed=("packed", "offsets", "code"))

    @classmethod
    def dense_dtype(cls, quantization: Mapping[str, Any] | None) -> str | None:
        return str((quantization or {}).get("dtype"))

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> LosslessWeight:
        packed, code, numbers = parts["packed"], parts["code"], prod(shape)
        check(packed, packed.dtype == "U8" and len(packed.shape) == 1, "U8 [bytes]", f"{packed.dtype} {list(packed.shape)}")
        check_tensor(code, "U8", (CODE_BYTES,))
        values = read_bytes(code, CODE_BYTES)
        check(code, is_complete(values[:256]), "the lengths of a complete code", list(values[:256]))
        log2 = values[256]
        check(code, 1 << log2 <= CHUNK, f"chunks of at most {CHUNK} numbers", f"2**{log2}")
        chunk = 1 << log2
        check(packed, numbers > 0, "a weight with numbers", f"shape {list(shape)}")
        check_tensor(parts["offsets"], "I64", (-(-numbers // chunk) + 1,))
        offsets = PlainTensor.of(parts["offsets"])
        whole = Span(0, numbers, 0, 0, packed.num_bytes)
        weight = cls(PlainTensor.of(packed), offsets, PlainTensor.of(code), shape, chunk, numbers, (whole,))
        first, end = weight._offsets_at([0, offsets.shape[0] - 1]).values()
        is_right = first == 0 and 0 <= packed.num_bytes - end < 8
        check(parts["offsets"], is_right, f"offsets from 0 to the end of {packed.num_bytes} bytes", f"{first} to {end}")
        return replace(weight, spans=(whole._replace(byte_stop=end),))

    def rows(self, ranges: Iterable[tuple[int, int]]) -> LosslessWeight:
        """Of a whole weight: with the chunks that they begin or end within. Reads where these are in its file."""
        if self.shape[0] and prod(self.shape) != self.numbers:
            raise ValueError(f"rows of {len(self.spans)} runs of rows, expected a whole matrix")
        row = prod(self.shape[1:])
        ranges = [(start * row, stop * row) for start, stop in ranges if start < stop]
        within = [(start // self.chunk, -(-stop // self.chunk)) for start, stop in ranges]
        offsets = self._offsets_at([index for bounds in within for index in bounds])
        spans: list[Span] = []
        chunks: list[tuple[int, int]] = []  # runs of them that are read
        places: list[tuple[int, int]] = []  # and their bytes
        offsets_before = bytes_before = 0  # of the runs before the last
        for (start, stop), (first, last) in zip(ranges, within, strict=True):
            low, high = offsets[first], offsets[last]
            if not 0 <= low <= high <= self.spans[0].byte_stop:
                raise self._damaged(f"a chunk is said to be at bytes {low} to {high}")
            if chunks and chunks[-1][0] <= first < chunks[-1][1] and places[-1][0] <= low <= places[-1][1]:
                # The run before ends in this chunk: it goes on.
                chunks[-1] = chunks[-1][0], max(last, chunks[-1][1])
                places[-1] = places[-1][0], max(high, places[-1][1])
            else:
                if chunks:
                    offsets_before += chunks[-1][1] - chunks[-1][0] + 1
                    bytes_before += places[-1][1] - places[-1][0]
                chunks.append((first, last))
                places.append((low, high))
            byte_start = bytes_before + low - places[-1][0]
            spans.append(Span(start, stop, offsets_before + first - chunks[-1][0], byte_start, byte_start + high - low))
        return replace(
            self,
            packed=self.packed.rows(places),
            offsets=self.offsets.rows([(first, last + 1) for first, last in chunks]),
            shape=(sum(stop - start for start, stop in ranges) // row, *self.shape[1:]),
            spans=tuple(spans),
        )

    def row_bytes(self, count: int) -> int:
        """Rows begin and end within chunks, which may be such that could not be compressed; each run of chunks has an offset
        more than there are chunks."""
        row = prod(self.shape[1:])
        chunks = count * (-(-(row - 1) // self.chunk) + 1)
        return min(self.num_bytes + 8 * count, chunks * (4 + 2 * self.chunk + 16) + CODE_BYTES)

    def decode_into(self, stored: dict[str, Tensor], numbers: Tensor) -> None:
        if numbers.dtype not in (torch.bfloat16, torch.float32):
            numbers.copy_(self.decode(stored, torch.bfloat16))
            return
        numbers, done = numbers.view(-1), 0
        for span in self.spans if numbers.device.type != "meta" else ():
            here = stored | {
                "packed": stored["packed"][span.byte_start : span.byte_stop],
                "offsets": stored["offsets"][span.offset_index :],
            }
            target = numbers[done : done + span.stop - span.start]
            try:
                decode(here, self.chunk, self.numbers, span.start, span.stop, target)
            except ValueError as error:
                raise self._damaged(str(error)) from error
            done += span.stop - span.start

    def _offsets_at(self, indices: Iterable[int]) -> dict[int, int]:
        """Index -> offset, of a whole weight's."""
        found = {}
        with ExitStack() as files:
            opened: dict[Path, Any] = {}
            for index in indices:
                value = b""
                for path, place, num_bytes, _ in self.offsets.cut(8 * index, 8 * index + 8):
                    try:
                        file = opened[path] = opened.get(path) or files.enter_context(open(path, "rb"))
                        value += os.pread(file.fileno(), num_bytes, place)
                    except OSError as error:
                        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
                found[index] = int.from_bytes(value, "little", signed=True)
        return found

    def _damaged(self, what: str) -> UserError:
        place = self.packed.extents[0] if self.packed.extents else self.offsets.extents[0]
        return CheckpointError(
            f"{place.path}: the compressed weight at byte {place.file_offset} is damaged: {what}: compress the original model "
            "again"
        )
