"""Weights that are trained, out of core: gradients of a unit meet its state as soon as they are complete.

[Note: when a unit is updated]
Immediately: a block at the end of its backward visit, and then its experts one after the other, where these are fetched one by
one; a chunk of an untied head at the end of the loss. At the end of the
step: the input embedding (its gradient comes last), a head that is tied to it (its gradients wait on disk), and the edges.
With exact clipping everything is updated at the end of the step, from gradients on disk, for only then is their norm
known. Weights are updated in their slots, so what stays in memory stays right.

[Note: updates beside an accelerator]
Updates run on the CPU: a unit's weights and gradients are copied to the host when its visit ends, and its new weights back,
also into the host slot that still has it. Nothing may be fetched between its visit and its update, so the next step's
forward is not fetched ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from finetune.memory.slots import Slab
from finetune.offload.devices.base import map_host_bytes
from finetune.offload.sizing.needs import STATE, UPDATE
from finetune.offload.step.weights import Block, HeadChunk, HeadRows, Key
from finetune.offload.update.gradient_spill import GradientSpill
from finetune.offload.update.optimizer import Optimizer
from finetune.offload.update.parts import EXPERTS_APART, RowUnit, TrainedParts, rows_source
from finetune.offload.update.step import Step, Update, Updated
from finetune.offload.update.store import WorkingStore
from finetune.offload.update.stored_tiers import StoredExperts, StoredTier
from finetune.offload.update.stream import Keeping, Later, Request, StateStream, check_weights, stored_reads
from finetune.offload.update.trained_experts import TrainedExperts, check_visits
from finetune.offload.update.units import UpdateUnit
from finetune.offload.weights.layout import bind_views
from finetune.offload.weights.streamed_parts import Room, StreamedParts, read_edges

if TYPE_CHECKING:
    from finetune.offload.streamed_model import StreamedModel


class StoreOptions(NamedTuple):
    """Of a working store, as `WorkingStore` takes them."""

    directory: Path  # of the store
    about: dict[str, Any]  # what its manifest says of the run
    resume: bool  # whether to go on from what is there
    versions: int  # of every piece


class TrainedWeights:
    """A policy of `finetune.offload.step.weights`: binds weights with what is trained in them, takes their gradients at the end
    of a visit, and updates them. Chunks after the head's own, in the head's tier, are runs of rows of the input embedding."""

    def __init__(self, room: Room, trained: TrainedParts, store: StoreOptions, keeping: Keeping, seed: int) -> None:
        """seed: of stochastic rounding."""
        self.trained = trained
        self._room = room
        about = store.about | {"layout": trained.layout_digest} | ({EXPERTS_APART: True} if room.parts.experts else {})
        self.store = WorkingStore(io=room.io, **store._replace(about=about)._asdict())
        room.after_io.callback(self.store.close)
        self._spill = GradientSpill(room.io, room.scratch)
        room.closing.callback(self._spill.close)
        trained.check_layout(self.store.directory, self.store.about)
        plan = room.plan
        slots = plan.slots[STATE]
        # Beside an accelerator host slabs are pinned, which state need not be: it is never copied there.
        slab = room.host if self._updates_in_slots else Slab(map_host_bytes(slots.num_bytes))
        pool, threads = slots.carve_from(slab), torch.get_num_threads()
        self._stream = StateStream(room.io, self.store, pool, keeping=keeping, threads=threads, kept_pieces=slots.kept)
        self._optimizer = Optimizer(self._stream, seed=seed, threads=threads)
        self._image: torch.Tensor | None = None
        """Of a unit that is updated beside an accelerator."""
        if plan.count(UPDATE):
            self._image = plan.slots[UPDATE].carve_from(room.host).lease().buffer
        self._chunks = [part.unit for part in (*trained.head, *trained.table)]
        stored = {"store": self.store, "stream": self._stream}
        of_experts = partial(StoredExperts, trained={stack.matrices.number: stack for stack in trained.stacks}, **stored)
        self._streamed = StreamedParts(room, trained.blocks, self._chunks, partial(StoredTier, **stored), of_experts)
        self._experts = TrainedExperts(
            trained, self._streamed.experts, self.store, self._stream, self._optimizer, self._spill, self._image
        )
        self._step: Step | None = None
        self._edge_image = torch.empty(0, dtype=torch.uint8)
        self._load_edges()
        self._table = next((e for e in room.embeddings if e.serves(room.model.get_input_embeddings())), None)
        self._move_table()

    @property
    def stall_seconds(self) -> float:
        return self._streamed.stall_seconds + self._stream.stall_seconds

    @property
    def resident_blocks(self) -> frozenset[int]:
        """Those that stay near compute between steps."""
        return self._streamed.blocks.resident

    @property
    def head_rows(self) -> HeadRows:
        return self._streamed.head_rows

    def begin_pass(self) -> None:
        chunks = list(range(self._streamed.num_chunks))
        if chunks:
            twice = self._step is not None and len(chunks) > 1
            self._streamed.head.begin(chunks + chunks[::-1] if twice else chunks)

    def begin(self, order: Sequence[int]) -> None:
        if self._streamed.experts is not None:
            self._streamed.experts.begin(order)
        if self._step is not None and not self._updates_in_slots:
            order = order[: 2 * len(self._step.engine.order)]  # the rest is the next step's forward
        self._streamed.blocks.begin(order)

    def enter(self, variant: int) -> None:
        """There is one variant."""

    def acquire(self, key: Key) -> None:
        self._streamed.bind(key, self._streamed.acquire(key), self._trained_names(self._unit(key)))

    def release(self, key: Key) -> None:
        gradients = self._streamed.gradients(key)
        self._streamed.unbind(key)
        if gradients:
            self._take(key, gradients)
        if self._step is not None and type(key) is Block:
            self._experts.take(key.index, self._step)
        self._streamed.release(key)

    def trains(self, key: Key) -> bool:
        if type(key) is Block and self._step is not None and self.trained.of_block(key.index):
            return self._step.request(self._unit(key)) is not None
        return bool(self._trained_names(self._unit(key)))

    def add_gradients(self, key: HeadChunk, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        gradients = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        names, dtype = self._trained_names(self._unit(key)), self._room.parts.dtype
        self._take(key, {name: grad.to(dtype) for name, grad in gradients.items() if name in names})

    def update_step(
        self, model: StreamedModel, inputs: Sequence[dict[str, Any]], labels: Sequence[torch.Tensor], seeds: Sequence[int],
        update: Update,
    ) -> Updated:  # fmt: skip
        """One step of `model`, whose weights these are: loss and gradients as its `train_step`, and the update. It counts once
        `commit` returns."""
        with self._stepping(Step(update, model.engine)) as step:
            self._stream.begin([] if step.exact else self._requests())
            loss = model.train_step(inputs, labels, seeds)
            rows = self._table_gradient()
            scale = update.grad_scale
            if step.exact:
                self._sum_up_norms_of_spilled(rows)
                scale = clip_scale(self._norm(), update.max_grad_norm)
                self._stream.begin(self._requests())
                self._update_spilled(scale)
            self._update_tables(rows, scale)
            self._update_edges(scale)
            self._move_table()
            return Updated(loss, float(self._norm()), step.sums)

    def gradient_norm(
        self, model: StreamedModel, inputs: Sequence[dict[str, Any]], labels: Sequence[torch.Tensor], seeds: Sequence[int],
        requests: Mapping[str, Request],
    ) -> float:  # fmt: skip
        """Of the gradients that `update_step` would have of the same step. They are dropped, nothing changes."""
        with self._stepping(Step(Update(requests, 0.0, 0), model.engine, measures_norm=True)):
            model.train_step(inputs, labels, seeds)
            self._sum_up_norms_of_spilled(self._table_gradient())
            for part in self.trained.head:
                self._spill.take(part.unit.name)
            for edge in self._room.parts.edges:
                if (parameter := edge.owner._parameters.get(edge.attribute)) is not None:
                    parameter.grad = None
            return float(self._norm())

    def commit(self, step: int, notes: dict[str, Any]) -> None:
        self._stream.drain()
        self.store.commit(step, notes)

    @property
    def _updates_in_slots(self) -> bool:
        """Whether compute and updates share their memory; see [Note: updates beside an accelerator]."""
        return self._room.device.shares_host_memory

    @contextmanager
    def _stepping(self, step: Step) -> Iterator[Step]:
        self._step = step
        try:
            self._select()
            self._experts.begin(step)
            yield step
        finally:
            self._step = None
            self._experts.end()

    def _unit(self, key: Key) -> UpdateUnit:
        return self.trained.blocks[key.index] if type(key) is Block else self._chunks[key.index]

    def _trained_names(self, unit: UpdateUnit) -> frozenset[str]:
        request = self._step.request(unit) if self._step else None
        return request.trained if request else frozenset()

    @property
    def _rows(self) -> tuple[RowUnit, ...]:
        """Where the input embedding is at home."""
        return self.trained.head if self.trained.tied else self.trained.table

    def _take(self, key: Key, gradients: dict[str, torch.Tensor]) -> None:
        """Gradients of what is acquired. Raises UserError when they are not complete, for the model uses the block again."""
        step, unit = self._step, self._unit(key)
        if type(key) is Block:
            check_visits(key.index, step, unit.name)
        gradients = {name: grad.cpu() for name, grad in gradients.items()}
        is_tied = type(key) is HeadChunk and self.trained.tied
        if step.measures_norm and not is_tied:
            step.count(unit, gradients)
        elif step.exact or is_tied:
            self._spill.put(unit.name, gradients)
        else:
            self._apply_in_tier(key, gradients, step.update.grad_scale)

    def _apply_in_tier(
        self, key: Key, gradients: dict[str, torch.Tensor], scale: float, counted: bool = False
    ) -> None:
        """To what is acquired."""
        tier, unit = self._streamed.tier(key), self._unit(key)
        if self._updates_in_slots:
            self._apply(unit, gradients, tier.slot(key.index), scale, counted)
            return
        image = tier.image(key.index, self._image)
        self._apply(unit, gradients, image, scale, counted)
        tier.replace(key.index, image)

    def _apply(
        self, unit: UpdateUnit, gradients: dict[str, torch.Tensor], image: torch.Tensor, scale: float, counted: bool = False
    ) -> None:
        """counted: whether the gradients are in the norm already."""
        step = self._step
        gradients = {name: grad.contiguous() for name, grad in gradients.items()}
        if not counted:
            step.count(unit, gradients)
        update = step.update
        sums = self._optimizer.update(step.request(unit), image, gradients, update.learning_rate, scale, update.step)
        step.add_sums(unit.name, sums)

    def _norm(self) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_` computes it: the norm of the parameters' norms, in the model's order."""
        norms, found = [], self._step.norms
        for name in self.trained.fqns:
            if name in found:
                chunks = found[name]
                norms.append(chunks[0] if len(chunks) == 1 else torch.linalg.vector_norm(torch.stack(chunks)))
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def _select(self) -> None:
        """What the step trains outside of what is streamed wants gradients, nothing else does."""
        if self._table is not None:
            trained = any(self._step.request(part.unit) for part in self._rows)
            if trained != self._table.trained:
                self._table.trained, self._table.parameter = trained, None
        names = self._trained_names(self.trained.edges) if self.trained.edges else frozenset()
        for edge in self._room.parts.edges:
            parameter = edge.owner._parameters.get(edge.attribute)
            if parameter is not None:
                parameter.requires_grad_(edge.name in names)

    def _requests(self) -> list[Request | Later]:
        """Of the step, in the order of [Note: when a unit is updated]."""
        trained, step = self.trained, self._step
        head = [] if trained.tied else [part.unit for part in reversed(trained.head)]
        requests: list[Request | Later] = [*step.requests(head)]
        for index in reversed(step.engine.order):
            if request := step.request(trained.blocks[index]):
                requests += [request, *self._experts.later(index)]
        rows = [part.unit for part in self._rows]
        return requests + step.requests([*rows, *([trained.edges] if trained.edges else [])])

    def _table_gradient(self) -> torch.Tensor | None:
        gradient = self._table.take_gradient() if self._table is not None else None
        return None if gradient is None else gradient.cpu()

    def _gradients_of_rows(
        self, part: RowUnit, spilled: dict[str, torch.Tensor], rows: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """`spilled` of a run of rows, with that of the embedding's rows added to its weight's; rows: None: there is none."""
        if rows is None:
            return spilled
        ids, gradient = self._table.ids, spilled.get("weight")
        low, high = (int(torch.searchsorted(ids, bound)) for bound in (part.start, part.stop))
        if gradient is None:
            gradient = torch.zeros(part.stop - part.start, rows.shape[1], dtype=rows.dtype)
        gradient[ids[low:high] - part.start] += rows[low:high]
        return spilled | {"weight": gradient}

    def _sum_up_norms_of_spilled(self, rows: torch.Tensor | None) -> None:
        trained, step = self.trained, self._step
        for unit in [*trained.blocks, *(part.unit for part in trained.head if not trained.tied)]:
            if gradients := self._spill.peek(unit.name):
                step.count(unit, gradients)
        for part in self._rows:
            if step.request(part.unit):
                step.count(part.unit, self._gradients_of_rows(part, self._spill.peek(part.unit.name), rows))
        if trained.edges:
            step.count(trained.edges, self._edge_gradients())

    def _update_spilled(self, scale: float) -> None:
        """Blocks, and a head that is not the input embedding too."""
        order, head = self._step.engine.order, () if self.trained.tied else self.trained.head
        if head:
            self._streamed.head.begin(list(reversed(range(len(head)))))
            for index in reversed(range(len(head))):
                self._update_in_tier(HeadChunk(index), self._spill.take(head[index].unit.name), scale)
        wanted = [index for index in reversed(order) if self._step.request(self.trained.blocks[index])]
        self._streamed.blocks.begin(wanted + order if self._updates_in_slots else wanted)
        for index in wanted:
            self._update_in_tier(Block(index), self._spill.take(self.trained.blocks[index].name), scale)
            self._experts.update_spilled(index, self._step, scale)

    def _update_tables(self, rows: torch.Tensor | None, scale: float) -> None:
        """A tied head, or the input embedding's own units."""
        first = 0 if self.trained.tied else len(self.trained.head)
        wanted = [(first + i, part) for i, part in enumerate(self._rows) if self._step.request(part.unit)]
        if wanted:
            self._streamed.head.begin([index for index, _ in wanted])
        for index, part in wanted:
            gradients = self._gradients_of_rows(part, self._spill.take(part.unit.name), rows)
            self._update_in_tier(HeadChunk(index), gradients, scale, counted=self._step.exact)

    def _update_in_tier(
        self, key: Key, gradients: dict[str, torch.Tensor], scale: float, counted: bool = True
    ) -> None:
        if gradients:
            self._streamed.acquire(key)
            self._apply_in_tier(key, gradients, scale, counted)
            self._streamed.release(key)

    def _edge_gradients(self) -> dict[str, torch.Tensor]:
        names, edges = self._trained_names(self.trained.edges), self._room.parts.edges
        values = ((edge.name, edge.owner._parameters[edge.attribute]) for edge in edges if edge.name in names)
        return {name: value.grad.cpu() for name, value in values if value.grad is not None}

    def _update_edges(self, scale: float) -> None:
        unit = self.trained.edges
        if unit is None or not (gradients := self._edge_gradients()):
            return
        self._apply(unit, gradients, self._edge_image, scale, counted=self._step.exact)
        views = bind_views(self._edge_image, unit.layout)
        for edge in self._room.parts.edges:
            if edge.name in gradients:
                value = edge.owner._parameters[edge.attribute]
                value.data.copy_(views[edge.name])
                value.grad = None

    def _move_table(self) -> None:
        """The embedding's rows are read where they are now."""
        if self._table is not None:
            source = next(s for _, m, s in self._room.parts.embeddings if self._table.serves(m))
            for part in self._rows:
                self._stream.settle(part.unit.name)
            self._table.move_to(rows_source(self._rows, partial(stored_reads, store=self.store), source))

    def _load_edges(self) -> None:
        unit, io, device = self.trained.edges, self._room.io, self._room.device.torch_device
        views: dict[str, torch.Tensor] = {}
        if unit is not None:
            self._edge_image = torch.empty(unit.layout.num_bytes, dtype=torch.uint8)
            reads = stored_reads(unit, self.store)
            files = {read.path: io.open(read.path) for read in reads}
            start = self._edge_image.data_ptr()
            io.wait(io.submit_reads([(files[r.path], r.file_offset, r.num_bytes, start + r.slot_offset) for r in reads]))
            for file in files.values():
                io.close_file(file)
            check_weights(unit, self.store, self._edge_image, torch.get_num_threads())
            views = bind_views(self._edge_image, unit.layout)
        for edge in self._room.parts.edges:
            if edge.name in views:
                edge.install(views[edge.name].to(device, edge.dtype, copy=True))
        for edge, stored in read_edges(io, [edge for edge in self._room.parts.edges if edge.name not in views]):
            edge.install(edge.source.decode(stored, edge.dtype).to(device))


def clip_scale(norm: torch.Tensor | float, max_norm: float) -> float:
    """The factor of `torch.nn.utils.clip_grad_norm_`."""
    coefficient = max_norm / (torch.as_tensor(norm) + 1e-6)
    return float(torch.clamp(coefficient, max=1.0))
