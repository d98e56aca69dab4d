"""How much each matrix loses in each format, measured on a sample of its rows.

[Note: sensitivity]
What is compared between matrices is their relative error, |Q - W|^2 / |W|^2, each matrix counting once. BAQ's loss is that of
a layer's outputs, (Q - W) H (Q - W)^T with the second moments H of its inputs, and its level is proportional to the outputs'
energy, W H W^T. Without data H is not known. For inputs that are alike and independent H is a number times the identity, and
that number cancels.

Of each matrix some runs of whole rows are quantised, evenly spread: 1 MiB of it, less where there are very many. So a plan can
say in a moment what every matrix will be, and nothing depends on data or on the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite, prod
from pathlib import Path

import torch
from torch import Tensor

from finetune.memory.units import MIB
from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.quantize.kernels import Blocks, Sums, nest, pack_4bit, pack_int8
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.pieces import new_pool, pass_through
from finetune.offload.weights.formats.plain import TORCH_DTYPES

MATRIX_BYTES = MIB
"""Of a matrix that are looked at, at most; of a single row more."""
LEAST_BYTES = 64 << 10
TOTAL_BYTES = 1024 * MIB
"""Of all matrices, unless `LEAST_BYTES` of each are more."""
_RUNS = 8  # of rows, in a matrix
_BUFFERS = 4

Run = tuple[TensorEntry, int, int]
"""Some rows of a matrix: the first, and how many."""


def relative_errors(entries: Sequence[TensorEntry], nested: bool) -> dict[str, dict[str, float]]:
    """Name -> kind -> |Q - W|^2 / |W|^2, see [Note: sensitivity]; without int8 where fp16 cannot hold the numbers.

    entries: matrices in fp32, bf16 or fp16. nested: whether absmax of nf4 are in 8 bits.
    Raises CheckpointError for a matrix that is not finite, UserError where one cannot be read.
    """
    most = max(LEAST_BYTES, min(MATRIX_BYTES, TOTAL_BYTES // max(1, len(entries))))
    runs = [run for entry in sorted(entries, key=lambda entry: (entry.path, entry.offset)) for run in _runs(entry, most)]
    sums = {entry.name: {"nf4": Sums(0, 0), "int8": Sums(0, 0)} for entry in entries}
    largest = max((rows * _row_bytes(entry) for entry, _, rows in runs), default=1)
    pool, room = new_pool(largest, _BUFFERS), torch.empty(largest, dtype=torch.uint8)
    with IOEngine() as io:
        for (entry, _, rows), piece in pass_through(io, pool, _reads(io, runs)):
            source = piece.buffer[: rows * _row_bytes(entry)].view(TORCH_DTYPES[entry.dtype]).view(rows, -1)
            of_entry = sums[entry.name]
            for kind, found in (("nf4", _loss_4bit(source, room, nested)), ("int8", _loss_int8(source, room))):
                of_entry[kind] = Sums(*map(sum, zip(of_entry[kind], found, strict=True)))
    for entry in entries:
        if not isfinite(sums[entry.name]["nf4"].error):
            raise CheckpointError(
                f"{entry.path}: tensor '{entry.name}' holds infinity or NaN: bring the file from its source again"
            )
    return {
        name: {kind: s.error / s.weights if s.weights else 0.0 for kind, s in of_entry.items() if isfinite(s.error)}
        for name, of_entry in sums.items()
    }


def _row_bytes(entry: TensorEntry) -> int:
    return entry.num_bytes // prod(entry.shape[:-1])


def _runs(entry: TensorEntry, most: int) -> Iterator[Run]:
    all_rows = prod(entry.shape[:-1])
    rows = max(1, min(all_rows, most // _row_bytes(entry)))
    count = min(_RUNS, rows)
    for i in range(count):
        yield entry, i * all_rows // count, rows // count


def _reads(io: IOEngine, runs: Sequence[Run]) -> Iterator[tuple[Run, int, int, int]]:
    """As `pass_through` takes them."""
    files: dict[Path, int] = {}
    for run in runs:
        entry, first, rows = run
        if entry.path not in files:
            files[entry.path] = io.open(entry.path)
        yield run, files[entry.path], entry.offset + first * _row_bytes(entry), rows * _row_bytes(entry)


def _loss_4bit(source: Tensor, room: Tensor, nested: bool) -> Sums:
    blocks = Blocks.of(source.numel())
    sums = pack_4bit(source.view(-1), room, blocks)
    if not blocks.absmax.isfinite().all():
        return Sums(float("inf"), sums.weights)
    return Sums(sums.error + (nest(blocks).error if nested else 0.0), sums.weights)


def _loss_int8(source: Tensor, room: Tensor) -> Sums:
    absmax = torch.empty(len(source))
    sums = pack_int8(source, room, absmax)
    return sums if absmax.isfinite().all() else Sums(float("inf"), sums.weights)
