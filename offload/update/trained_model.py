"""A streamed model whose own weights are trained, out of core: gradients of a unit meet its state as soon as they are complete.

[Note: when a unit is updated]
Immediately: a block at the end of its backward visit, a chunk of an untied head at the end of the loss. At the end of the
step: the input embedding (its gradient comes last), a head that is tied to it (its gradients wait on disk), and the edges.
With exact clipping everything is updated at the end of the step, from gradients on disk, for only then is their norm
known. Weights are updated in their slots, so what stays in memory stays right.

[Note: updates beside an accelerator]
Updates run on the CPU: a unit's weights and gradients are copied to the host when its visit ends, and its new weights back,
also into the host slot that still has it. Nothing may be fetched between its visit and its update, so the next step's
forward is not fetched ahead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memory.errors import UserError
from memory.plan import Plan
from memory.slots import Lease, Slab, SlotPool
from offload.devices.base import map_host_bytes
from offload.residency.tiers import HostTier, Tier
from offload.sizing.needs import HOST_BLOCKS, HOST_HEAD, STATE, UPDATE
from offload.step.engine import Weights
from offload.streamed_model import BlockWeights, Chunks, StreamedModel, Traffic, all_if
from offload.update.gradient_spill import GradientSpill
from offload.update.kernels import Sums
from offload.update.optimizer import Optimizer
from offload.update.parts import RowUnit, TrainedParts, rows_source
from offload.update.store import WorkingStore
from offload.update.stream import Keeping, Request, StateStream, check_weights, stored_reads
from offload.update.units import UpdateUnit
from offload.weights.embedding import RowsOnDemand
from offload.weights.layout import Read, bind_views
from offload.weights.parts import EdgeTensor


@dataclass(frozen=True, slots=True)
class Update:
    """How one step changes the weights.

    requests: by name of the unit; units that are not in it are frozen. grad_scale: what gradients are multiplied by; None:
    they are clipped to `max_grad_norm` by this step's own norm, exactly. step: of the run, from 1.
    """

    requests: Mapping[str, Request]
    learning_rate: float
    step: int
    grad_scale: float | None = 1.0
    max_grad_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class Updated:
    """loss: fp32 [], before the update. grad_norm: of all gradients, before clipping. sums: by name of the unit."""

    loss: torch.Tensor
    grad_norm: float
    sums: Mapping[str, Sums]


class StoredTier(HostTier):
    """A host tier that reads units where their newest bytes are, and checks what the store's checksums cover."""

    def __init__(
        self, units: Sequence[UpdateUnit], model: TrainedModel, pool: SlotPool, resident: frozenset[int], lookahead: int
    ) -> None:
        self._units = units
        self._model = model
        super().__init__([unit.layout for unit in units], model.io, pool, resident, lookahead)

    def _extents(self, block: int, lease: Lease) -> Sequence[Any]:
        unit = self._units[block]
        self._model.stream.settle(unit.name)
        self.read_from(block, stored_reads(unit, self._model.store))
        return super()._extents(block, lease)

    def _check(self, block: int) -> None:
        image = self._pieces[block].lease.buffer
        check_weights(self._units[block], self._model.store, image, torch.get_num_threads())


