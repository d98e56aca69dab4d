"""From a block's weights to the reads that fill a slot, and to tensors in it.

Nothing is converted and nothing is copied: a block is a list of reads into a slot and of views of that slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.memory.units import PAGE_BYTES, round_up
from finetune.offload.weights.formats import PlainTensor, StoredWeight, stored_name
from finetune.offload.weights.formats.plain import dense_bytes

ALIGNMENT = 256
"""Bytes, of every tensor on an accelerator: products choose their kernels, so their rounding, by what up to 256 divides the
addresses of their operands (`_getAlignment` of PyTorch's CUDA products), and PyTorch's own tensors have 512."""


class Read(NamedTuple):
    """`num_bytes` bytes at `file_offset` of `path` go to byte `slot_offset` of the slot."""

    path: Path
    file_offset: int
    num_bytes: int
    slot_offset: int


class View(NamedTuple):
    """A contiguous tensor at byte `slot_offset` of the slot."""

    slot_offset: int
    dtype: torch.dtype  # as stored
    shape: tuple[int, ...]  # of the tensor

    @property
    def num_bytes(self) -> int:
        return dense_bytes(self.shape, self.dtype)

    @property
    def end(self) -> int:
        """The byte of the slot behind it."""
        return self.slot_offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How a group of weights lies in a slot, and the reads that bring it there.

    Reads share no page of the slot, except those of a tensor that is put together from several extents. Where a tensor
    can be put anywhere, `slot_offset` equals `file_offset` modulo the page, so that in a slot aligned to pages direct
    I/O needs no copy. Tensors are aligned to their element size.
    """

    num_bytes: int
    """Of the slot, in whole pages."""
    reads: tuple[Read, ...]
    """What fills it; empty where it is filled from memory."""
    views: dict[str, View]
    """Of every stored tensor, by `stored_name`: of a plain weight, by the weight's own."""
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    """What the views are of, by local name; empty where they are not of the files but were made in memory."""

    @property
    def read_bytes(self) -> int:
        """Bytes that one fetch reads; with the small gaps between tensors that share a read."""
        return sum(read.num_bytes for read in self.reads)

    def decode(self, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
        """The numbers of a weight, in `dtype`. tensors: of a slot, by the names of `views`."""
        weight = self.weights[name]
        return weight.decode(weight.take(tensors, name), dtype)


def layout_block(weights: Mapping[str, StoredWeight]) -> BlockLayout:
    """Lay out `weights` (by local name) in one slot. Stored tensors that are the same bytes share them there."""
    tensors = {stored_name(name, part): tensor for name, weight in weights.items() for part, tensor in weight.tensors.items()}
    homes: dict[PlainTensor, int] = {}
    reads: list[Read] = []
    end = 0
    unique = list(dict.fromkeys(tensor for tensor in tensors.values() if tensor.extents))
    whole = sorted((tensor for tensor in unique if _keeps_alignment(tensor)), key=lambda tensor: tensor.extents[0][:2])
    for run in _runs(whole):
        first, last = run[0].extents[0], run[-1].extents[0]
        start = round_up(end) + first.file_offset % PAGE_BYTES
        num_bytes = last.file_offset + last.num_bytes - first.file_offset
        reads.append(Read(first.path, first.file_offset, num_bytes, start))
        homes |= {tensor: start + tensor.extents[0].file_offset - first.file_offset for tensor in run}
        end = start + num_bytes
    for tensor in unique:
        if tensor not in homes:
            start = homes[tensor] = round_up(end) + _best_residue(tensor)
            reads += [Read(e.path, e.file_offset, e.num_bytes, start + e.target_offset) for e in tensor.extents]
            end = start + tensor.num_bytes
    views = {name: View(homes.get(tensor, 0), tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return BlockLayout(round_up(end), tuple(reads), views, dict(weights))


def _keeps_alignment(tensor: PlainTensor) -> bool:
    return len(tensor.extents) == 1 and tensor.extents[0].file_offset % tensor.dtype.itemsize == 0


def _runs(tensors: Sequence[PlainTensor]) -> Iterator[list[PlainTensor]]:
    """Cut tensors in file order into runs that one read takes: gaps between neighbours are less than a page."""
    run: list[PlainTensor] = []
    for tensor in tensors:
        if run:
            last, extent = run[-1].extents[0], tensor.extents[0]
            gap = extent.file_offset - last.file_offset - last.num_bytes
            if extent.path != last.path or not 0 <= gap < PAGE_BYTES:
                yield run
                run = []
        run.append(tensor)
    if run:
        yield run


def _best_residue(tensor: PlainTensor) -> int:
    """The start within a page that lets most bytes of the extents go straight into place."""
    weights: Counter[int] = Counter({0: 0})
    for extent in tensor.extents:
        residue = (extent.file_offset - extent.target_offset) % PAGE_BYTES
        if residue % tensor.dtype.itemsize == 0:
            weights[residue] += extent.num_bytes
    return weights.most_common(1)[0][0]


def bind_views(slot: Tensor, layout: BlockLayout) -> dict[str, Tensor]:
    """The tensors of a layout as views of `slot`, a contiguous uint8 tensor [bytes] at a page boundary. No copy."""
    if slot.dtype != torch.uint8 or slot.dim() != 1 or slot.numel() < layout.num_bytes:
        raise ValueError(
            f"slot is {slot.dtype} {list(slot.shape)}, expected torch.uint8 of at least [{layout.num_bytes}]"
        )
    return view_slot(slot, layout.views)


def view_slot(slot: Tensor, views: Mapping[str, View]) -> dict[str, Tensor]:
    tensors = {}
    for name, (start, dtype, shape) in views.items():
        tensors[name] = slot[start : start + dense_bytes(shape, dtype)].view(dtype).view(shape)
    return tensors


class Copy(NamedTuple):
    """`num_bytes` bytes of a slot, and where they go in the aligned one."""

    slot_offset: int  # where they are
    aligned_offset: int  # where they go
    num_bytes: int


def align_views(layout: BlockLayout) -> tuple[dict[str, View], tuple[Copy, ...]]:
    """The views of `layout` with every tensor at a multiple of `ALIGNMENT`, and the copies that fill such a slot.

    Files put tensors at any multiple of 8 bytes. Neighbours that one shift aligns are one copy, in most files all of a block.
    """
    spans = sorted({(view.slot_offset, view.num_bytes) for view in layout.views.values()})
    copies: list[Copy] = []
    moved = {}
    for start, num_bytes in spans:
        if not num_bytes:
            moved[start] = 0
            continue
        if copies:
            last = copies[-1]
            shift, gap = last.aligned_offset - last.slot_offset, start - last.slot_offset - last.num_bytes
            if (start + shift) % ALIGNMENT == 0 and gap < PAGE_BYTES:
                copies[-1] = last._replace(num_bytes=max(last.num_bytes, start + num_bytes - last.slot_offset))
                moved[start] = start + shift
                continue
        end = copies[-1].aligned_offset + copies[-1].num_bytes if copies else 0
        moved[start] = round_up(end, ALIGNMENT)
        copies.append(Copy(start, moved[start], num_bytes))
    return {name: view._replace(slot_offset=moved[view.slot_offset]) for name, view in layout.views.items()}, tuple(copies)


def aligned_bytes(layout: BlockLayout) -> int:
    """What an aligned slot needs for `layout`, in whole pages."""
    copies = align_views(layout)[1]
    return round_up(copies[-1].aligned_offset + copies[-1].num_bytes) if copies else 0


def row_ranges(row_ids: Iterable[int] | Tensor, num_rows: int) -> list[tuple[int, int]]:
    """[start, stop) of rows of a matrix with `num_rows` rows, such as the embeddings of a batch's tokens: ascending, each row
    once, neighbours together. `row_ids` may be in any order and repeat; the ranges hold what `torch.unique` makes of them.

    Raises IndexError for a row that the matrix doesn't have.
    """
    unique = sorted(set(row_ids.flatten().tolist() if isinstance(row_ids, Tensor) else map(int, row_ids)))
    if unique and not 0 <= unique[0] <= unique[-1] < num_rows:
        row = unique[0] if unique[0] < 0 else unique[-1]
        raise IndexError(f"row {row} of a matrix with {num_rows} rows")
    ranges = []
    # Consecutive ids have one difference from their rank.
    for _, group in groupby(enumerate(unique), key=lambda ranked: ranked[1] - ranked[0]):
        ids = [row for _, row in group]
        ranges.append((ids[0], ids[-1] + 1))
    return ranges
