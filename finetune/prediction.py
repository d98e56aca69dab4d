"""How long a planned step takes: what it does, in which order, at this machine's rates."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from finetune.machines.kept import current_profile, kept_drive
from finetune.memory.arena import trim_malloc
from finetune.memory.errors import UserError
from finetune.memory.simulator import Ring, Speeds, StepTime, StepWork, Update, simulate_step
from finetune.memory.units import round_up
from finetune.offload.devices import DescribedDevice
from finetune.offload.sizing.calibration import NoRates, Rates, measure_rates, try_rates, write_rate, write_rate_of
from finetune.offload.sizing.compression import Compression
from finetune.offload.sizing.counted_visits import count_visits, profile_rates
from finetune.offload.sizing.dry_run import measure_visit
from finetune.offload.sizing.needs import (
    ACTIVATIONS,
    DECODED_WEIGHTS,
    DEVICE_BLOCKS,
    GRAPHS,
    HIDDEN_STATES,
    HOST_BLOCKS,
    HOST_HEAD,
    LANES_NEAR,
    PROCESS,
    STATE,
)
from finetune.offload.sizing.timing import Timing, Workload, time_chunked_visits, time_visits

if TYPE_CHECKING:
    from finetune.planned_run import PlannedRun, StoreSize
    from finetune.session import Session

MOST_SECONDS = 5.0  # that visits are run for a prediction
MALLOC_FACTOR = 3  # by which the C library's allocator takes more for a visit than is alive, between holes
ADAPTER_UPDATE_BYTES = 120
"""That PyTorch's AdamW moves for a number in fp32: ten operations on gradient, moments and value."""


def predict_step(
    planned: PlannedRun,
    rates: Rates,
    timing: Timing | None = None,
    more_forward: Sequence[float] = (),
    more_backward: Sequence[float] = (),
) -> StepTime:
    """Of a full step. timing: of visits that were run here; None: products at `rates` are all that counts.

    more_forward, more_backward: seconds that a visit of each block takes longer.
    """
    work = _step_work(planned, rates, timing)
    if more_forward:
        work = replace(work, forward_seconds=_sums(work.forward_seconds, more_forward))
    if more_backward and work.backward_seconds:
        work = replace(work, backward_seconds=_sums(work.backward_seconds, more_backward))
    host, device = (_ring(planned, pool) for pool in (HOST_BLOCKS, DEVICE_BLOCKS))
    speeds = Speeds(
        rates.read_bytes_per_second,
        rates.write_bytes_per_second,
        rates.copy_bytes_per_second,
        rates.copy_back_bytes_per_second,
    )
    return simulate_step(work, speeds, host, device)


