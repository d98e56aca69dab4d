"""Transformers' weight conversions as byte placements.

Transformers 5 renames, splits, merges and stacks checkpoint tensors while it loads them (`core_model_loading.py`). Here
its own operations run on PlacementTensors, which hold no data, only which source element each of their elements is, as
a few boxes. What comes out says from which bytes of the files a parameter is put together. Shapes are real all the way,
so an operation may look at them. Operations that compute rather than move (arithmetic, casts) are refused.

Source: `transformers/core_model_loading.py`, class ConversionOps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from finetune.offload.files.checkpoint import DTYPE_BITS, CheckpointError, TensorEntry
from finetune.offload.weights.formats import Extent

# A tensor cut into more and smaller pieces than this (a transposed matrix: every element) would be read far below the
# disk's speed: refused.
MAX_SMALL_PIECES = 8192
SMALL_PIECE_BYTES = 512


class _Box(NamedTuple):
    """Elements [start, start + size) of a tensor; element start + i is element offset + sum(i * strides) of `entry`."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    entry: TensorEntry
    offset: int
    strides: tuple[int, ...]


class PlacementTensor(torch.Tensor):
    """A tensor without data whose elements are known by their place in checkpoint tensors."""

    boxes: list[_Box]

    @staticmethod
    def __new__(cls, shape: Sequence[int], boxes: list[_Box]) -> PlacementTensor:
        tensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.uint8)
        tensor.boxes = boxes
        return tensor

    @classmethod
    def of(cls, entry: TensorEntry) -> PlacementTensor:
        """The whole of a checkpoint tensor."""
        box = _Box((0,) * len(entry.shape), entry.shape, entry, 0, _row_major(entry.shape))
        return cls(entry.shape, [box] if prod(entry.shape) else [])

    def __repr__(self) -> str:  # torch's own reads the data
        return f"PlacementTensor({tuple(self.shape)}, {len(self.boxes)} boxes)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        move = _MOVES.get(func)
        if move is None:
            raise NotImplementedError(f"operation {func} computes new values or isn't known")
        return move(*args, **(kwargs or {}))


def run_converter(converter: WeightConverter, name: str, model: torch.nn.Module) -> dict[str, PlacementTensor]:
    """Run a converter whose collected tensors are PlacementTensors; its results by parameter name.

    Raises CheckpointError when the converter fails or does something else than moving elements.
    """
    try:
        results = converter.convert(name, model=model, config=model.config)
    except Exception as error:  # whatever an architecture's own operation raises
        raise CheckpointError(
            f"parameter '{name}' of {type(model).__name__} can't be placed from the checkpoint: its conversion "
            f"{converter.operations} failed ({error}). The checkpoint may be of another model; if not, this "
            "architecture isn't supported from this checkpoint yet"
        ) from error
    return {key: value[0] if isinstance(value, list) else value for key, value in results.items()}


