"""Experts under perturbation, where they are fetched one by one: a variant of a matrix is made when it is multiplied by.

As in `finetune.offload.perturb.variants`, from the clean matrix in its slot, in one pass with the updates that no checkpoint
holds yet. Noise is a function of seed, parameter and element, so that of an expert is had without that of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod

import torch

from finetune.memory.slots import SlotPool
from finetune.offload.perturb.variants import Perturbation
from finetune.offload.weights.experts import StackedMatrices
from finetune.offload.weights.formats import Stored
from finetune.offload.weights.formats.plain import dense_bytes


class ExpertVariants:
    """Of the stacks of `experts` whose name is in `keys`, the keys of their noise. pool: a slot that holds a matrix in the
    dtype that computes."""

    def __init__(
        self, experts: tuple[StackedMatrices, ...], perturbation: Perturbation, keys: Mapping[str, int], pool: SlotPool
    ) -> None:
        self._perturbation = perturbation
        self._buffer = pool.lease().buffer
        self._experts = [matrices for matrices in experts if matrices.stack.name in keys]
        for matrices in self._experts:
            stored_dtype = matrices.stack.weight.tensors[""].dtype
            matrices.make = partial(self._make, matrices, keys[matrices.stack.name], stored_dtype)
        self.variant = 0
        """That products meet."""

    def close(self) -> None:
        for matrices in self._experts:
            matrices.make = None

    def _make(
        self, matrices: StackedMatrices, key: int, stored_dtype: torch.dtype, expert: int, stored: Stored
    ) -> torch.Tensor:
        """[1, rows, columns] of the variant; stored: the clean matrix."""
        shape, dtype = (1, *matrices.stack.weight.shape[1:]), matrices.stack.dtype
        made = self._buffer[: dense_bytes(shape, dtype)].view(dtype).view(shape)
        self._perturbation.write(key, stored, {self.variant: made}, stored_dtype, expert * prod(shape))
        return made
