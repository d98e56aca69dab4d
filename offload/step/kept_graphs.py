"""Graphs of visits that stay from forward to backward, which then recomputes nothing.

[Note: kept graphs]
Where the plan has room, a block runs with a graph in forward already, and what autograd saves stays. What it must not keep is
the block's weights: in backward they may lie in another slot, and decoded they would be as large as the model. So a saved
tensor that lies in a parameter or buffer of the block is kept as a place (module, name, position) and is found again in what is
bound there in backward. A weight that is trained is another tensor by then, to which the gradient is handed on.

PyTorch does not notice when a tensor is overwritten that hooks have saved: that is done here, with the same consequence.
Nor do hooks see what a `torch.autograd.Function` keeps without `save_for_backward`. If it keeps a piece of the weights so, the
visit is recomputed as if there were no room.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only, tree_unflatten

Place = tuple[dict[str, torch.Tensor | None], str]
"""The parameters or the buffers of a module, and the name of one."""


@dataclass(slots=True)
class KeptGraph:
    """Of one lane's visit to a block."""

    inputs: list[Any]  # arguments of the block, flattened: leaves of the graph
    outputs: dict[int, GradientEdge]  # number of the output -> where its gradient goes


@dataclass(slots=True)
class _InPlace:
    """A saved tensor that lies in what is bound at a place."""

    place: Place
    offset_bytes: int  # from the first number of what is bound
    shape: torch.Size
    stride: tuple[int, ...]  # in numbers
    dtype: torch.dtype

    def found(self) -> torch.Tensor:
        tensors, name = self.place
        storage, start = tensors[name].untyped_storage(), tensors[name].data_ptr()
        offset, left = divmod(start - storage.data_ptr() + self.offset_bytes, self.dtype.itemsize)
        if left:
            raise RuntimeError(f"{name} is bound at an address that its dtype is not aligned to")
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(storage, offset, self.shape, self.stride)


class BoundTensors:
    """What is bound to the modules of one block, visit after visit."""

    def __init__(self, block: nn.Module) -> None:
        homes = [home for module in block.modules() for home in (module._parameters, module._buffers)]
        self._places: list[Place] = [(home, name) for home in homes for name, tensor in home.items() if tensor is not None]
        self._ranges: list[tuple[int, int, Place]] = []  # addresses [start, end), ascending
        self._leaves: list[tuple[Place, torch.Tensor]] = []
        self._saved: set[int] = set()  # addresses of storages that a graph has saved something of

    def begin_forward(self) -> None:
        """A visit begins whose graphs are to be kept, and its weights are bound."""
        self._ranges, self._leaves = [], []
        for place in self._places:
            tensor = place[0][place[1]]
            if tensor.requires_grad:
                self._leaves.append((place, tensor))
            if start := tensor.data_ptr():
                storage = tensor.untyped_storage()
                end = min(start + tensor.nbytes, storage.data_ptr() + storage.nbytes())  # a placeholder has one number
                self._ranges.append((start, end, place))
        self._ranges.sort(key=itemgetter(0))

    def end_forward(self) -> None:
        """Its weights are let go. Those that are trained stay leaves of the graphs, without their numbers."""
        self._ranges, self._saved = [], set()
        self._leaves = [(place, leaf) for place, leaf in self._leaves if place[0][place[1]] is not leaf]
        for _, leaf in self._leaves:
            leaf.data = leaf.data.new_empty(()).expand(leaf.shape)

    def end_backward(self) -> None:
        """All graphs of the visit have run backward, and its weights are bound."""
        for (home, name), leaf in self._leaves:
            if leaf.grad is not None:
                home[name].grad, leaf.grad = leaf.grad, None
        self._leaves = []

    def run(
        self, forward: Callable[[tuple, dict[str, Any]], Any], args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, KeptGraph | None]:
        """forward(args, kwargs) without its graph, and the graph; None: it can't be kept."""
        flat, spec = tree_flatten((args, kwargs))
        inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in flat]
        self._saved.clear()
        with torch.enable_grad(), saved_tensors_hooks(self._pack, _unpack):
            output = forward(*tree_unflatten(inputs, spec))
        found = tree_flatten(output)[0]
        edges = {i: get_gradient_edge(x) for i, x in enumerate(found) if isinstance(x, torch.Tensor) and x.requires_grad}
        output = tree_map_only(torch.Tensor, self._without_graph, output)
        return output, None if self._holds_weights(edges.values()) else KeptGraph(inputs, edges)

    def _without_graph(self, output: torch.Tensor) -> torch.Tensor:
        """The model may overwrite a block's output, of which the graph may have saved something."""
        output = output.detach()
        return output.clone() if output.untyped_storage().data_ptr() in self._saved else output

    def _pack(self, tensor: torch.Tensor) -> Any:
        found = self._bound_at(tensor.data_ptr())
        if found is not None:
            return _InPlace(*found, tensor.shape, tensor.stride(), tensor.dtype)
        self._saved.add(tensor.untyped_storage().data_ptr())
        return tensor, tensor._version

    def _bound_at(self, address: int) -> tuple[Place, int] | None:
        """The place, and how many bytes behind the first number."""
        index = bisect_right(self._ranges, address, key=itemgetter(0)) - 1
        if index < 0 or address >= self._ranges[index][1]:
            return None
        return self._ranges[index][2], address - self._ranges[index][0]

    def _holds_weights(self, edges: Iterable[GradientEdge]) -> bool:
        """Whether a node of the graph keeps a piece of what is bound where hooks don't see it."""
        seen: set[Any] = set()
        ahead = [edge.node for edge in edges]
        while ahead:
            node = ahead.pop()
            if node in seen:
                continue
            seen.add(node)
            ahead += [following for following, _ in node.next_functions if following is not None]
            if isinstance(node, BackwardCFunction):
                kept = (value for value in tree_iter(vars(node)) if isinstance(value, torch.Tensor))
                if any(self._bound_at(value.data_ptr()) is not None for value in kept):
                    return True
        return False


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, _InPlace):
        return packed.found()
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of shape "
            f"{list(tensor.shape)}"
        )
    return tensor
