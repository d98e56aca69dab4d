"""The plan: what lives where, how many slots, what it will cost. Made before any weight is read; refused if it cannot hold.

Priorities, in this order, each only if it fits: the run at all (one slot, block inputs on disk); the next block read while
one computes (lookahead 1); more buffers for the state of an optimizer; all block inputs in memory; a deeper lookahead; where
compute takes longer than the disk, buffers for all of a block's state; blocks resident, as many as there is room for; the
whole head; the state of an optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from memory.errors import UserError
from memory.fetch_policy import spread_evenly
from memory.slots import round_up
from memory.units import format_bytes

MIB = 1 << 20
QUEUE_DEPTH = 32
REQUEST_BYTES = 4 * MIB
STAGING_BYTES = 8 * MIB
ACTIVATION_SLOTS = 4
MIN_STATE_SLOTS = 3  # of an optimizer on disk: one is read, one is updated, one is written
STATE_SLOTS = 12  # keep a disk busy in both directions
MARGIN_BYTES = 40 * MIB  # Python objects, small tensors, library buffers that grow during the first steps
SPREAD_BYTES = 4 * MIB  # by which the size of the process itself differs from one start to the next
TEMPORARIES_FACTOR = 1.15  # fragmentation, and what kernels allocate inside


class PlanRefused(UserError):
    """No plan fits the budget. `smallest_bytes`: the smallest budget of that tier that would, in this process."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model, a method and a batch need, in bytes; from shapes alone.

    state: trainable parameters, their gradients and optimizer state. edges: resident weights outside of blocks.
    temporaries: most that one block visit (recompute and backward of one micro-batch) or one loss tile allocates.
    step: what a whole step holds besides (hidden states of all lanes, embedding rows, inputs).
    boundary: one micro-batch's block input; boundary_total: all of a step's.
    baseline: the process before any of this.
    variant: a block, and the largest chunk of the head, in the dtype that computes: where perturbed weights are made, 0
    when weights are used as they are. folding: buffers through which weights are written. code: what matrix products
    compile for themselves. state_slot: a buffer of an optimizer whose state is on disk, 0 where there is none.
    waiting_state_slots: how many more than the usual ones are of use where compute takes longer than the disk: what waits in
    them is not waited for. state_pieces: what a step updates, one buffer each.
    update_image, update_gradients: of the largest unit that is updated, where compute is not in host memory.
    saving: what a save holds in host memory of state that lives on the device. device_libraries, host_libraries: what an
    accelerator's kernels keep there, and come to take of host memory.
    """

    block_bytes: tuple[int, ...]
    head_chunk_bytes: int
    head_chunks: int
    state_bytes: int
    edge_bytes: int
    temporaries_bytes: int
    step_bytes: int
    boundary_bytes: int
    boundary_total_bytes: int
    baseline_bytes: int
    variant_bytes: int = 0
    head_variant_bytes: int = 0
    folding_bytes: int = 0
    code_bytes: int = 0
    state_slot_bytes: int = 0
    waiting_state_slots: int = 0
    state_pieces: int = 0
    update_image_bytes: int = 0
    update_gradients_bytes: int = 0
    saving_bytes: int = 0
    device_libraries_bytes: int = 0
    host_libraries_bytes: int = 0

    def covering(self, other: Demand) -> Demand:
        """Of the same model, for batches of either size."""
        sizes = ("temporaries_bytes", "step_bytes", "boundary_bytes", "boundary_total_bytes", "code_bytes")
        return replace(self, **{name: max(getattr(self, name), getattr(other, name)) for name in sizes})


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets in bytes; `device_bytes` None: the device computes in host memory."""

    host_bytes: int
    device_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user set by hand; None: the planner chooses."""

    resident_blocks: int | None = None
    lookahead: int | None = None
    activations: str = "auto"  # "auto", "host", "disk"


@dataclass(frozen=True, slots=True)
class Plan:
    """Frozen result of the planner; the engine allocates exactly this."""

    host_lookahead: int
    host_resident: frozenset[int]
    host_block_slots: int
    block_slot_bytes: int
    head_slots: int
    head_slot_bytes: int
    activation_slots: int
    activation_slot_bytes: int
    activation_host_bytes: int
    arena_bytes: int
    device_lookahead: int
    device_resident: frozenset[int]
    device_block_slots: int
    device_head_slots: int
    variant_slots: int
    variant_slot_bytes: int
    head_variant_slot_bytes: int
    state_slots: int
    kept_pieces: int  # of these slots, what may keep its piece from step to step
    state_slot_bytes: int
    update_image_bytes: int
    host_budget_bytes: int
    device_budget_bytes: int | None
    host_parts: Mapping[str, int]
    device_parts: Mapping[str, int]
    queue_depth: int = QUEUE_DEPTH
    request_bytes: int = REQUEST_BYTES
    staging_bytes: int = STAGING_BYTES

    @property
    def variants_bytes(self) -> int:
        """Of the slots for perturbed weights, which are where compute happens."""
        return self.variant_slots * (self.variant_slot_bytes + self.head_variant_slot_bytes)

    @property
    def host_slab_bytes(self) -> int:
        return (
            self.host_block_slots * self.block_slot_bytes
            + self.head_slots * self.head_slot_bytes
            + self.activation_slots * self.activation_slot_bytes
            + self.update_image_bytes
            + (self.variants_bytes + self.state_slab_bytes if self.device_budget_bytes is None else 0)
        )

    @property
    def state_slab_bytes(self) -> int:
        """Of an optimizer's buffers, which are not part of the host slab where that is pinned."""
        return self.state_slots * self.state_slot_bytes

    @property
    def device_slab_bytes(self) -> int:
        return (
            self.device_block_slots * self.block_slot_bytes
            + self.device_head_slots * self.head_slot_bytes
            + self.variants_bytes
        )

    @property
    def host_peak_bytes(self) -> int:
        """Predicted peak of the process, interpreter and libraries included."""
        return sum(self.host_parts.values())

    @property
    def device_peak_bytes(self) -> int:
        return sum(self.device_parts.values())