def extents_of(name: str, placement: PlacementTensor) -> tuple[Extent, ...]:
    """File extents of a placement in the order of the tensor's bytes, neighbours merged. Its sources have one dtype.

    Raises CheckpointError when the pieces are so many and so small that streaming them makes no sense.
    """
    runs = [_contiguous_run(box, tuple(placement.shape)) for box in placement.boxes]
    num_pieces = sum(prod(box.size) // run for box, run in zip(placement.boxes, runs, strict=True))
    num_bytes = sum(prod(box.size) * DTYPE_BITS[box.entry.dtype] // 8 for box in placement.boxes)
    if num_pieces > MAX_SMALL_PIECES and num_bytes < num_pieces * SMALL_PIECE_BYTES:
        raise CheckpointError(
            f"parameter '{name}' {list(placement.shape)} lies in the checkpoint in {num_pieces} pieces of about "
            f"{num_bytes // num_pieces} bytes (it is transposed): this architecture isn't supported yet"
        )
    strides = _row_major(placement.shape)
    pieces = [piece for box, run in zip(placement.boxes, runs, strict=True) for piece in _pieces(box, run, strides)]
    pieces.sort(key=lambda piece: piece.target_offset)
    merged: list[Extent] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last and last.path == piece.path and last.file_offset + last.num_bytes == piece.file_offset:
            merged[-1] = last._replace(num_bytes=last.num_bytes + piece.num_bytes)
        else:
            merged.append(piece)
    return tuple(merged)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _contiguous_run(box: _Box, shape: tuple[int, ...]) -> int:
    """How many elements of a box, from its last dimension on, lie together both in the file and in the tensor."""
    run = 1
    for size, stride, target_stride in zip(
        reversed(box.size), reversed(box.strides), reversed(_row_major(shape)), strict=True
    ):
        if size == 1:
            continue
        if stride != run or target_stride != run:
            break
        run *= size
    return run


def _pieces(box: _Box, run: int, target_strides: tuple[int, ...]) -> Iterator[Extent]:
    item_bytes = DTYPE_BITS[box.entry.dtype] // 8
    inner, outer = 1, len(box.size)
    while inner < run:
        outer -= 1
        inner *= box.size[outer]
    target_start = sum(start * stride for start, stride in zip(box.start, target_strides, strict=True))
    for index in product(*(range(size) for size in box.size[:outer])):
        source = box.offset + sum(i * stride for i, stride in zip(index, box.strides, strict=False))
        target = target_start + sum(i * stride for i, stride in zip(index, target_strides, strict=False))
        yield Extent(box.entry.path, box.entry.offset + source * item_bytes, run * item_bytes, target * item_bytes)


# What PyTorch's movement operations do to boxes. The tensors claim to be contiguous, so `contiguous()` is a no-op and
# any `reshape` arrives as a view.


def _dim(tensor: Tensor, dim: int, extra: int = 0) -> int:
    return dim + tensor.dim() + extra if dim < 0 else dim


def _each_dim(boxes: Sequence[_Box], rebuild: Callable[[Sequence[Any]], Sequence[Any]]) -> list[_Box]:
    return [
        _Box(tuple(rebuild(box.start)), tuple(rebuild(box.size)), box.entry, box.offset, tuple(rebuild(box.strides)))
        for box in boxes
    ]


def _permute(tensor: PlacementTensor, dims: Sequence[int]) -> PlacementTensor:
    order = [_dim(tensor, dim) for dim in dims]
    boxes = _each_dim(tensor.boxes, lambda values: [values[dim] for dim in order])
    return PlacementTensor([tensor.shape[dim] for dim in order], boxes)


def _transpose(tensor: PlacementTensor, dim0: int, dim1: int) -> PlacementTensor:
    order = list(range(tensor.dim()))
    first, second = _dim(tensor, dim0), _dim(tensor, dim1)
    order[first], order[second] = second, first
    return _permute(tensor, order)


def _narrow(tensor: PlacementTensor, dim: int, start: int, length: int) -> PlacementTensor:
    boxes = []
    for box in tensor.boxes:
        low, high = max(box.start[dim], start), min(box.start[dim] + box.size[dim], start + length)
        if low < high:
            boxes.append(
                box._replace(
                    start=_with(box.start, dim, low - start),
                    size=_with(box.size, dim, high - low),
                    offset=box.offset + (low - box.start[dim]) * box.strides[dim],
                )
            )
    return PlacementTensor(_with(tensor.shape, dim, length), boxes)


def _with(values: Sequence[int], dim: int, *new: int) -> tuple[int, ...]:
    return (*values[:dim], *new, *values[dim + 1 :])


def _slice(
    tensor: PlacementTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> PlacementTensor:
    if step != 1:
        raise NotImplementedError("slice with a step")
    dim = _dim(tensor, dim)
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    return _narrow(tensor, dim, first, max(0, last - first))


def _split_with_sizes(tensor: PlacementTensor, sizes: Sequence[int], dim: int = 0) -> list[PlacementTensor]:
    dim = _dim(tensor, dim)
    if sum(sizes) != tensor.shape[dim]:
        raise ValueError(f"split of {tensor.shape[dim]} rows into {list(sizes)}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_narrow(tensor, dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def _split(tensor: PlacementTensor, size: int, dim: int = 0) -> list[PlacementTensor]:
    total = tensor.shape[_dim(tensor, dim)]
    return _split_with_sizes(tensor, [min(size, total - start) for start in range(0, total, size)], dim)


def _unsqueeze(tensor: PlacementTensor, dim: int) -> PlacementTensor:
    dim = _dim(tensor, dim, extra=1)
    boxes = [
        box._replace(
            start=(*box.start[:dim], 0, *box.start[dim:]),
            size=(*box.size[:dim], 1, *box.size[dim:]),
            strides=(*box.strides[:dim], 0, *box.strides[dim:]),
        )
        for box in tensor.boxes
    ]
    return PlacementTensor((*tensor.shape[:dim], 1, *tensor.shape[dim:]), boxes)


def _squeeze(tensor: PlacementTensor, dim: int) -> PlacementTensor:
    dim = _dim(tensor, dim)
    if tensor.shape[dim] != 1:
        return _same(tensor)
    return PlacementTensor(_with(tensor.shape, dim), _each_dim(tensor.boxes, lambda values: _with(values, dim)))


def _select(tensor: PlacementTensor, dim: int, index: int) -> PlacementTensor:
    dim = _dim(tensor, dim)
    return _squeeze(_narrow(tensor, dim, index % tensor.shape[dim], 1), dim)


def _unbind(tensor: PlacementTensor, dim: int = 0) -> list[PlacementTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[_dim(tensor, dim)])]


def _cat(tensors: Sequence[PlacementTensor], dim: int = 0) -> PlacementTensor:
    first = tensors[0]
    dim = _dim(first, dim)
    shapes = {_with(tensor.shape, dim) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"concatenation of unlike shapes {[tuple(tensor.shape) for tensor in tensors]}")
    boxes, total = [], 0
    for tensor in tensors:
        boxes += [box._replace(start=_with(box.start, dim, box.start[dim] + total)) for box in tensor.boxes]
        total += tensor.shape[dim]
    return PlacementTensor(_with(first.shape, dim, total), boxes)


def _stack(tensors: Sequence[PlacementTensor], dim: int = 0) -> PlacementTensor:
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], _dim(tensors[0], dim, extra=1))


def _view(tensor: PlacementTensor, shape: Sequence[int]) -> PlacementTensor:
    """Go through the dimensions of both shapes from the left; where a run of them has one product, merge and cut it."""
    if -1 in shape:
        known = -prod(shape)
        shape = [tensor.numel() // known if size == -1 else size for size in shape]
    if prod(shape) != tensor.numel() or not tensor.numel():
        raise ValueError(f"view of {tuple(tensor.shape)} as {tuple(shape)}")
    dim, new_dim, result = 0, 0, _same(tensor)
    while dim < result.dim() or new_dim < len(shape):
        if new_dim == len(shape):
            result = _squeeze(result, dim)  # only sizes of 1 are left
        elif dim == result.dim():
            result, dim, new_dim = _unsqueeze(result, dim), dim + 1, new_dim + 1
        elif result.shape[dim] == shape[new_dim]:
            dim, new_dim = dim + 1, new_dim + 1
        elif result.shape[dim] % shape[new_dim] == 0:
            result = _cut_dim(result, dim, shape[new_dim])
        else:
            result = _merge_dims(result, dim)
    return result


def _cut_dim(tensor: PlacementTensor, dim: int, rows: int) -> PlacementTensor:
    """Dimension `dim` of size n becomes two, (rows, n / rows)."""
    width = tensor.shape[dim] // rows
    boxes = []
    for box in tensor.boxes:
        low, high, stride = box.start[dim], box.start[dim] + box.size[dim], box.strides[dim]
        while low < high:
            # Either the part of one row, or as many whole rows as there are.
            if low % width or high - low < width:
                take = min(high, (low // width + 1) * width) - low
                size = (1, take)
            else:
                take = (high - low) // width * width
                size = (take // width, width)
            boxes.append(
                box._replace(
                    start=_with(box.start, dim, low // width, low % width),
                    size=_with(box.size, dim, *size),
                    offset=box.offset + (low - box.start[dim]) * stride,
                    strides=_with(box.strides, dim, width * stride, stride),
                )
            )
            low += take
    return PlacementTensor(_with(tensor.shape, dim, rows, width), boxes)


def _merge_dims(tensor: PlacementTensor, dim: int) -> PlacementTensor:
    """Dimensions `dim` and `dim + 1` become one."""
    rows, width = tensor.shape[dim], tensor.shape[dim + 1]
    boxes = []
    for box in tensor.boxes:
        (row, column), (num_rows, num_columns) = box.start[dim : dim + 2], box.size[dim : dim + 2]
        row_stride, stride = box.strides[dim : dim + 2]
        if width == 1:
            parts = [(row, num_rows, row_stride, 0)]
        elif num_columns == width and row_stride == width * stride:
            parts = [(row * width, num_rows * width, stride, 0)]
        else:
            parts = [((row + i) * width + column, num_columns, stride, i * row_stride) for i in range(num_rows)]
        boxes += [
            _Box(
                (*box.start[:dim], start, *box.start[dim + 2 :]),
                (*box.size[:dim], size, *box.size[dim + 2 :]),
                box.entry,
                box.offset + skip,
                (*box.strides[:dim], step, *box.strides[dim + 2 :]),
            )
            for start, size, step, skip in parts
        ]
    return PlacementTensor((*tensor.shape[:dim], rows * width, *tensor.shape[dim + 2 :]), boxes)


def _same(tensor: PlacementTensor, *, memory_format: Any = None) -> PlacementTensor:
    return PlacementTensor(tensor.shape, tensor.boxes)


_aten = torch.ops.aten
_MOVES: dict[Any, Callable[..., Any]] = {
    _aten.permute.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split_with_sizes,
    _aten.select.int: _select,
    _aten.unbind.int: _unbind,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.squeeze.dim: _squeeze,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.view.default: _view,
    _aten.clone.default: _same,
    _aten.detach.default: _same,
}
