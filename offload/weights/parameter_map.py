"""From a model's parameters to bytes of its checkpoint, and from a block's parameters to the reads that fill a slot.

Nothing is converted and nothing is copied on disk: a parameter is a list of extents of the user's own safetensors files
(`map_parameters`), a block is a list of reads into a slot and of views of that slot (`layout_block`, `bind_views`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from offload.weights.checkpoint import DTYPE_BITS, Checkpoint, CheckpointError, TensorEntry
from offload.weights.conversion import Extent, PlacementTensor, extents_of, run_converter

PAGE_BYTES = 4096
ALIGNMENT = 16
"""Bytes, of every tensor on an accelerator: its fastest products want that of their operands."""

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip

_COMPARED_ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor's bytes are: extents in the order of its row-major bytes, covering them without holes or overlap.

    `dtype` is the checkpoint's (the module's may differ: casting is the caller's work), `shape` the module's.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Extent, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class ParameterMap(dict[str, Source]):
    """Every parameter and persistent buffer of a model by fully qualified name; tied ones share one Source.

    tied: name -> the name whose bytes it uses, for every tie that holds in this checkpoint (see `map_parameters`).
    copies: (home, copy) of every tied weight that the checkpoint holds once more; what changes the one must change the other.
    apart: (target, source) of ties that the configuration asks for and that don't hold, for both are there and unlike.
    absent: names that Transformers lets a checkpoint leave out and that this one does; they have no Source, the model's
        own initialisation gives their values.
    unused: checkpoint tensors that no parameter takes, less those Transformers knows to ignore. Worth a warning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tied: dict[str, str] = {}
        self.copies: tuple[tuple[Source, Source], ...] = ()
        self.apart: tuple[tuple[str, str], ...] = ()
        self.absent: tuple[str, ...] = ()
        self.unused: tuple[str, ...] = ()


def map_parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> ParameterMap:
    """Say for each parameter and persistent buffer of `model` (on any device, meta too) where its bytes come from.

    Names, conversions and ties follow `convert_and_load_state_dict_in_model` and `PreTrainedModel.tie_weights`. Where a
    checkpoint holds both ends of a tie they are compared, as Transformers does: equal values make one home, unlike ones
    stay two parameters that are not in `tied`, whatever the configuration says.

    Raises CheckpointError for quantised weights, missing parameters, shapes or dtypes that don't fit, and conversions
    that aren't placements.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{checkpoint.directory}: the weights are quantised (quantization_config in config.json), which can't be "
            "fine-tuned here yet: use the original weights"
        )
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    direct, converters, unexpected = _assign(model, checkpoint, tensors)
    placed = {name: [PlacementTensor.of(entry)] for name, entry in direct.items()}
    for name, converter in converters.items():
        for target, placement in run_converter(converter, name, model).items():
            if target in tensors:
                placed.setdefault(target, []).append(placement)
    result = ParameterMap()
    for name, (placement, *_) in placed.items():
        result[name] = _source(name, placement, tuple(tensors[name].shape), checkpoint)
    _tie(model, tensors, result)
    _check_complete(model, checkpoint, tensors, result, unexpected)
    _check_not_quantised(checkpoint, tensors, result)
    return result


def _assign(
    model: PreTrainedModel, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, TensorEntry], dict[str, WeightConverter], dict[str, str]]:
    """Give each checkpoint tensor to a parameter, a converter (by its first target), or nobody (new -> old name)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    direct: dict[str, TensorEntry] = {}
    collected: dict[str, WeightConverter] = {}
    unexpected: dict[str, str] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        entry, prefix = checkpoint.tensors[key], model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in tensors and key in tensors:
            name, pattern = rename_source_key(key, [], [], prefix, tensors)
        if name not in tensors:
            unexpected[name] = key
        elif pattern is not None:
            if name not in collected:
                collected[name] = deepcopy(by_pattern[pattern])
            collected[name].add_tensor(name, key, pattern, PlacementTensor.of(entry))
        elif name in direct:
            unexpected[key] = key
        else:
            direct[name] = entry
    return direct, collected, unexpected