def make_plan(demand: Demand, limits: Limits, wishes: Wishes = Wishes()) -> Plan:
    """The best plan within `limits`. Raises PlanRefused, which says what needs how much and what would work."""
    plan = _cheapest(demand, limits, wishes)
    _refuse_what_does_not_fit(plan, demand, limits)
    for candidate in _improvements(demand, limits, wishes):
        if _fits(candidate(plan), limits):
            plan = candidate(plan)
    return plan


def _cheapest(demand: Demand, limits: Limits, wishes: Wishes) -> Plan:
    on_device = limits.device_bytes is not None
    num_blocks = len(demand.block_bytes)
    spill = wishes.activations == "disk" or (
        wishes.activations == "auto" and demand.boundary_total_bytes > (ACTIVATION_SLOTS + 1) * demand.boundary_bytes
    )
    draft = Plan(
        host_lookahead=0, host_resident=frozenset(), host_block_slots=1,
        block_slot_bytes=round_up(max(demand.block_bytes)),
        head_slots=1 if demand.head_chunks else 0, head_slot_bytes=round_up(demand.head_chunk_bytes),
        activation_slots=ACTIVATION_SLOTS if spill else 0, activation_slot_bytes=round_up(demand.boundary_bytes),
        activation_host_bytes=0 if spill else demand.boundary_total_bytes, arena_bytes=0,
        device_lookahead=0, device_resident=frozenset(), device_block_slots=1 if on_device else 0,
        device_head_slots=1 if on_device and demand.head_chunks else 0,
        variant_slots=1 if demand.variant_bytes else 0, variant_slot_bytes=round_up(demand.variant_bytes),
        head_variant_slot_bytes=round_up(demand.head_variant_bytes),
        state_slots=MIN_STATE_SLOTS if demand.state_slot_bytes else 0, kept_pieces=0,
        state_slot_bytes=round_up(demand.state_slot_bytes),
        update_image_bytes=round_up(demand.update_image_bytes),
        host_budget_bytes=limits.host_bytes, device_budget_bytes=limits.device_bytes, host_parts={}, device_parts={},
    )  # fmt: skip
    lookahead, resident = wishes.lookahead or 0, min(wishes.resident_blocks or 0, num_blocks)
    return _with_slots(draft, demand, lookahead, resident, resident if on_device else 0)