class TrainedModel(StreamedModel):
    """store_directory, about, resume, versions: of the working store. seed: of stochastic rounding."""

    def __init__(
        self, parts: Any, plan: Plan, device: Any, scratch: Path, *, trained: TrainedParts, store_directory: Path,
        about: dict[str, Any], resume: bool, versions: int, keeping: Keeping, seed: int, **options: Any,
    ) -> None:  # fmt: skip
        self.trained = trained
        about = about | {"layout": trained.layout_digest}
        self._store_options = {"directory": store_directory, "about": about, "resume": resume, "versions": versions}
        self._keeping = keeping
        self._seed = seed
        self._update: Update | None = None
        self._measures_norm = False
        self._norms: dict[str, list[torch.Tensor]] = {}
        self._sums: dict[str, Sums] = {}
        self._edge_image = torch.empty(0, dtype=torch.uint8)
        super().__init__(parts, plan, device, scratch, **options)

    def _open(self, plan: Plan, scratch: Path, progress: Any) -> None:
        self.store = WorkingStore(io=self.io, **self._store_options)
        self._spill = GradientSpill(self.io, scratch)
        try:
            self.trained.check_layout(self.store.directory, self.store.about)
            self._open_model(plan, scratch, progress)
        except BaseException:
            self.store.close()
            raise

    def _open_model(self, plan: Plan, scratch: Path, progress: Any) -> None:
        super()._open(plan, scratch, progress)
        # Beside an accelerator host slabs are pinned, which state need not be: it is never copied there.
        slab = self._host_slab if self.updates_in_slots else Slab(map_host_bytes(plan.slots[STATE].num_bytes))
        pool = plan.slots[STATE].carve_from(slab)
        self._image: torch.Tensor | None = None  # of a unit that is updated beside an accelerator
        if plan.count(UPDATE):
            self._image = plan.slots[UPDATE].carve_from(self._host_slab).lease().buffer
        threads = torch.get_num_threads()
        self.stream = StateStream(
            self.io, self.store, pool, keeping=self._keeping, threads=threads, kept_pieces=plan.slots[STATE].kept
        )
        self._optimizer = Optimizer(self.stream, seed=self._seed, threads=threads)
        self._table: RowsOnDemand | None = next(
            (e for e in self.embeddings if e.serves(self.model.get_input_embeddings())), None
        )
        self._move_table()

    def update_step(
        self, inputs: Sequence[dict[str, Any]], labels: Sequence[torch.Tensor], seeds: Sequence[int], update: Update
    ) -> Updated:
        """One step: loss and gradients as `train_step`, and the update. It counts once `commit` returns."""
        self._update, self._norms, self._sums = update, {}, {}
        self._select(update.requests)
        exact = update.grad_scale is None
        self.stream.begin([] if exact else [*self._immediate(), *self._deferred()])
        loss = self.train_step(inputs, labels, seeds)
        rows = self._table_gradient()
        if exact:
            self._sum_up_norms_of_spilled(rows)
            norm = self._norm()
            scale = clip_scale(norm, update.max_grad_norm)
            self.stream.begin([*self._immediate(), *self._deferred()])
            self._update_spilled_blocks(scale)
        else:
            scale = update.grad_scale
        self._update_tables(rows, scale)
        self._update_edges(scale)
        self._move_table()
        self._update = None
        return Updated(loss, float(self._norm()), self._sums)

    def gradient_norm(
        self, inputs: Sequence[dict[str, Any]], labels: Sequence[torch.Tensor], seeds: Sequence[int],
        requests: Mapping[str, Request],
    ) -> float:  # fmt: skip
        """Of the gradients that `update_step` would have of the same step. They are dropped, nothing changes."""
        self._update, self._norms, self._measures_norm = Update(requests, 0.0, 0), {}, True
        try:
            self._select(requests)
            self.train_step(inputs, labels, seeds)
            self._sum_up_norms_of_spilled(self._table_gradient())
            for part in self.trained.head:
                self._spill.take(part.unit.name)
            for edge in self.parts.edges:
                if (parameter := edge.owner._parameters.get(edge.attribute)) is not None:
                    parameter.grad = None
            return float(self._norm())
        finally:
            self._update, self._measures_norm = None, False

    def commit(self, step: int, notes: dict[str, Any]) -> None:
        self.stream.drain()
        self.store.commit(step, notes)

    def traffic(self) -> Traffic:
        traffic = super().traffic()
        return replace(traffic, stall_seconds=traffic.stall_seconds + self.stream.stall_seconds)

    def close(self) -> None:
        with contextlib.ExitStack() as parts:
            parts.callback(self.store.close)
            parts.callback(super().close)
            parts.callback(self._spill.close)

    @property
    def updates_in_slots(self) -> bool:
        """Whether compute and updates share their memory; see [Note: updates beside an accelerator]."""
        return self.device.shares_host_memory

    def block_gradients(self, index: int, gradients: dict[str, torch.Tensor]) -> None:
        """Those of a block that is acquired, complete. Raises UserError when they are not, for the model uses the block
        again."""
        if (count := self.engine.order.count(index)) > 1:
            raise UserError(
                f"the model runs {self.parts.prefixes[index]} {count} times in a pass: its own weights can't be trained out of "
                "core. Train an adapter (--method lora)"
            )
        wait = self._update.grad_scale is None
        self._take(self.tier, index, self.trained.blocks[index], gradients, wait)

    def head_gradients(self, index: int, gradients: dict[str, torch.Tensor]) -> None:
        """Those of a chunk of the head that is acquired."""
        wait = self.trained.tied or self._update.grad_scale is None
        self._take(self.head_tier, index, self.trained.head[index].unit, gradients, wait)

    def trained_names(self, unit: UpdateUnit) -> frozenset[str]:
        request = self._update.requests.get(unit.name) if self._update else None
        return request.trained if request else frozenset()

    def _take(self, tier: Tier, index: int, unit: UpdateUnit, gradients: dict[str, torch.Tensor], wait: bool) -> None:
        gradients = {name: grad.cpu() for name, grad in gradients.items()}
        if self._measures_norm and not (tier is self.head_tier and self.trained.tied):
            self._count(unit, gradients)
        elif wait:
            self._spill.put(unit.name, gradients)
        else:
            self._apply_in_tier(tier, index, unit, gradients, self._update.grad_scale)

    def _apply_in_tier(
        self, tier: Tier, index: int, unit: UpdateUnit, gradients: dict[str, torch.Tensor], scale: float,
        counted: bool = False,
    ) -> None:  # fmt: skip
        """To what the tier holds at `index`, which is acquired."""
        if self.updates_in_slots:
            self._apply(unit, gradients, tier.slot(index), scale, counted)
            return
        image = tier.image(index, self._image)
        self._apply(unit, gradients, image, scale, counted)
        tier.replace(index, image)

    def _apply(
        self, unit: UpdateUnit, gradients: dict[str, torch.Tensor], image: torch.Tensor, scale: float, counted: bool = False
    ) -> None:
        update = self._update
        gradients = {name: grad.contiguous() for name, grad in gradients.items()}
        if not counted:
            self._count(unit, gradients)
        self._sums[unit.name] = self._optimizer.update(
            update.requests[unit.name], image, gradients, update.learning_rate, scale, update.step
        )

    def _count(self, unit: UpdateUnit, gradients: Mapping[str, torch.Tensor]) -> None:
        for name, grad in gradients.items():
            self._norms.setdefault(unit.fqns[name], []).append(torch.linalg.vector_norm(grad))

    def _norm(self) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_` computes it: the norm of the parameters' norms, in the model's order."""
        norms = []
        for name in self.trained.fqns:
            if name in self._norms:
                chunks = self._norms[name]
                norms.append(chunks[0] if len(chunks) == 1 else torch.linalg.vector_norm(torch.stack(chunks)))
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def _select(self, requests: Mapping[str, Request]) -> None:
        self.engine.trainable = [unit.name in requests for unit in self.trained.blocks]
        if self._table is not None:
            rows = self.trained.head if self.trained.tied else self.trained.table
            trained = any(part.unit.name in requests for part in rows)
            if trained != self._table.trained:
                self._table.trained, self._table.parameter = trained, None
        names = self.trained_names(self.trained.edges) if self.trained.edges else frozenset()
        for edge in self.parts.edges:
            parameter = edge.owner._parameters.get(edge.attribute)
            if parameter is not None:
                parameter.requires_grad_(edge.name in names)

    def _immediate(self) -> list[Request]:
        head = [] if self.trained.tied else [part.unit for part in reversed(self.trained.head)]
        blocks = [self.trained.blocks[index] for index in reversed(self.engine.order)]
        return self._requests([*head, *blocks])

    def _deferred(self) -> list[Request]:
        rows = self.trained.head if self.trained.tied else self.trained.table
        return self._requests([*(part.unit for part in rows), *([self.trained.edges] if self.trained.edges else [])])

    def _requests(self, units: Sequence[UpdateUnit]) -> list[Request]:
        return [self._update.requests[unit.name] for unit in units if unit.name in self._update.requests]

    def _table_gradient(self) -> torch.Tensor | None:
        gradient = self._table.take_gradient() if self._table is not None else None
        return None if gradient is None else gradient.cpu()

    def _rows_of(self, part: RowUnit, rows: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """`gradient` of a run of rows (None: zero) with that of the embedding's rows added; None when there is neither."""
        if rows is None:
            return gradient
        ids = self._table.ids
        low, high = (int(torch.searchsorted(ids, bound)) for bound in (part.start, part.stop))
        if gradient is None:
            gradient = torch.zeros(part.stop - part.start, rows.shape[1], dtype=rows.dtype)
        gradient[ids[low:high] - part.start] += rows[low:high]
        return gradient

    def _sum_up_norms_of_spilled(self, rows: torch.Tensor | None) -> None:
        for unit in [*self.trained.blocks, *(part.unit for part in self.trained.head if not self.trained.tied)]:
            if gradients := self._spill.peek(unit.name):
                self._count(unit, gradients)
        for part in self.trained.head if self.trained.tied else self.trained.table:
            if part.unit.name in self._update.requests:
                gradients = self._spill.peek(part.unit.name)
                weight = self._rows_of(part, rows, gradients.pop("weight", None))
                self._count(part.unit, gradients | ({} if weight is None else {"weight": weight}))
        if self.trained.edges:
            self._count(self.trained.edges, self._edge_gradients())

    def _update_spilled_blocks(self, scale: float) -> None:
        blocks, head = self.trained.blocks, () if self.trained.tied else self.trained.head
        if head:
            self.head_tier.begin(list(reversed(range(len(head)))))
            for index in reversed(range(len(head))):
                self._update_in_tier(self.head_tier, index, head[index].unit, self._spill.take(head[index].unit.name), scale)
        order = [index for index in reversed(self.engine.order) if blocks[index].name in self._update.requests]
        self.tier.begin(order + self.engine.order if self.updates_in_slots else order)
        for index in order:
            self._update_in_tier(self.tier, index, blocks[index], self._spill.take(blocks[index].name), scale)

    def _update_tables(self, rows: torch.Tensor | None, scale: float) -> None:
        """A tied head, or the input embedding's own units."""
        tied = self.trained.tied
        first = 0 if tied else len(self.trained.head)
        parts = self.trained.head if tied else self.trained.table
        wanted = [i for i, part in enumerate(parts) if part.unit.name in self._update.requests]
        if wanted:
            self.head_tier.begin([first + i for i in wanted])
        exact = self._update.grad_scale is None
        for i in wanted:
            unit = parts[i].unit
            gradients = self._spill.take(unit.name)
            weight = self._rows_of(parts[i], rows, gradients.pop("weight", None))
            if weight is not None:
                gradients["weight"] = weight
            self._update_in_tier(self.head_tier, first + i, unit, gradients, scale, counted=exact)

    def _update_in_tier(
        self, tier: Tier, index: int, unit: UpdateUnit, gradients: dict[str, torch.Tensor], scale: float,
        counted: bool = True,
    ) -> None:  # fmt: skip
        if gradients:
            tier.acquire(index)
            self._apply_in_tier(tier, index, unit, gradients, scale, counted)
            tier.release(index)

    def _edge_gradients(self) -> dict[str, torch.Tensor]:
        names = self.trained_names(self.trained.edges)
        values = ((edge.name, edge.owner._parameters[edge.attribute]) for edge in self.parts.edges if edge.name in names)
        return {name: value.grad.cpu() for name, value in values if value.grad is not None}

    def _update_edges(self, scale: float) -> None:
        unit = self.trained.edges
        if unit is None or not (gradients := self._edge_gradients()):
            return
        self._apply(unit, gradients, self._edge_image, scale, counted=self._update.grad_scale is None)
        views = bind_views(self._edge_image, unit.layout)
        for edge in self.parts.edges:
            if edge.name in gradients:
                value = edge.owner._parameters[edge.attribute]
                value.data.copy_(views[edge.name])
                value.grad = None

    def _move_table(self) -> None:
        """The embedding's rows are read where they are now."""
        rows = self.trained.head if self.trained.tied else self.trained.table
        if self._table is not None:
            source = next(s for _, m, s in self.parts.embeddings if self._table.serves(m))
            for part in rows:
                self.stream.settle(part.unit.name)
            self._table.move_to(rows_source(rows, self._reads, source))

    def _reads(self, unit: UpdateUnit) -> list[Read]:
        return stored_reads(unit, self.store)

    def _prepare(self, inputs: Sequence[dict[str, Any]]) -> None:
        super()._prepare(inputs)
        if self.head_tier is not None and self.parts.head is not None:
            chunks = list(range(len(self.parts.head.layouts)))
            self.head_tier.begin(chunks + chunks[::-1] if self._update is not None and len(chunks) > 1 else chunks)

    def _make_block_tier(self, pool: SlotPool, plan: Plan) -> HostTier:
        slots = plan.slots[HOST_BLOCKS]
        return StoredTier(self.trained.blocks, self, pool, slots.resident, slots.lookahead)

    def _make_head_tier(self, pool: SlotPool | None, plan: Plan) -> HostTier | None:
        units = [part.unit for part in (*self.trained.head, *self.trained.table)]
        if not units:
            return None
        slots = plan.slots[HOST_HEAD]
        return StoredTier(units, self, pool, all_if(slots.count, len(units)), slots.lookahead)

    def _make_weights(self, plan: Plan) -> Weights:
        return TrainedBlocks(self)

    def _make_chunks(self, plan: Plan) -> Any:
        return TrainedChunks(self)

    def _load_edges(self, edges: Sequence[EdgeTensor]) -> None:
        unit = self.trained.edges
        if unit is None:
            return super()._load_edges(edges)
        self._edge_image = torch.empty(unit.layout.num_bytes, dtype=torch.uint8)
        reads = stored_reads(unit, self.store)
        files = {read.path: self.io.open(read.path) for read in reads}
        start = self._edge_image.data_ptr()
        self.io.wait(
            self.io.submit_reads([(files[r.path], r.file_offset, r.num_bytes, start + r.slot_offset) for r in reads])
        )
        for file in files.values():
            self.io.close_file(file)
        check_weights(unit, self.store, self._edge_image, torch.get_num_threads())
        views = bind_views(self._edge_image, unit.layout)
        for edge in edges:
            if edge.name in views:
                edge.install(views[edge.name].to(self.device.torch_device, edge.dtype, copy=True))
        super()._load_edges([edge for edge in edges if edge.name not in views])


class TrainedBlocks(BlockWeights):
    """Blocks that are bound with what is trained in them, and give their gradients away at the end of a visit."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__(model.parts, model.tier)
        self._model = model

    def begin(self, order: Sequence[int]) -> None:
        passes = 3 if self._model.updates_in_slots else 2  # a third is the next step's forward
        super().begin(order[: passes * len(self._model.engine.order)])

    def acquire(self, index: int) -> None:
        names = self._model.trained_names(self._model.trained.blocks[index])
        self._tier.acquire(index)
        self._parts.bindings[index].bind(self._tier.views(index), names)

    def release(self, index: int) -> None:
        binding = self._parts.bindings[index]
        gradients = binding.gradients()
        binding.unbind()
        if gradients:
            self._model.block_gradients(index, gradients)
        self._tier.release(index)


class TrainedChunks(Chunks):
    """The head's chunks, which give their gradients away."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__(model.parts.head, model.head_tier, model.parts.dtype)
        self._model = model

    @property
    def trained(self) -> bool:
        return bool(self._names(0))

    def acquire(self, index: int) -> None:
        super().acquire(index)
        if len(self._head.layouts) == 1:
            self._head.binding.bind(self._tier.views(index), self._names(0))

    def add_gradients(self, index: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        gradients = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        gradients = {name: grad.to(self._dtype) for name, grad in gradients.items() if name in self._names(index)}
        self._model.head_gradients(index, gradients)

    def release(self, index: int) -> None:
        if len(self._head.layouts) == 1 and (gradients := self._head.binding.gradients()):
            self._model.head_gradients(index, gradients)
        super().release(index)

    def _names(self, index: int) -> frozenset[str]:
        return self._model.trained_names(self._model.trained.head[index].unit)


def clip_scale(norm: torch.Tensor | float, max_norm: float) -> float:
    """The factor of `torch.nn.utils.clip_grad_norm_`."""
    coefficient = max_norm / (torch.as_tensor(norm) + 1e-6)
    return float(torch.clamp(coefficient, max=1.0))