def _source(name: str, placement: PlacementTensor, shape: tuple[int, ...], checkpoint: Checkpoint) -> Source:
    dtypes = sorted({box.entry.dtype for box in placement.boxes})
    if tuple(placement.shape) != shape:
        raise CheckpointError(
            f"{checkpoint.directory}: parameter '{name}' has shape {list(placement.shape)} in the checkpoint, the "
            f"model expects {list(shape)}: config.json and the weights are not of one model"
        )
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{checkpoint.directory}: parameter '{name}' is put together from tensors of unlike dtypes "
            f"({', '.join(dtypes)}), expected one: save the model in one dtype"
        )
    if dtypes and dtypes[0] not in TORCH_DTYPES:
        raise CheckpointError(
            f"{checkpoint.directory}: parameter '{name}' has dtype {dtypes[0]} ({DTYPE_BITS[dtypes[0]]} bits), which "
            "can't be fine-tuned: use the original weights"
        )
    dtype = TORCH_DTYPES[dtypes[0]] if dtypes else torch.uint8
    return Source(dtype, shape, extents_of(name, placement))


def _tie(model: PreTrainedModel, tensors: Mapping[str, Tensor], sources: ParameterMap) -> None:
    """Resolve tied names, as `PreTrainedModel.tie_weights` does for a loaded checkpoint."""
    ties = list(model.all_tied_weights_keys.items())
    for target, source in ties:
        if source not in sources and target not in sources:
            others = (other for other, its_source in ties if its_source == source and other in sources)
            source = next(others, source)
        if target in sources and source in sources:
            if not _same_values(sources[target], sources[source]):
                sources.apart += ((target, source),)
                continue
            if sources[target] != sources[source]:
                sources.copies += ((sources[source], sources[target]),)
            _alias(sources, target, source)
        elif source in sources:
            _alias(sources, target, source)
        elif target in sources:
            _alias(sources, source, target)
    # Modules shared by the model's own code: one tensor under several names.
    homes = {id(tensors[name]): name for name in reversed(sources)}
    for name, tensor in tensors.items():
        if name not in sources and id(tensor) in homes:
            _alias(sources, name, homes[id(tensor)])


def _alias(sources: ParameterMap, name: str, home: str) -> None:
    sources[name] = sources[home]
    sources.tied[name] = sources.tied.get(home, home)


def _check_complete(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    sources: ParameterMap,
    unexpected: Mapping[str, str],
) -> None:
    missing = tensors.keys() - sources.keys()
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    # Transformers' own lists of what may be missing or left over.
    model._adjust_missing_and_unexpected_keys(info)
    sources.unused = tuple(sorted(unexpected[name] for name in info.unexpected_keys))
    sources.absent = tuple(sorted(missing - info.missing_keys))
    if info.missing_keys:
        names = sorted(info.missing_keys)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise CheckpointError(
            f"{checkpoint.directory}: {len(names)} parameter(s) of {type(model).__name__} are not in the checkpoint "
            f"({checkpoint.found}): {', '.join(names[:8])}{more}. {_why_missing(model, checkpoint, names)}"
        )


def _check_not_quantised(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], sources: ParameterMap) -> None:
    """Quantised weights whose config.json doesn't say so: integers, or 8 bits with a scale that no parameter takes."""
    scales = [name for name in sources.unused if "scale" in name.rpartition(".")[2]]
    for name, source in sources.items():
        is_scaled = source.dtype.itemsize == 1 and bool(scales)
        if tensors[name].is_floating_point() and (not source.dtype.is_floating_point or is_scaled):
            scaled = f" with scales beside it ({scales[0]})" if is_scaled else ""
            raise CheckpointError(
                f"{checkpoint.directory}: parameter '{name}' is stored as {str(source.dtype).removeprefix('torch.')}{scaled}, "
                "expected a floating-point number of its own: the weights are quantised, use the original ones"
            )


def _why_missing(model: PreTrainedModel, checkpoint: Checkpoint, names: Sequence[str]) -> str:
    if checkpoint.lost:
        tensor, file = next(iter(checkpoint.lost.items()))
        return f"'{tensor}' should be in {file}, which doesn't hold it: download the model again"
    ties = model._tied_weights_keys
    if isinstance(ties, Mapping) and set(names) <= set(ties):
        return (
            f"If it is one with {ties[names[0]]}, set tie_word_embeddings to true in config.json; else the model was saved "
            "without its head"
        )
    return "Is it another model's, or one without this head?"


