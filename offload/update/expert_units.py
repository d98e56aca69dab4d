"""Experts of a mixture that are trained: every matrix of a stack is a unit of update of its own, made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from finetune.memory.units import PAGE_BYTES, round_up
from finetune.offload.update.units import UpdateUnit, make_unit
from finetune.offload.weights.experts import StackedMatrices
from finetune.offload.weights.layout import BlockLayout, View, layout_block


@dataclass(frozen=True, slots=True)
class TrainedStack:
    """A stack of experts. Its units are thousands in a model, so none is kept."""

    matrices: StackedMatrices
    """Its place in the model, and its number there."""
    fqn: str
    """What it is trained as."""

    @property
    def block(self) -> int:
        """Index of the block that it is in."""
        return self.matrices.stack.block

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.matrices.stack.weight.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of a matrix."""
        return self.matrices.stack.weight.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes: of its gradients."""
        return self.matrices.stack.dtype

    def name(self, expert: int) -> str:
        """Of the expert's unit."""
        return f"{self.matrices.stack.name}[{expert}]"

    def unit(self, expert: int) -> UpdateUnit:
        """Its weight is called "" there."""
        layout = layout_block({"": self.matrices.stack.matrix(expert)})
        return make_unit(self.name(expert), layout, {"": self.fqn}, expert * prod(self.shape))

    @property
    def units(self) -> Iterator[UpdateUnit]:
        return map(self.unit, range(self.experts))

    @property
    def largest(self) -> UpdateUnit:
        """As large as one of them can be, wherever in its pages a matrix lies. For sizes alone."""
        (tensor,) = self.matrices.stack.matrix(0).tensors.values()
        view = View(PAGE_BYTES - tensor.dtype.itemsize, tensor.dtype, tensor.shape)
        return make_unit(self.name(0), BlockLayout(round_up(view.end), (), {"": view}), {"": self.fqn})


def stack_of(unit_name: str) -> str:
    """The name of the stack whose expert a unit is; of other units their own."""
    return unit_name.rpartition("[")[0] if unit_name.endswith("]") else unit_name
