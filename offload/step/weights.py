"""What a step asks of the weights that are streamed: blocks and chunks of the head, made ready and let go one after the other.

A policy answers: weights as they are (`finetune.offload.weights.frozen`), variants of them
(`finetune.offload.perturb.perturbed_weights`), or weights that are trained (`finetune.offload.update.trained_weights`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn import functional

_ROWS_SUMMED = 256  # at a time


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the model."""

    index: int  # in the model's order


@dataclass(frozen=True, slots=True)
class HeadChunk:
    """A run of rows of the head."""

    index: int  # from the head's first row on


Key = Block | HeadChunk


@dataclass(slots=True)
class HeadRows:
    """Rows [start, start + weight.shape[0]) of the head, while their chunk is acquired, in the dtype that computes."""

    start: int  # of the vocabulary
    weight: torch.Tensor  # [rows, hidden]
    bias: torch.Tensor | None  # [rows]
    _sum: torch.Tensor | None = field(default=None, init=False)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, hidden] to [n, rows]."""
        return functional.linear(hidden, self.weight, self.bias)

    def sum_of_rows(self) -> torch.Tensor:
        """Of the weight, fp32 [hidden]; added up once. Few rows at a time are in fp32: a chunk would be twice its size."""
        if self._sum is None:
            self._sum = torch.zeros(self.weight.shape[1], device=self.weight.device)
            for rows in self.weight.split(_ROWS_SUMMED):
                self._sum += rows.float().sum(dim=0)
        return self._sum


class Weights(Protocol):
    """Blocks, and a head of one chunk, are bound to their modules between `acquire` and `release`. A step of several variants
    enters one before anything runs that is to meet it, also within a visit."""

    stall_seconds: float
    """That steps have waited for weights."""

    def begin_pass(self) -> None:
        """A pass over the model begins: before rows of embeddings are read."""

    def begin(self, order: Sequence[int]) -> None:
        """The visits of blocks to come."""

    def enter(self, variant: int) -> None:
        """What runs next, in or outside of what is acquired, is a lane of this variant of the weights."""

    def acquire(self, key: Key) -> None: ...

    def release(self, key: Key) -> None: ...

    @property
    def head_rows(self) -> HeadRows:
        """Of the chunk that is acquired, of the variant that was entered."""

    def trains(self, key: Key) -> bool:
        """Whether gradients of these very weights are wanted. Those of what is bound to a module are left in `.grad`."""

    def add_gradients(self, key: HeadChunk, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """fp32 [rows, hidden] and [rows], of a chunk of several that is acquired. Asked only where chunks are trained."""