def _improvements(demand: Demand, limits: Limits, wishes: Wishes):
    """Changes to a plan in order of worth; each is kept if the result fits."""
    num_blocks = len(demand.block_bytes)
    on_device = limits.device_bytes is not None

    def slots(
        plan: Plan, lookahead: int | None = None, resident: int | None = None, on_device_resident: int | None = None
    ):
        return _with_slots(
            plan, demand,
            plan.host_lookahead if lookahead is None else lookahead,
            len(plan.host_resident) if resident is None else resident,
            len(plan.device_resident) if on_device_resident is None else on_device_resident,
        )  # fmt: skip

    if wishes.lookahead is None:
        yield lambda plan: slots(plan, lookahead=1)
    if demand.state_slot_bytes:
        for count in (6, STATE_SLOTS):
            yield lambda plan, count=count: _with_parts(replace(plan, state_slots=count), demand)
    if demand.variant_bytes:
        yield lambda plan: _with_parts(replace(plan, variant_slots=2), demand)
    if demand.head_chunks > 1:
        yield lambda plan: _with_parts(replace(plan, head_slots=2, device_head_slots=2 if on_device else 0), demand)
    if wishes.activations == "auto":
        yield lambda plan: _with_parts(
            replace(plan, activation_slots=0, activation_host_bytes=demand.boundary_total_bytes), demand
        )
    if wishes.lookahead is None:
        yield lambda plan: slots(plan, lookahead=min(2, num_blocks - 1))
    for count in range(STATE_SLOTS, STATE_SLOTS + demand.waiting_state_slots):
        yield lambda plan, count=count: _with_parts(replace(plan, state_slots=count + 1), demand)
    if wishes.resident_blocks is None:
        steps = [1 << i for i in range(num_blocks.bit_length() - 1, -1, -1)]
        for step in steps:  # binary ascent to the largest number that fits
            yield lambda plan, step=step: slots(plan, resident=min(num_blocks, len(plan.host_resident) + step))
        if on_device:
            for step in steps:
                yield lambda plan, step=step: slots(
                    plan, on_device_resident=min(num_blocks, len(plan.device_resident) + step)
                )
    if demand.head_chunks > 1:  # with a slot for each of its chunks the head stays, and saves half of what a block does
        yield lambda plan: _with_parts(replace(plan, head_slots=demand.head_chunks), demand)
        if on_device:
            yield lambda plan: _with_parts(replace(plan, device_head_slots=demand.head_chunks), demand)
    for step in [1 << i for i in range(demand.state_pieces.bit_length() - 1, -1, -1)]:
        yield lambda plan, step=step: _keeping(plan, demand, step)


def _keeping(plan: Plan, demand: Demand, more: int) -> Plan:
    """With so many more pieces of state kept, but not more than there are."""
    more = min(more, demand.state_pieces - plan.kept_pieces)
    return _with_parts(
        replace(plan, state_slots=plan.state_slots + more, kept_pieces=plan.kept_pieces + more), demand
    )


def _with_slots(plan: Plan, demand: Demand, lookahead: int, resident: int, on_device_resident: int) -> Plan:
    num_blocks = len(demand.block_bytes)
    on_device = plan.device_budget_bytes is not None
    ring = min(lookahead + 1, num_blocks - resident)
    device_ring = min(lookahead + 1, num_blocks - on_device_resident)
    return _with_parts(
        replace(
            plan,
            host_lookahead=lookahead,
            host_resident=spread_evenly(num_blocks, resident) if resident else frozenset(),
            # A host slot is held until its copy to the device is done: one more keeps the disk busy meanwhile.
            host_block_slots=resident + min(ring + (1 if on_device else 0), num_blocks - resident),
            device_lookahead=lookahead,
            device_resident=spread_evenly(num_blocks, on_device_resident) if on_device_resident else frozenset(),
            device_block_slots=on_device_resident + device_ring if on_device else 0,
        ),
        demand,
    )


