"""What the new checkpoint holds, from the headers of the old one: which tensors, in which files, and where parameters are in
them.

[Note: rewritten checkpoints]
A plain tensor keeps its name, dtype and shape, also where a parameter is put together from several of them. A packed weight
becomes one plain tensor under the name that it would have if it were plain, also an expert's that lies in the files by itself;
or, where weights are to be packed again, it stays as it is stored unless its values change. What is known before any number is
read is everything but the length of the states that bitsandbytes keeps of packed weights.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.files.safetensors_files import cut_files
from finetune.offload.quantize.kernels import BLOCK, NESTED_BLOCK
from finetune.offload.quantize.outline import NewFile, NewTensor, Packing, stored_tensors
from finetune.offload.weights.formats import (
    Extent,
    FoundWeight,
    PlainTensor,
    StoredWeight,
    find_weights,
    quantization_of,
)
from finetune.offload.weights.formats.bitsandbytes import Packed4Bit, Packed8Bit
from finetune.offload.weights.formats.plain import DTYPE_NAMES, TORCH_DTYPES, dense_bytes
from finetune.offload.weights.formats.stacked import JoinedRows, StackedWeights
from finetune.offload.weights.parts import ModelParts

_WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Place(NamedTuple):
    """Bytes of a parameter, and the tensor of the new checkpoint that has them."""

    tensor: str  # its name
    offset: int  # in the tensor
    num_bytes: int
    skip: int
    """Where they begin in the parameter."""


class PackedMatrix(NamedTuple):
    """A matrix that is packed again."""

    entry: TensorEntry
    """The tensor that it would be if it were plain."""
    first: int
    """Its first element in the parameter."""


class _Leaf(NamedTuple):
    """A weight of the checkpoint that is a parameter, or a part of one."""

    parameter: str
    weight: StoredWeight
    first: int  # of its elements in the parameter


@dataclass(frozen=True)
class Contents:
    """A new checkpoint."""

    files: tuple[NewFile, ...]
    copied: tuple[TensorEntry, ...]
    """What is written as it is stored, under the same name, in the order in which it is read."""
    decoded: Mapping[str, StoredWeight]
    """Name of a plain tensor -> the weight that it is to hold."""
    places: Mapping[str, tuple[Place, ...]]
    """Parameter that changes -> where its new values go, less those that are packed."""
    packed: Mapping[str, tuple[PackedMatrix, ...]]
    """Parameter that changes -> its matrices that are packed again."""

    @property
    def num_bytes(self) -> int:
        """At most."""
        return sum(file.num_bytes for file in self.files)


def written_dtype(parts: ModelParts, weight: StoredWeight) -> torch.dtype:
    """What a weight's numbers are written in where it is plain in the new checkpoint: a plain one keeps its dtype, a packed one
    gets that of most others. Raises CheckpointError for plain numbers of 8 bits, which new values do not fit."""
    if not isinstance(weight, PlainTensor):
        return parts.dtype
    if weight.dtype not in _WIDE:
        raise CheckpointError(
            f"{parts.directory}: a weight that is to change is stored as {weight.word} without scales, expected 16 bits or "
            "more: use the original weights"
        )
    return weight.dtype


def contents(parts: ModelParts, changed: Collection[str], apart: Collection[str], pack: bool) -> Contents:
    """Of `parts`, whose parameters `changed` (fully qualified names) get new values.

    apart: parameters that are tied and shall not be: each gets a tensor of its own. pack: whether what is packed stays so.
    Raises CheckpointError for a weight that changes and can't be packed again.
    """
    return _Builder(parts, frozenset(changed), pack).build(apart)


def packing_of(name: str, weight: StoredWeight) -> Packing:
    """How a packed weight is packed again. Raises CheckpointError where that cannot be done."""
    if isinstance(weight, Packed8Bit):
        return Packing("int8")
    word = weight.word
    if isinstance(weight, Packed4Bit):
        state = weight.state
        nested = state.nested_offset is not None
        if state.quant_type == "nf4" and state.block_size == BLOCK and (not nested or state.nested_block_size == NESTED_BLOCK):
            return Packing("nf4", nested)
        word += f" ({state.quant_type}, blocks of {state.block_size}{f' and {state.nested_block_size}' if nested else ''})"
    raise CheckpointError(
        f"parameter '{name}' is stored as {word}, in which new values can't be packed: expected bitsandbytes' nf4 with blocks "
        f"of {BLOCK}, or its int8; the model can be written plain, with --merge plain"
    )


class _Builder:
    def __init__(self, parts: ModelParts, changed: frozenset[str], pack: bool) -> None:
        self._parts, self._sources = parts, parts.sources
        self._changed, self._pack = changed, pack
        self._found = find_weights(parts.checkpoint.tensors, quantization_of(parts.model.config))
        self._entries: list[TensorEntry] = []  # of the new checkpoint, as if all were plain
        self._stored: dict[str, tuple[NewTensor, ...]] = {}  # of those that are packed
        self._copied: list[TensorEntry] = []
        self._decoded: dict[str, StoredWeight] = {}
        self._places: dict[str, list[Place]] = {name: [] for name in sorted(changed)}
        self._packed: dict[str, list[PackedMatrix]] = {}

    def build(self, apart: Collection[str]) -> Contents:
        sources = self._sources
        leaves, cut = self._find_leaves()
        is_packed = any(form is not PlainTensor for form, _ in self._found.values())
        left_out = frozenset(sources.unused) if is_packed and not self._pack else frozenset()
        for key, weight in sorted(self._found.items(), key=lambda item: _first(item[1])):
            if key not in left_out:
                self._take(key, weight, leaves.get(key))
        for name in cut:
            self._take_whole(name)
        extents = _Extents(self._copied)
        for name in self._places:
            if name in apart:
                self._places[name] = [self._own_place(name)]
                continue
            again = (copy for home, copy in sources.copies if home == sources[name] and not apart)
            for weight in (sources[name], *again):
                for leaf, first in _leaves(weight):
                    if isinstance(leaf, PlainTensor):
                        self._places[name] += self._where(name, leaf, first, extents)
        for name in apart:
            if name not in self._changed and name not in sources.direct:
                self._decoded[name] = sources[name]
                self._add(name, sources[name])
        return self._finish()

    def _find_leaves(self) -> tuple[dict[str, _Leaf], list[str]]:
        """Packed weights of the checkpoint, by name; and parameters that are put together from parts of such."""
        keys = {entry.name: key for key, weight in self._found.items() for entry in weight.parts.values()}
        extents = _Extents(self._parts.checkpoint.tensors.values())
        leaves: dict[str, _Leaf] = {}
        cut: list[str] = []
        for name, weight in self._sources.items():
            if name in self._sources.tied:
                continue
            found: dict[str, _Leaf] = {}
            for leaf, first in _leaves(weight):
                if not isinstance(leaf, PlainTensor):
                    key = keys[extents.find(next(iter(leaf.tensors.values())).extents[0]).name]
                    form, parts = self._found[key]
                    in_files = not self._parts.checkpoint.is_gguf and form.matrix_shape(parts) == leaf.shape
                    is_whole = name in self._sources.direct or in_files
                    found[key if is_whole else ""] = _Leaf(name, leaf, first)
            if "" in found:
                cut.append(name)
            else:
                leaves |= found
        return leaves, cut

    def _take(self, key: str, weight: FoundWeight, leaf: _Leaf | None) -> None:
        """A weight of the checkpoint. leaf: what it is; None: plain, or nobody's as a whole."""
        if weight.form is PlainTensor or self._pack and (leaf is None or leaf.parameter not in self._changed):
            self._copy(weight.parts.values())
            return
        if leaf is None:
            return
        name = leaf.parameter if self._parts.checkpoint.is_gguf else key
        packing = packing_of(leaf.parameter, leaf.weight) if self._pack else None
        entry = self._add(name, leaf.weight)
        if leaf.parameter not in self._changed:
            self._decoded[name] = leaf.weight
        elif packing is None:
            skip = leaf.first * TORCH_DTYPES[entry.dtype].itemsize
            self._places[leaf.parameter].append(Place(name, 0, entry.num_bytes, skip))
        else:
            self._stored[name] = stored_tensors(entry, packing.kind, packing.nested)
            self._packed.setdefault(leaf.parameter, []).append(PackedMatrix(entry, leaf.first))

    def _take_whole(self, name: str) -> None:
        """A parameter of parts of packed weights, under its own name."""
        weight = self._sources[name]
        if self._pack and name in self._changed:
            raise CheckpointError(
                f"parameter '{name}' is put together from parts of packed weights, in which new values can't be packed: the "
                "model can be written plain, with --merge plain"
            )
        if not self._pack:
            entry = self._add(name, weight)
            if name in self._changed:
                self._places[name].append(Place(name, 0, entry.num_bytes, 0))
            else:
                self._decoded[name] = weight

    def _copy(self, entries: Iterable[TensorEntry]) -> None:
        ordered = sorted(entries, key=lambda entry: entry.offset)
        self._entries += ordered
        self._copied += ordered

    def _add(self, name: str, weight: StoredWeight) -> TensorEntry:
        dtype = written_dtype(self._parts, weight)
        num_bytes = dense_bytes(weight.shape, dtype)
        entry = TensorEntry(name, DTYPE_NAMES[dtype], tuple(weight.shape), self._parts.directory, 0, num_bytes)
        self._entries.append(entry)
        return entry

    def _own_place(self, name: str) -> Place:
        """Of an end of a tie that shall have a tensor of its own."""
        own = self._sources.direct.get(name)
        entry = self._add(name, self._sources[name]) if own is None else self._parts.checkpoint.tensors[own]
        self._check_dtype(name, entry)
        return Place(entry.name, 0, entry.num_bytes, 0)

    def _where(self, name: str, weight: PlainTensor, first: int, extents: _Extents) -> Iterator[Place]:
        """first: the weight's first element in the parameter."""
        skip = first * weight.dtype.itemsize
        for extent in weight.extents:
            entry = extents.find(extent)
            self._check_dtype(name, entry)
            yield Place(entry.name, extent.file_offset - entry.offset, extent.num_bytes, skip + extent.target_offset)

    def _check_dtype(self, name: str, entry: TensorEntry) -> None:
        expected = DTYPE_NAMES[written_dtype(self._parts, self._sources[name])]
        if entry.dtype != expected:
            raise CheckpointError(
                f"{entry.path}: parameter '{name}' is stored in {expected} and once more in {entry.dtype}: save it in one"
            )

    def _finish(self) -> Contents:
        entries = {entry.name: entry for entry in self._entries}
        stored = self._stored
        sizes = {
            name: sum(tensor.num_bytes for tensor in stored[name]) if name in stored else entry.num_bytes
            for name, entry in entries.items()
        }
        files = tuple(
            NewFile(file, tuple(entries[name] for name in names), {name: stored[name] for name in names if name in stored})
            for file, names in cut_files(sizes).items()
        )
        covered: dict[str, int] = {}
        for place in (place for places in self._places.values() for place in places):
            covered[place.tensor] = covered.get(place.tensor, 0) + place.num_bytes
        copied = tuple(entry for entry in self._copied if covered.get(entry.name) != entry.num_bytes)
        places = {name: tuple(places) for name, places in self._places.items()}
        packed = {name: tuple(matrices) for name, matrices in self._packed.items()}
        return Contents(files, copied, self._decoded, places, packed)


class _Extents:
    """Tensors by where they are."""

    def __init__(self, entries: Iterable[TensorEntry]) -> None:
        self._by_file: dict[Path, list[TensorEntry]] = {}
        for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
            self._by_file.setdefault(entry.path, []).append(entry)

    def find(self, extent: Extent) -> TensorEntry:
        """The one that these bytes are of."""
        entries = self._by_file[extent.path]
        return entries[bisect_right(entries, extent.file_offset, key=lambda entry: entry.offset) - 1]


def _leaves(weight: StoredWeight, first: int = 0) -> Iterator[tuple[StoredWeight, int]]:
    """What a weight is put together from, and the first element of each."""
    if not isinstance(weight, StackedWeights | JoinedRows):
        yield weight, first
        return
    for part in weight.parts:
        yield from _leaves(part, first)
        first += prod(part.shape)


def _first(weight: FoundWeight) -> tuple[Path, int]:
    """Where a weight begins."""
    return min((entry.path, entry.offset) for entry in weight.parts.values())