def _same_values(first: Source, second: Source) -> bool:
    """Whether two tensors hold the same numbers, in whatever dtypes."""
    if first.shape != second.shape:
        return False
    if first == second:
        return True
    same_dtype, count = first.dtype == second.dtype, prod(first.shape)
    for start in range(0, count, _COMPARED_ELEMENTS):
        a, b = (_read(source, start, min(start + _COMPARED_ELEMENTS, count)) for source in (first, second))
        if not (a == b if same_dtype else _numbers(a, first.dtype).equal(_numbers(b, second.dtype))):
            return False
    return True


def _numbers(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).double()


def _read(source: Source, start: int, stop: int) -> bytes:
    """Elements [start, stop)."""
    itemsize, parts = source.dtype.itemsize, []
    for extent in _cut(source, start * itemsize, stop * itemsize):
        with open(extent.path, "rb") as file:
            parts.append(os.pread(file.fileno(), extent.num_bytes, extent.file_offset))
    return b"".join(parts)


def copies_of(copies: Iterable[tuple[Source, Source]], path: Path, offset: int, num_bytes: int) -> list[Extent]:
    """Where else bytes [offset, offset + num_bytes) of a file are kept, by `ParameterMap.copies`; target offsets count from
    `offset`."""
    found = []
    for home, copy in copies:
        for piece in home.pieces:
            low, high = max(offset, piece.file_offset), min(offset + num_bytes, piece.file_offset + piece.num_bytes)
            if piece.path == path and low < high:
                shift = piece.target_offset - piece.file_offset
                extents = _cut(copy, low + shift, high + shift)
                found += [e._replace(target_offset=e.target_offset - shift - offset) for e in extents]
    return found


def _cut(source: Source, start: int, stop: int) -> Iterator[Extent]:
    """The extents of a source's bytes [start, stop), at their target offsets in the whole tensor."""
    for piece in source.pieces:
        low, high = max(start, piece.target_offset), min(stop, piece.target_offset + piece.num_bytes)
        if low < high:
            yield Extent(piece.path, piece.file_offset + low - piece.target_offset, high - low, low)


class Read(NamedTuple):
    """`num_bytes` bytes at `file_offset` of `path` go to byte `slot_offset` of the slot."""

    path: Path
    file_offset: int
    num_bytes: int
    slot_offset: int


class View(NamedTuple):
    """A contiguous tensor at byte `slot_offset` of the slot."""

    slot_offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How a group of tensors lies in a slot of `num_bytes` bytes (whole pages), and the reads that bring it there.

    Reads share no page of the slot, except those of a tensor that is put together from several extents. Where a tensor
    can be put anywhere, `slot_offset` equals `file_offset` modulo the page, so that in a slot aligned to pages direct
    I/O needs no copy. Tensors are aligned to their element size.
    """

    num_bytes: int
    reads: tuple[Read, ...]
    views: dict[str, View]

    @property
    def read_bytes(self) -> int:
        """Bytes that one fetch reads; with the small gaps between tensors that share a read."""
        return sum(read.num_bytes for read in self.reads)


def layout_block(sources: Mapping[str, Source]) -> BlockLayout:
    """Lay out `sources` (by local name) in one slot. Names with the same Source share their bytes."""
    homes: dict[Source, int] = {}
    reads: list[Read] = []
    end = 0
    unique = list(dict.fromkeys(source for source in sources.values() if source.pieces))
    whole = sorted((source for source in unique if _keeps_alignment(source)), key=lambda source: source.pieces[0][:2])
    for run in _runs(whole):
        first, last = run[0].pieces[0], run[-1].pieces[0]
        start = _round_up(end) + first.file_offset % PAGE_BYTES
        num_bytes = last.file_offset + last.num_bytes - first.file_offset
        reads.append(Read(first.path, first.file_offset, num_bytes, start))
        homes |= {source: start + source.pieces[0].file_offset - first.file_offset for source in run}
        end = start + num_bytes
    for source in unique:
        if source not in homes:
            start = homes[source] = _round_up(end) + _best_residue(source)
            reads += [Read(p.path, p.file_offset, p.num_bytes, start + p.target_offset) for p in source.pieces]
            end = start + source.num_bytes
    views = {name: View(homes.get(source, 0), source.dtype, source.shape) for name, source in sources.items()}
    return BlockLayout(_round_up(end), tuple(reads), views)


def _keeps_alignment(source: Source) -> bool:
    return len(source.pieces) == 1 and source.pieces[0].file_offset % source.dtype.itemsize == 0


def _runs(sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Cut sources in file order into runs that one read takes: gaps between neighbours are less than a page."""
    run: list[Source] = []
    for source in sources:
        if run:
            last, piece = run[-1].pieces[0], source.pieces[0]
            gap = piece.file_offset - last.file_offset - last.num_bytes
            if piece.path != last.path or not 0 <= gap < PAGE_BYTES:
                yield run
                run = []
        run.append(source)
    if run:
        yield run