def _with_parts(plan: Plan, demand: Demand) -> Plan:
    """Fills in the sums; everything that the arena holds counts where compute happens."""
    on_device = plan.device_budget_bytes is not None
    computing = {
        "adapters, gradients, optimizer": demand.state_bytes,
        "embeddings, norms, other resident weights": demand.edge_bytes,
        "one block visit and the loss": int(demand.temporaries_bytes * TEMPORARIES_FACTOR),
        "inputs and hidden states of a step": demand.step_bytes,
        "block inputs kept for backward": plan.activation_host_bytes,
        "buffers for folding": demand.folding_bytes,
    }
    variants = {f"slots for perturbed weights ({plan.variant_slots})": plan.variants_bytes}
    host = {
        "process (interpreter, libraries, model skeleton)": demand.baseline_bytes,
        f"block slots ({plan.host_block_slots} x {format_bytes(plan.block_slot_bytes)})": (
            plan.host_block_slots * plan.block_slot_bytes
        ),
        f"head slots ({plan.head_slots} x {format_bytes(plan.head_slot_bytes)})": plan.head_slots
        * plan.head_slot_bytes,
        f"slots for block inputs on their way to disk ({plan.activation_slots})": (
            plan.activation_slots * plan.activation_slot_bytes
        ),
        f"buffers for optimizer state ({plan.state_slots} x {format_bytes(plan.state_slot_bytes)})": (
            plan.state_slots * plan.state_slot_bytes
        ),
        "weights and gradients of what is updated": plan.update_image_bytes + demand.update_gradients_bytes,
        "disk staging": plan.staging_bytes,
        "generated code of matrix products": demand.code_bytes,
        "adapters and their state while they are saved": demand.saving_bytes,
        "kernels of the accelerator": demand.host_libraries_bytes,
        "margin": MARGIN_BYTES,
    }
    if on_device:
        device = (
            computing
            | variants
            | {
                "workspaces of kernels": demand.device_libraries_bytes,
                f"block slots ({plan.device_block_slots} x {format_bytes(plan.block_slot_bytes)})": (
                    plan.device_block_slots * plan.block_slot_bytes
                ),
                f"head slots ({plan.device_head_slots} x {format_bytes(plan.head_slot_bytes)})": (
                    plan.device_head_slots * plan.head_slot_bytes
                ),
            }
        )
    else:
        host, device = host | computing | variants, {}
    host, device = ({k: v for k, v in parts.items() if v} for parts in (host, device))
    arena_bytes = 0 if on_device else round_up(sum(computing.values()), 2 * MIB)
    return replace(plan, host_parts=host, device_parts=device, arena_bytes=arena_bytes)


def _fits(plan: Plan, limits: Limits) -> bool:
    return plan.host_peak_bytes <= limits.host_bytes and (
        limits.device_bytes is None or plan.device_peak_bytes <= limits.device_bytes
    )


def _refuse_what_does_not_fit(plan: Plan, demand: Demand, limits: Limits) -> None:
    tiers = [("host", "--host-memory", plan.host_parts, limits.host_bytes, SPREAD_BYTES)]
    if limits.device_bytes is not None:
        tiers.append(("device", "--device-memory", plan.device_parts, limits.device_bytes, 0))
    for tier, flag, parts, budget, spread in tiers:
        need = sum(parts.values())
        if need > budget:
            lines = "\n".join(f"    {format_bytes(size):>10}  {name}" for name, size in parts.items())
            remedies = [f"raise {flag} to {-(-(need + spread) // MIB)}MiB, the smallest that works"]
            computing = demand.temporaries_bytes + demand.step_bytes
            if computing > demand.state_bytes:
                remedies.append("lower --sequence-length or --micro-batch-size")
            if demand.state_bytes > 32 * MIB:
                remedies.append("lower lora.r or name fewer lora.target_modules")
            raise PlanRefused(
                f"the run needs at least {format_bytes(need)} of {tier} memory, {flag} allows {format_bytes(budget)}:\n"
                f"{lines}\n  To make it fit: {'; or '.join(remedies)}.",
                need,
            )
