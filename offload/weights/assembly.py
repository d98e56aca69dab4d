"""Parameters that are put together from packed weights, such as experts that the checkpoint has one by one.

Transformers' conversions move elements. Run on placements (`conversion.py`) of matrices that stand for whole
packed weights, they say which rows of which matrix land where. Every format gives whole rows, so what is accepted are matrices
of rows, one below the other, and stacks of such matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.weights.conversion import PlacementTensor
from finetune.offload.weights.formats import FoundWeight, PlainTensor, StoredWeight
from finetune.offload.weights.formats.stacked import JoinedRows, StackedWeights


class _Run(NamedTuple):
    """Rows [start, stop) of the weight `source`; of a stack, those of its matrices one after the other."""

    source: str
    start: int
    stop: int


class Sources:
    """The weights of a checkpoint that conversions have taken, by name."""

    def __init__(self, quantization: Mapping[str, Any] | None) -> None:
        self._quantization = quantization
        self._packed: dict[str, StoredWeight] = {}

    def place(self, parameter: str, name: str, found: FoundWeight) -> PlacementTensor:
        """What a converter moves in place of this weight.

        Raises CheckpointError for a format whose matrices are not known without the model, and for parts that do not fit.
        """
        form, parts = found
        if form is PlainTensor:
            return PlacementTensor.of(parts[""])
        shape = form.matrix_shape(parts)
        if shape is None:
            raise CheckpointError(
                f"parameter '{parameter}' is put together from weights that are stored as {form.word}, which isn't supported: "
                "use the original weights"
            )
        self._packed[name] = form.make(shape, parts, self._quantization)
        first = next(iter(parts.values()))
        return PlacementTensor.of(TensorEntry(name, "U8", shape, first.path, 0, 0))

    def has_packed(self, placement: PlacementTensor) -> bool:
        """Whether it is not put together from plain weights alone."""
        return any(box.entry.name in self._packed for box in placement.boxes)

    def assemble(self, parameter: str, placement: PlacementTensor) -> StoredWeight:
        """Raises CheckpointError unless it has whole rows of matrices, one below the other, in two or three dimensions."""
        words = sorted({self._packed[box.entry.name].word for box in placement.boxes if box.entry.name in self._packed})
        runs = _runs(placement)
        if runs is None:
            raise CheckpointError(
                f"parameter '{parameter}' {list(placement.shape)} is put together from weights that are stored as "
                f"{' and '.join(words)}, and not of whole rows of them, which isn't supported: use the original weights"
            )
        entries = {box.entry.name: box.entry for box in placement.boxes}
        matrices = tuple(self._matrix(parameter, matrix, entries) for matrix in runs)
        return matrices[0] if placement.dim() == 2 else StackedWeights(matrices, tuple(placement.shape))

    def _matrix(self, parameter: str, runs: list[_Run], entries: Mapping[str, TensorEntry]) -> StoredWeight:
        parts = []
        for run in runs:
            weight = self._packed.get(run.source) or _plain(parameter, entries[run.source])
            parts.append(weight if (run.start, run.stop) == (0, weight.shape[0]) else weight.rows([(run.start, run.stop)]))
        rows = sum(run.stop - run.start for run in runs)
        return parts[0] if len(parts) == 1 else JoinedRows(tuple(parts), (rows, *parts[0].shape[1:]))


def _plain(parameter: str, entry: TensorEntry) -> PlainTensor:
    weight = PlainTensor.of(entry)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        raise CheckpointError(
            f"{entry.path}: tensor '{entry.name}' of parameter '{parameter}' is stored as {weight.word} and has no scales: "
            "download the model again"
        )
    return replace(weight, shape=(prod(weight.shape[:-1]), weight.shape[-1]))


def _runs(placement: PlacementTensor) -> list[list[_Run]] | None:
    """Of each matrix of a placement, the rows that it consists of, from the first on; None where it is something else."""
    *stacks, rows, columns = placement.shape
    if len(stacks) > 1:
        return None
    found: list[dict[int, _Run]] = [{} for _ in range(stacks[0] if stacks else 1)]
    for box in placement.boxes:
        *stack, row, column = box.start
        *stack_size, num_rows, num_columns = box.size
        *stack_stride, row_stride, stride = box.strides
        of_source = box.entry.shape[-1]
        is_whole = num_columns == columns == of_source and column == box.offset % of_source == 0
        is_upright = (columns == 1 or stride == 1) and (num_rows == 1 or row_stride == columns)
        is_stacked = not stack or stack_size[0] == 1 or stack_stride[0] % columns == 0
        if not (is_whole and is_upright and is_stacked):
            return None
        for index in range(stack_size[0] if stack else 1):
            start = (box.offset + (index * stack_stride[0] if index else 0)) // columns
            found[index + (stack[0] if stack else 0)][row] = _Run(box.entry.name, start, start + num_rows)
    matrices = [_in_order(runs, rows) for runs in found]
    return None if None in matrices else matrices


def _in_order(runs: Mapping[int, _Run], rows: int) -> list[_Run] | None:
    """Rows [0, rows), with runs that go on where the one before ends made one; None where some are missing."""
    merged: list[_Run] = []
    at = 0
    for row, run in sorted(runs.items()):
        if row != at:
            return None
        at += run.stop - run.start
        if merged and merged[-1].source == run.source and merged[-1].stop == run.start:
            merged[-1] = merged[-1]._replace(stop=run.stop)
        else:
            merged.append(run)
    return merged if at == rows else None