def with_prediction(session: Session, planned: PlannedRun, needs_rates: bool = False) -> PlannedRun:
    """With this machine's rates, and with visits timed where those take a moment, else counted where `finetune bench` has kept
    a profile; for another machine with the rates of its profile, and with visits counted. The model is not open yet.

    needs_rates: raises UserError when the model's files cannot be read, which else is why there is no prediction.
    """
    session.before_products(planned.shape)
    rates = _rates(session, planned, needs_rates)
    planned = replace(planned, rates=rates)
    if not rates or planned.shape.samples is not None:  # of which blocks may be of several kinds, called in different ways
        return planned
    device, look = session.device, time_visits if planned.batch.chunk is None else time_chunked_visits
    if isinstance(device, DescribedDevice) or not _takes_a_moment(planned, rates) or not _has_room(session, planned):
        if (device := described_device(session)) is None:
            return planned
        look = count_visits
    try:
        timing = look(_workload(session, planned), device)
        return replace(planned, timing=replace(timing, weight_seconds=session.setup.weight_seconds(session, device)))
    except Exception as error:  # a block is run by itself, and a model's own code raises whatever it likes
        return replace(planned, untimed=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    finally:
        trim_malloc()


def count_step(session: Session, planned: PlannedRun, device: DescribedDevice, padding: float = 1.0) -> StepTime:
    """As `predict_step`, at the rates of `device` alone, which may stand for that of the session: nothing is measured, so the
    same plan has the same time. padding: how many times as long lanes compute.

    Raises UserError where the device has no rates in the dtype that computes.
    """
    rates = profile_rates(session.parts, device, max(16, min(2048, planned.shape.rows)))
    try:
        timing = count_visits(_workload(session, planned), device).longer(padding)
        timing = replace(timing, weight_seconds=session.setup.weight_seconds(session, device))
    except Exception:  # the model's own code, which may not run on meta: products are all that counts then
        timing, rates = None, replace(rates, flops_per_second=rates.flops_per_second / padding)
    return predict_step(planned, rates, timing)


def described_device(session: Session) -> DescribedDevice | None:
    """The session's device as rates that are known: another machine's, or this one's where `finetune bench` has measured it."""
    device = session.device
    if isinstance(device, DescribedDevice):
        return device
    kept = current_profile(device)
    return None if kept is None else DescribedDevice(device.kind, kept)


def _workload(session: Session, planned: PlannedRun) -> Workload:
    shape = planned.shape
    names, lanes = session.setup.gradient_names, shape.micro_batches
    chunk = planned.batch.chunk
    return Workload(session.parts, session.model, planned.plan, shape.inputs, shape.train, names, lanes, chunk)


def _rates(session: Session, planned: PlannedRun, needed: bool) -> Rates | NoRates:
    rows = max(16, min(2048, planned.shape.rows))
    if isinstance(session.device, DescribedDevice):
        return profile_rates(session.parts, session.device, rows)
    rates = session.base.rates
    if rates is None:
        rates = (measure_rates if needed else try_rates)(session.parts, session.device, rows)
    if rates and (planned.store is not None or planned.plan.count(ACTIVATIONS) or planned.plan.count(HIDDEN_STATES)):
        output = session.config.output
        with contextlib.suppress(UserError):
            drive = kept_drive(session.device, output)
            rates = replace(rates, write_bytes_per_second=write_rate(output) if drive is None else write_rate_of(drive))
    return rates


def _takes_a_moment(planned: PlannedRun, rates: Rates) -> bool:
    """Whether visits can be timed. Of texts that run in chunks, one chunk is."""
    visits, chunk = 2 * (4 if planned.shape.train else 1), planned.batch.chunk
    share = 1 if chunk is None else chunk / planned.shape.inputs["input_ids"].shape[1]
    return planned.batch.visit.flops * share * visits / rates.flops_per_second < MOST_SECONDS


def _has_room(session: Session, planned: PlannedRun) -> bool:
    """Whether visits can be timed inside of the budget. They run before there is an arena."""
    plan, shape, visit = planned.plan, planned.shape, planned.batch.visit
    if plan.device_budget_bytes is not None:
        return True
    if planned.batch.chunk is not None:  # which is timed as a text of its own
        inputs = shape.of_length(planned.batch.chunk).inputs
        visit = measure_visit(session.parts, session.model, inputs, shape.train, session.setup.gradient_names)
    needed_bytes = MALLOC_FACTOR * visit.peak_bytes + max(planned.streamed.block_bytes)
    return plan.host_parts.get(PROCESS, 0) + needed_bytes <= plan.host_budget_bytes


def predict_compressed(planned: PlannedRun, rates: Rates, found: Compression, timing: Timing | None = None) -> StepTime:
    """As `predict_step`, with the model compressed without loss. What that leaves of the slots' memory first keeps weights
    decoded for a visit, if that is enough, and then blocks."""
    slots, uses = planned.plan.slots[HOST_BLOCKS], planned.shape.lanes
    slot_bytes = round_up(max(found.block_bytes))
    one, rooms = (max(sum(sizes[:count]) for sizes in found.weight_bytes) for count in (1, DECODED_WEIGHTS))
    stays = slots.num_bytes >= slots.ring * slot_bytes + rooms
    kept = (slots.num_bytes - (rooms if stays else one)) // slot_bytes - slots.ring
    kept = min(max(0, kept), len(found.block_bytes))
    plan = replace(planned.plan, slots={**planned.plan.slots, HOST_BLOCKS: replace(slots, kept=kept)})
    run = replace(planned, plan=plan, streamed=replace(planned.streamed, block_bytes=found.block_bytes))
    forward = [sum(sizes) * (1 if stays else uses) / found.decoded_bytes_per_second for sizes in found.weight_bytes]
    # Recomputed, and for the gradient.
    return predict_step(run, rates, timing, forward, [seconds * (1 if stays else 2) for seconds in forward])


def _sums(seconds: Sequence[float], more: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(seconds, more, strict=True)]


def _ring(planned: PlannedRun, pool: str) -> Ring | None:
    slots = planned.plan.slots.get(pool)
    return None if slots is None else Ring(slots.resident, slots.lookahead)


def _step_work(planned: PlannedRun, rates: Rates, timing: Timing | None) -> StepWork:
    plan, shape, streamed, store = planned.plan, planned.shape, planned.streamed, planned.store
    lanes, blocks = shape.micro_batches, len(streamed.block_bytes)
    forward, backward = _visit_seconds(planned, rates, timing)
    trained = _trained_blocks(blocks, store)
    passes = 2 if shape.train else 1

    def update(share: float) -> Update:
        return _update(planned, share, timing)

    return StepWork(
        streamed.block_bytes,
        forward,
        backward if shape.train else (),
        lowest=min(trained, default=0),
        lanes=lanes,
        visit_bytes=[planned.expert_read_bytes / passes / blocks] * blocks if streamed.experts else (),
        input_bytes=planned.batch.visit.boundary_bytes if plan.count(ACTIVATIONS) else 0,
        input_slots=max(1, plan.count(ACTIVATIONS)),
        waiting_bytes=planned.batch.visit.boundary_bytes if plan.count(HIDDEN_STATES) else 0,
        waiting_slots=max(1, plan.count(HIDDEN_STATES)),
        head_passes=-(-lanes // (1 + plan.count(LANES_NEAR))) if _head_again(planned) else 1,
        chunks=streamed.chunks,
        chunk_bytes=streamed.chunk_bytes,
        chunk_slots=max(1, plan.count(HOST_HEAD)),
        head_seconds=_head_seconds(planned, rates, timing),
        end_update=None if store is None or not store.end_share else update(store.end_share),
        updates={block: update((1 - store.end_share) / len(trained)) for block in trained},
        state_buffers=plan.slots[STATE].ring if store is not None else 1,
        kept_pieces=plan.slots[STATE].kept if store is not None else 0,
        end_seconds=planned.adapter_elements * ADAPTER_UPDATE_BYTES / rates.elementwise_bytes_per_second,
    )


def _head_again(planned: PlannedRun) -> bool:
    """Whether the head is read for some of the micro-batches after others."""
    return planned.plan.count(HIDDEN_STATES) > 0 and planned.shape.train and planned.streamed.chunks > 1


def _visit_seconds(planned: PlannedRun, rates: Rates, timing: Timing | None) -> tuple[list[float], list[float]]:
    """Of each block, by all lanes: forward and backward."""
    shape, store, blocks = planned.shape, planned.store, len(planned.streamed.block_bytes)
    lanes = shape.lanes
    recomputed = blocks - planned.plan.count(GRAPHS)
    if timing is not None:
        forward = [block.forward.of(lanes) for block in timing.blocks]
        if planned.variants > 1 and timing.weight_seconds:  # variants are made in the dtype that computes
            elements = (sum(prod(view.shape) for view in layout.views.values()) for layout in planned.parts.layouts)
            visits = zip(timing.blocks, elements, strict=True)
            forward = [lanes * block.forward.other + count * timing.weight_seconds for block, count in visits]
        trained = shape.micro_batches
        return forward, [block.backward_of(trained, index >= recomputed) for index, block in enumerate(timing.blocks)]
    seconds = planned.batch.visit.flops / rates.flops_per_second
    # The product with the weights again, and for those that are trained their gradient; before that, recomputation without its
    # last products.
    again = 1.0 + (store.trained_share if store is not None else 0)
    backward = [(again + 0.8 * (index < recomputed)) * seconds * shape.micro_batches for index in range(blocks)]
    return [seconds * lanes] * blocks, backward


def _head_seconds(planned: PlannedRun, rates: Rates, timing: Timing | None) -> float:
    head, shape, store = planned.parts.head, planned.shape, planned.store
    if head is None:
        return 0.0
    rows = (shape.micro_batches + shape.forward_lanes / 2) * shape.rows  # without the gradient
    trained = shape.train and store is not None and store.end_share > 0
    if timing is not None:
        variants = prod(head.module.weight.shape) * timing.weight_seconds if planned.variants > 1 else 0.0
        return timing.head_row * rows * (2 if trained else 1) + variants
    # A forward, and the gradient of the hidden states; of a trained head once more and that of its own.
    passes = 1 if not shape.train else 4 if trained else 2
    return 2 * passes * prod(head.module.weight.shape) * rows / rates.flops_per_second


def _trained_blocks(blocks: int, store: StoreSize | None) -> list[int]:
    """Those whose own weights a step trains. Where they are drawn at random: where draws lie on average."""
    if store is None:
        return []
    count = max(1, round(store.trained_share * blocks))
    return sorted({min(blocks - 1, (i + 1) * (blocks + 1) // (count + 1) - 1) for i in range(count)})


def _update(planned: PlannedRun, share: float, timing: Timing | None) -> Update:
    """Of a unit that has so much of what a step updates."""
    store = planned.store
    weight_bytes = int(store.elements * share * planned.parts.dtype.itemsize)
    return Update(
        max(1, round(store.pieces * share)),
        int(store.read_bytes * share),
        int(store.write_bytes * share),
        store.elements * share * (0.0 if timing is None else timing.weight_seconds),
        to_host_bytes=2 * weight_bytes,
        to_device_bytes=weight_bytes,
    )
