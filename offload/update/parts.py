"""Which of a model's own weights are trained, as units of update.

The input embedding is a unit of its own per run of rows, unless it is tied to the head, whose chunks are its home then.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.memory.errors import UserError
from finetune.offload.files.sealed import json_digest
from finetune.offload.step.head import HEAD_CHUNK_BYTES
from finetune.offload.update.expert_units import TrainedStack
from finetune.offload.update.units import UpdateUnit, make_unit
from finetune.offload.weights.formats import Extent, PlainTensor, StoredWeight
from finetune.offload.weights.layout import layout_block
from finetune.offload.weights.parameter_map import ParameterMap
from finetune.offload.weights.parts import HeadPart, ModelParts

EXPERTS_APART = "experts_apart"
"""Key of what a store says of itself: whether experts are units of their own."""


@dataclass(frozen=True, slots=True)
class RowUnit:
    """Rows [start, stop) of a matrix."""

    unit: UpdateUnit  # what is updated together
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TrainedParts:
    """blocks, head: in the order of `ModelParts`. table: the input embedding's own units. tied: head and embedding are one.
    stacks: of experts that are fetched one by one, which the blocks are without then.

    fqns: of everything that is trained, in the model's order.
    """

    blocks: tuple[UpdateUnit, ...]
    stacks: tuple[TrainedStack, ...]
    head: tuple[RowUnit, ...]
    table: tuple[RowUnit, ...]
    edges: UpdateUnit | None  # of what stands outside of blocks, head and table; None: nothing of it is trained
    tied: bool
    fqns: tuple[str, ...]

    @property
    def ends(self) -> tuple[UpdateUnit, ...]:
        """What is in no block."""
        rows = tuple(part.unit for part in (*self.head, *self.table))
        return (*rows, *([self.edges] if self.edges else []))

    @property
    def units(self) -> Iterator[UpdateUnit]:
        return chain(self.blocks, *(stack.units for stack in self.stacks), self.ends)

    def of_block(self, index: int) -> tuple[TrainedStack, ...]:
        """Its stacks."""
        return tuple(stack for stack in self.stacks if stack.block == index)

    def trains(self, index: int) -> bool:
        """Whether anything of a block is trained."""
        return bool(self.blocks[index].fqns or self.of_block(index))

    @property
    def homes(self) -> dict[str, str]:
        """Name of a stack -> name of the unit that its experts are trained with: of their block."""
        return {stack.matrices.stack.name: self.blocks[stack.block].name for stack in self.stacks}

    @property
    def layout_digest(self) -> str:
        """Of where each trained weight lies in its unit's image. The image follows the model's files: a copy with its tensors
        in other files, or in another order there, has another."""
        return json_digest(
            {
                unit.name: [
                    [fqn, view.slot_offset, list(view.shape), str(view.dtype)]
                    for local, fqn in sorted(unit.fqns.items())
                    for view in [unit.layout.views[local]]
                ]
                for unit in self.units
            }
        )

    def check_layout(self, store: Path, about: Mapping[str, Any]) -> None:
        """Raises UserError unless the pieces of `store`, of which `about` was kept, are of these images. Stores of before this
        was kept say nothing of it."""
        if about.get("layout", self.layout_digest) != self.layout_digest:
            raise UserError(
                f"{store} holds weights in the places of the files that the run began with; in these files the same tensors "
                "lie otherwise (other shards, or another order): name the files that the run began with"
            )


def find_trained(parts: ModelParts, patterns: Sequence[str] = ()) -> TrainedParts:
    """patterns: regular expressions, searched in fully qualified names; none: everything is trained.

    Units have only parameters that match; a unit without any stays, empty. Raises UserError for a pattern that is none or
    matches nothing, and as `check_storage`.
    """
    matching = _matching(parts, patterns)
    check_storage(parts.sources, matching)
    wanted = _Wanted(parts, matching)
    _refuse_shared(parts, wanted.fqns)
    blocks = tuple(
        make_unit(prefix, layout, wanted.among(layout.weights, f"{prefix}."))
        for prefix, layout in zip(parts.prefixes, parts.layouts, strict=True)
    )
    head_source = None if parts.head is None else parts.sources.get(f"{parts.head.name}.weight")
    tables = [(name, source) for name, _, source in parts.embeddings if source != head_source]
    edge_sources = {edge.name: edge.source for edge in parts.edges if edge.name in parts.parameters}
    edges = make_unit("edges", layout_block(edge_sources), wanted.among(edge_sources)) if edge_sources else None
    names = (name for name, _ in parts.model.named_parameters())
    stacks = {matrices: wanted.among([matrices.stack.name]) for matrices in parts.experts}
    return TrainedParts(
        blocks,
        tuple(TrainedStack(matrices, *fqns.values()) for matrices, fqns in stacks.items() if fqns),
        () if parts.head is None else tuple(_cut_head(parts.head, wanted)),
        tuple(unit for name, source in tables for unit in _cut_table(name, source, wanted)),
        edges,
        len(tables) < len(parts.embeddings),
        tuple(dict.fromkeys(wanted.among(names).values())),
    )


class _Wanted:
    """What is trained: one name for everything that has the same bytes."""

    def __init__(self, parts: ModelParts, names: Iterable[str]) -> None:
        """names: of what the user wants."""
        self._sources = parts.sources
        homes = [parts.sources.tied.get(name, name) for name in names]
        self._name_of = {parts.sources[name]: name for name in sorted(homes, reverse=True)}
        self.fqns = set(self._name_of.values())

    def among(self, names: Iterable[str], prefix: str = "") -> dict[str, str]:
        """Those of `names`, each below `prefix`, that are trained, with the fully qualified name that they are trained as."""
        found = {name: self._name_of.get(self._sources.get(f"{prefix}{name}")) for name in names}
        return {name: fqn for name, fqn in found.items() if fqn is not None}


def _cut_head(head: HeadPart, wanted: _Wanted) -> Iterator[RowUnit]:
    rows = head.module.weight.shape[0]
    fqns = wanted.among(head.layouts[0].weights, f"{head.name}.")
    for index, (start, layout) in enumerate(zip(head.starts, head.layouts, strict=True)):
        yield RowUnit(make_unit(f"{head.name}#{index}", layout, fqns), start, min(start + head.tile_vocab, rows))


def _cut_table(name: str, source: StoredWeight, wanted: _Wanted) -> Iterator[RowUnit]:
    """An embedding table in runs of rows."""
    rows = source.shape[0]
    step = max(1, HEAD_CHUNK_BYTES // (source.num_bytes // rows))
    fqns = wanted.among(["weight"], f"{name}.")
    for index, start in enumerate(range(0, rows, step)):
        stop = min(start + step, rows)
        layout = layout_block({"weight": source.rows([(start, stop)])})
        yield RowUnit(make_unit(f"{name}#{index}", layout, fqns), start, stop)


def check_storage(
    sources: ParameterMap, names: Collection[str], instead: str = "train an adapter (--method lora)"
) -> None:
    """Raises UserError unless these parameters can be written as they are stored: in a dtype that the kernels move, and what
    is stored twice in one dtype. instead: what the message advises."""
    for name in sorted(names):
        source = sources[name]
        if not source.can_be_updated:
            raise UserError(
                f"{name} is stored as {source.word}, expected bfloat16, float16 or float32: save the model in one of "
                f"these, or {instead}"
            )
        again = next((copy for home, copy in sources.copies if home == source and copy.dtype != home.dtype), None)
        if again is not None:
            raise UserError(
                f"{name} is stored twice, as {source.word} and as {again.word}, and both would have to change: "
                "save the model again in one dtype, or train an adapter (--method lora)"
            )


def _refuse_shared(parts: ModelParts, wanted: set[str]) -> None:
    """Only embedding and head may be one weight: others that a model uses at several places would get several updates."""
    tables = {f"{name}.weight" for name, _, _ in parts.embeddings} | ({f"{parts.head.name}.weight"} if parts.head else set())
    places: dict[StoredWeight, set[str]] = {}
    for name in parts.parameters:
        places.setdefault(parts.sources[name], set()).add(name)
    for name in sorted(wanted):
        same = places[parts.sources[name]]
        if len(same) > 1 and not same <= tables:
            raise UserError(
                f"the model uses one weight at several places ({', '.join(sorted(same))}): it can't be trained out of core. "
                "Leave it out with train, or train an adapter (--method lora)"
            )


def _matching(parts: ModelParts, patterns: Sequence[str]) -> list[str]:
    if not patterns:
        return sorted(parts.parameters)
    found: set[str] = set()
    for pattern in patterns:
        try:
            names = {name for name in parts.parameters if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"train: {pattern!r} is not a regular expression: {error}") from None
        if not names:
            some = ", ".join(sorted(parts.parameters)[:3])
            raise UserError(f"train: {pattern!r} matches no parameter of the model, whose names look like {some}")
        found |= names
    return sorted(found)


def rows_source(parts: Sequence[RowUnit], reads_of, source: StoredWeight) -> StoredWeight:
    """`source`, a matrix, with its rows where `reads_of(unit)` says that the units' images are now."""
    if not any("weight" in part.unit.fqns for part in parts):
        return source  # it is not trained, and stays where it is
    row_bytes = source.num_bytes // source.shape[0]
    pieces = []
    for part in parts:
        view = part.unit.layout.views["weight"]
        low, high = view.slot_offset, view.end
        for read in reads_of(part.unit):
            start, stop = max(low, read.slot_offset), min(high, read.slot_offset + read.num_bytes)
            if start < stop:
                skip = start - read.slot_offset
                target = part.start * row_bytes + start - low
                pieces.append(Extent(read.path, read.file_offset + skip, stop - start, target))
    return PlainTensor(source.dtype, source.shape, tuple(sorted(pieces, key=lambda extent: extent.target_offset)))
