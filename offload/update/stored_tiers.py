"""Host tiers that read units where their newest bytes are, and check what the store's checksums cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from finetune.memory.expert_use import ExpertUse
from finetune.memory.slots import Lease, SlotPool
from finetune.offload.residency.expert_tiers import ExpertUnits, HostExperts
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.tiers import HostTier
from finetune.offload.update.expert_units import TrainedStack
from finetune.offload.update.store import WorkingStore
from finetune.offload.update.stream import StateStream, check_weights, stored_reads
from finetune.offload.update.units import UpdateUnit


class StoredTier(HostTier):
    """Of units that are there as long as the tier is."""

    def __init__(
        self,
        units: Sequence[UpdateUnit],
        io: IOEngine,
        pool: SlotPool,
        resident: frozenset[int],
        lookahead: int,
        *,
        store: WorkingStore,
        stream: StateStream,
    ) -> None:
        self._units = units
        self._store = store
        self._stream = stream
        super().__init__([unit.layout for unit in units], io, pool, resident, lookahead)

    def _extents(self, block: int, lease: Lease) -> Sequence[Any]:
        unit = self._units[block]
        self._stream.settle(unit.name)
        self.read_from(block, stored_reads(unit, self._store))
        return super()._extents(block, lease)

    def _check(self, block: int) -> None:
        image = self._pieces[block].lease.buffer
        check_weights(self._units[block], self._store, image, torch.get_num_threads())


class StoredExperts(HostExperts):
    """Of experts, some of which are trained. trained: by number of the stack."""

    def __init__(
        self, units: ExpertUnits, use: ExpertUse, layout_of: Any, io: Any, pool: SlotPool, lookahead: int,
        *, trained: Mapping[int, TrainedStack], store: WorkingStore, stream: StateStream,
    ) -> None:  # fmt: skip
        self._trained = trained
        self._store = store
        self._stream = stream
        super().__init__(units, use, layout_of, io, pool, lookahead)

    def _extents(self, block: int, lease: Lease) -> Sequence[Any]:
        unit = self._unit(block)
        if unit is None:
            return super()._extents(block, lease)
        self._stream.settle(unit.name)
        return self._extents_of(block, stored_reads(unit, self._store), lease)

    def _check(self, block: int) -> None:
        unit = self._unit(block)
        if unit is not None:
            check_weights(unit, self._store, self._pieces[block].lease.buffer, torch.get_num_threads())

    def _unit(self, block: int) -> UpdateUnit | None:
        """None: it is not trained."""
        stack, expert = self.units.place(block)
        return self._trained[stack].unit(expert) if stack in self._trained else None
