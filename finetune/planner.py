"""The plans of a session: what its setup and a batch ask for, against the budgets."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from finetune.data.packed_rows import check_positions_argument
from finetune.memory.errors import UserError
from finetune.memory.needs import Needs
from finetune.memory.plan import Limits, Plan, PlanRefused, make_plan
from finetune.memory.units import available_host_bytes, format_bytes, parse_bytes, total_host_bytes
from finetune.needs_of_model import (
    batch_needs,
    check_device_cuts,
    chunk_of,
    measure_batch,
    process_as_it_is,
    process_of_run,
    text_batch_needs,
)
from finetune.offload.sizing.dry_run import VisitSize
from finetune.offload.sizing.needs import (
    HOST_HEAD,
    TEXTS,
    Streamed,
    decoded_needs,
    graph_needs,
    passing_head,
    stream_needs,
)
from finetune.offload.sizing.positions import longest_row
from finetune.planned_run import BatchShape, MeasuredBatch, PlannedRun

if TYPE_CHECKING:
    from finetune.session import Session

HOST_RESERVE_SHARE = 0.05  # of what is available, left to others when no --host-memory is given
SYSTEM_SHARE = 0.1  # of another machine's memory, that its system and other programs are taken to use


class Planner:
    """Makes plans for `session`, whose model is there and not open yet, or is measured between steps."""

    def __init__(self, session: Session, visits: dict[Any, VisitSize] | None = None) -> None:
        """visits: that were measured of an equal model, and gets more of them."""
        self._session = session
        self._longest_row = 0  # of those that were planned for
        self._visits = {} if visits is None else visits  # that were measured, by what they depend on
        self._found: dict[Any, Limits] = {}  # by the budgets of a configuration

    def plan(self, shape: BatchShape, also: BatchShape | None = None, elsewhere: bool = False) -> PlannedRun:
        """also: what must find room between steps. elsewhere: the run will be on another machine.

        Raises PlanRefused when the budgets are too small for one of them, UserError when the machine is too small for the
        budgets.
        """
        session, limits = self._session, self.limits
        if limits.host_bytes > total_host_bytes() and not elsewhere:
            raise UserError(
                f"host_memory: expected at most the {format_bytes(total_host_bytes())} that this machine (or its cgroup) "
                f"has, found {session.config.host_memory}: give less, such as 90%"
            )
        plan, needs, streamed, batch = self._plan(shape, also)
        return PlannedRun(
            plan,
            needs,
            streamed,
            batch,
            session.parts,
            session.device.kind,
            session.setup.store,
            session.setup.variants,
            sum(p.numel() for p in session.trainable) if session.setup.has_gradients else 0,
            session.base.words,
            self._budget_words,
        )

    def least_memory(self, shape: BatchShape) -> tuple[int, int | None]:
        """Bytes of host memory, and of the device's where it has its own, below which a step is refused."""
        return self.least_bytes(self._needs(shape, *self._waiting_places(shape))[0])

    def least_bytes(self, needs: Needs) -> tuple[int, int | None]:
        """The same for what a plan was made of."""
        enough, device_bytes = 1 << 60, self.limits.device_bytes
        return _smallest(needs, Limits(0, device_bytes and enough)), device_bytes and _smallest(needs, Limits(enough, 0))

    def most_bytes(self, key: str) -> int:
        """That a budget, `host_memory` or `device_memory`, can be."""
        session = self._session
        if key == "device_memory":
            return session.device.total_bytes()
        return total_host_bytes() if session.machine is None else session.machine.host.memory_bytes

    def know_visit(self, shape: BatchShape, visit: VisitSize) -> None:
        """A visit by a micro-batch of this shape, of text, takes so much: it is not measured."""
        self._visits[self._visit_key(shape)] = visit

    @property
    def process_bytes(self) -> int:
        """What the process holds now, as plans count it."""
        return process_as_it_is(sum(p.nbytes for p in self._session.adapter_parameters if not p.is_meta))

    @property
    def _budget_words(self) -> str:
        if self._session.config.host_memory is not None:
            return ""
        if self._session.machine is not None:
            return f", which is {1 - SYSTEM_SHARE:.0%} of the machine's memory"
        return f", which is {1 - HOST_RESERVE_SHARE:.0%} of what is available"

    def _plan(self, shape: BatchShape, also: BatchShape | None) -> tuple[Plan, Needs, Streamed, MeasuredBatch]:
        block_inputs, hidden_states = self._waiting_places(shape)
        needs, streamed, batch = self._needs(shape, block_inputs, hidden_states)
        for other in (also, shape.writing and shape.writing.shape):
            if other is not None:
                passes, place = not needs.ring_of(HOST_HEAD), hidden_states if needs.ring_of(TEXTS) else "host"
                needs = needs.covering(self._needs(other, block_inputs, place, passes, bool(needs.ring_of(TEXTS)))[0])
        return make_plan(needs, self.limits), needs, streamed, batch

    def _waiting_places(self, shape: BatchShape) -> tuple[str, str]:
        """Where block inputs wait for backward, and hidden states between visits; of texts that are cut, both are as long, and
        wait in the same place."""
        engine = self._session.config.engine
        if chunk_of(shape, engine.sequence_chunk) is not None:
            places = {engine.activations, engine.hidden_states}
            place = "disk" if "disk" in places else "host" if places == {"host"} else "auto"
            return place, place
        hidden_states = engine.hidden_states if shape.can_wait else "host"
        if not shape.train:  # nothing waits for backward
            return "host", hidden_states
        return ("disk" if hidden_states == "disk" else engine.activations), hidden_states

    @property
    def limits(self) -> Limits:
        """Found once, so that all plans of a session have the same."""
        key = self._session.config.host_memory, self._session.config.device_memory
        if key not in self._found:
            self._found[key] = self._find_limits()
        return self._found[key]

    def _find_limits(self) -> Limits:
        config, device, machine = self._session.config, self._session.device, self._session.machine
        if config.host_memory is not None:
            total = total_host_bytes() if machine is None else machine.host.memory_bytes
            host = _amount("host_memory", config.host_memory, total)
        elif machine is not None:
            host = int(machine.host.memory_bytes * (1 - SYSTEM_SHARE))
        else:
            host = int(available_host_bytes() * (1 - HOST_RESERVE_SHARE))
        on_device = None
        if not device.shares_host_memory:
            if config.device_memory is None:
                on_device = int(device.available_bytes() * 0.9)
            else:
                on_device = _amount("device_memory", config.device_memory, device.total_bytes())
        return Limits(host, on_device)

    def _needs(
        self, shape: BatchShape, block_inputs: str, hidden_states: str, head_passes: bool | None = None,
        beside_texts: bool = False,
    ) -> tuple[Needs, Streamed, MeasuredBatch]:  # fmt: skip
        """block_inputs, hidden_states: as in `batch_needs`. head_passes: as in `stream_needs`; None: where it costs no memory.
        beside_texts: whether a step of the same run has texts that are cut.

        Raises UserError for rows that are longer than the model has positions for."""
        session = self._session
        if shape.samples is None:
            session.adapter.check_length(shape.inputs["input_ids"].shape[1])
            self._check_positions(shape)
        if shape.packed:
            check_positions_argument(session.parts.model)
        parts, engine = session.parts, session.config.engine
        batch = self._measure(shape)
        own, streamed = session.setup.needs(session, batch, Streamed.of(parts, session.on_device))
        process = process_of_run(session.device, parts, session.process_bytes or self.process_bytes, shape.micro_batches)
        if head_passes is None:
            can_pass = session.setup.frozen and not session.on_device and streamed.chunks > 0
            head_passes = can_pass and batch.loss_bytes + streamed.chunk_bytes <= batch.visit.peak_bytes
        slots = stream_needs(
            streamed, session.on_device, engine.resident_blocks, engine.lookahead, engine.expert_slots, head_passes
        )
        if head_passes:
            slots += passing_head(batch.loss_bytes, streamed)
        if session.setup.uses_of_weights(parts, shape) > (batch.chunk is None):  # chunks use them again and again
            slots += decoded_needs(binding.lazy_bytes.values() for binding in parts.bindings)
        if hidden_states != "host" and (beside_texts or batch.chunk is not None):
            batch_own = text_batch_needs(parts, session.model, batch, hidden_states, session.setup.frozen)
        else:
            batch_own = batch_needs(
                parts, session.model, batch, block_inputs, hidden_states, session.setup.frozen, engine.hidden_states
            )
        needs = process + slots + batch_own + own
        return needs + self._graph_needs(batch, streamed), streamed, batch

    def _measure(self, shape: BatchShape) -> MeasuredBatch:
        """A visit by a micro-batch of text is the same, however many there are."""
        session = self._session
        measured = (session.parts, session.model, shape, session.setup.gradient_names)
        chunk = chunk_of(shape, session.config.engine.sequence_chunk)
        if chunk is not None:
            check_device_cuts(session.device)
        if shape.samples is not None:
            return measure_batch(*measured)
        key = self._visit_key(shape)
        batch = measure_batch(*measured, self._visits.get(key), chunk)
        self._visits[key] = batch.visit
        return batch

    def _visit_key(self, shape: BatchShape) -> tuple[Any, ...]:
        chunk = chunk_of(shape, self._session.config.engine.sequence_chunk)
        return tuple(shape.inputs["input_ids"].shape), shape.train, self._session.model.training, chunk

    def _graph_needs(self, batch: MeasuredBatch, streamed: Streamed) -> Needs:
        """Memory goes to graphs before it goes to resident blocks where a block computes longer than it is read. Text that is
        written reads blocks for every token."""
        visit, lanes = batch.visit, batch.shape.micro_batches
        if not visit.graph_blocks:
            return Needs()
        ratio = self._session.device.traits.operations_per_read_byte
        comes_first = visit.flops * lanes > ratio * streamed.visit_bytes and batch.shape.writing is None
        kept = self._session.config.engine.kept_graphs
        return graph_needs(
            visit.graph_bytes, lanes, visit.graph_blocks, comes_first, visit.boundary_bytes, self._session.on_device, kept
        )

    def _check_positions(self, shape: BatchShape) -> None:
        parts = self._session.parts
        length, kind = shape.inputs["input_ids"].shape[1], type(parts.model).__name__
        if length > self._longest_row:
            if (limit := longest_row(parts, self._session.model, shape.inputs)) < length:
                raise UserError(
                    f"rows of {length} tokens are longer than the {limit} positions of {kind}: give --sequence-length {limit} "
                    "or less"
                )
            made_for = getattr(parts.model.config.get_text_config(), "max_position_embeddings", None) or length
            if length > made_for >= self._longest_row and not shape.packed:
                print(f"note: rows of {length} tokens are longer than the {made_for} that {kind} was made for", file=sys.stderr)
            self._longest_row = length


def _smallest(needs: Needs, limits: Limits) -> int:
    try:
        make_plan(needs, limits)
    except PlanRefused as refused:
        return refused.smallest_bytes
    raise RuntimeError("a run needs no memory")


def _amount(key: str, amount: Any, total: int) -> int:
    try:
        return parse_bytes(amount, total)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None