def _best_residue(source: Source) -> int:
    """The start within a page that lets most bytes of the extents go straight into place."""
    weights: Counter[int] = Counter({0: 0})
    for piece in source.pieces:
        residue = (piece.file_offset - piece.target_offset) % PAGE_BYTES
        if residue % source.dtype.itemsize == 0:
            weights[residue] += piece.num_bytes
    return weights.most_common(1)[0][0]


def _round_up(num_bytes: int, multiple: int = PAGE_BYTES) -> int:
    return -(-num_bytes // multiple) * multiple


def bind_views(slot: Tensor, layout: BlockLayout) -> dict[str, Tensor]:
    """The tensors of a layout as views of `slot`, a contiguous uint8 tensor [bytes] at a page boundary. No copy."""
    if slot.dtype != torch.uint8 or slot.dim() != 1 or slot.numel() < layout.num_bytes:
        raise ValueError(
            f"slot is {slot.dtype} {list(slot.shape)}, expected torch.uint8 of at least [{layout.num_bytes}]"
        )
    return view_slot(slot, layout.views)


def view_slot(slot: Tensor, views: Mapping[str, View]) -> dict[str, Tensor]:
    tensors = {}
    for name, view in views.items():
        num_bytes = prod(view.shape) * view.dtype.itemsize
        tensors[name] = slot[view.slot_offset : view.slot_offset + num_bytes].view(view.dtype).view(view.shape)
    return tensors


class Copy(NamedTuple):
    """`num_bytes` bytes of a slot, and where they go in the aligned one."""

    slot_offset: int
    aligned_offset: int
    num_bytes: int


def align_views(layout: BlockLayout) -> tuple[dict[str, View], tuple[Copy, ...]]:
    """The views of `layout` with every tensor at a multiple of `ALIGNMENT`, and the copies that fill such a slot.

    Files put tensors at any multiple of 8 bytes. Neighbours that one shift aligns are one copy, in most files all of a block.
    """
    spans = sorted({(view.slot_offset, prod(view.shape) * view.dtype.itemsize) for view in layout.views.values()})
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
        moved[start] = _round_up(end, ALIGNMENT)
        copies.append(Copy(start, moved[start], num_bytes))
    return {name: view._replace(slot_offset=moved[view.slot_offset]) for name, view in layout.views.items()}, tuple(copies)


def aligned_bytes(layout: BlockLayout) -> int:
    """What an aligned slot needs for `layout`, in whole pages."""
    copies = align_views(layout)[1]
    return _round_up(copies[-1].aligned_offset + copies[-1].num_bytes) if copies else 0


def plan_rows(source: Source, row_ids: Iterable[int] | Tensor) -> list[Extent]:
    """Reads of single rows of a matrix [rows, columns], such as the embeddings of a batch's tokens.

    `row_ids` may be in any order and repeat: the target holds each row once, in ascending order of its id (as
    `torch.unique` returns them), without gaps. Rows that are neighbours in the file are one read.

    Raises IndexError for a row that the matrix doesn't have.
    """
    num_rows, row_bytes = source.shape[0], prod(source.shape[1:]) * source.dtype.itemsize
    unique = sorted(set(row_ids.flatten().tolist() if isinstance(row_ids, Tensor) else map(int, row_ids)))
    if unique and not 0 <= unique[0] <= unique[-1] < num_rows:
        row = unique[0] if unique[0] < 0 else unique[-1]
        raise IndexError(f"row {row} of a matrix with {num_rows} rows")
    reads: list[Extent] = []
    # Consecutive ids have one difference from their rank.
    for _, group in groupby(enumerate(unique), key=lambda ranked: ranked[1] - ranked[0]):
        ranked = list(group)
        (rank, first), (_, last) = ranked[0], ranked[-1]
        shift = (rank - first) * row_bytes
        extents = _cut(source, first * row_bytes, (last + 1) * row_bytes)
        reads += [extent._replace(target_offset=extent.target_offset + shift) for extent in extents]
    return reads
