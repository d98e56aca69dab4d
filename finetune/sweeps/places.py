"""How many runs of a sweep step together: as many as the memory that is named holds, whichever of them these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from finetune.adapters.side_by_side import Attached
from finetune.memory.needs import Needs
from finetune.memory.plan import PlanRefused
from finetune.memory.units import format_mib
from finetune.offload.sizing.dry_run import VisitSize
from finetune.planned_run import BatchShape, PlannedRun
from finetune.session import Session
from finetune.sweeps.seats import Seat


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a run of a sweep asks for. measured: the shape of passes of an evaluation between steps, where these ask for more
    than steps do."""

    name: str
    shape: BatchShape
    measured: BatchShape | None
    visit: VisitSize
    needs: Needs  # of its adapter
    trained: Sequence[nn.Parameter]  # on the meta device
    layers: int  # modules of its adapter
    num_steps: int | None

    @classmethod
    def of(cls, name: str, seat: Seat, planned: PlannedRun, measured: BatchShape | None = None) -> Prospect:
        """planned: with the whole budget for this run, whose adapter is in place."""
        visit, shape = planned.batch.visit, planned.shape
        return cls(
            name, shape, measured, visit, seat.adapter_needs(), seat.trainable, seat.num_layers, planned.num_steps
        )

    @property
    def trained_bytes(self) -> int:
        return sum(p.nbytes for p in self.trained)


def plan_places(
    shared: Session, prospects: Sequence[Prospect], heaviest: Attached, elsewhere: bool = False
) -> tuple[int, PlannedRun]:
    """(how many of the runs step together, the plan of their steps), for the largest of them. heaviest: the adapter by which
    blocks are timed. elsewhere: as in `Session.plan`. Raises PlanRefused where not even one fits."""
    heaviest.put_on()
    bare, shared.model = shared.model, heaviest.model
    try:
        best: tuple[int, PlannedRun] | None = None
        low, high = 1, len(prospects)  # `low` is tried first, so that it is what a refusal speaks of
        count = high
        while low <= high:
            try:
                best, low = (count, _plan(shared, prospects, count, elsewhere)), count + 1
            except PlanRefused:
                if count == 1:
                    raise
                high = count - 1
            count = (low + high + 1) // 2
        return best
    finally:
        shared.model = bare


def _plan(shared: Session, prospects: Sequence[Prospect], count: int, elsewhere: bool) -> PlannedRun:
    """Of steps of the `count` runs that ask for most, each counted as if it were the largest in everything."""
    by_size = sorted(prospects, key=lambda one: -one.trained_bytes)
    setup = shared.setup
    setup.together, setup.later = ([one.needs for one in part] for part in (by_size[:count], by_size[count:]))
    setup.layers = sum(sorted((one.layers for one in prospects), reverse=True)[:count])
    shared.trainable = [p for one in by_size[:count] for p in one.trained]
    shape = _together([one.shape for one in prospects], count)
    shared.planner.know_visit(shape, _largest_visit([one.visit for one in prospects]))
    measured = [one.measured for one in prospects if one.measured is not None]
    also = _together(measured, count) if measured else None
    planned = shared.plan(shape, also, elsewhere)
    steps = [one.num_steps for one in prospects]
    return replace(planned, num_steps=None if None in steps else max(steps))


def _together(shapes: Sequence[BatchShape], count: int) -> BatchShape:
    """Of a step, or a pass, of `count` runs: the largest micro-batch, and the lanes of those that have most."""

    def most(name: str) -> int:
        return sum(sorted((getattr(shape, name) for shape in shapes), reverse=True)[:count])

    longest = max(shapes, key=lambda shape: (shape.inputs["input_ids"].shape[1], shape.rows))
    rows = max(shape.inputs["input_ids"].shape[0] for shape in shapes)
    inputs = longest.inputs | {"input_ids": longest.inputs["input_ids"][:1].expand(rows, -1)}
    return replace(
        longest, inputs=inputs, micro_batches=most("micro_batches"), forward_lanes=most("forward_lanes"),
        kept_bytes=most("kept_bytes"), packed=any(shape.packed for shape in shapes), can_wait=False,
    )  # fmt: skip


def _largest_visit(visits: Sequence[VisitSize]) -> VisitSize:
    names = ("peak_bytes", "near_bytes", "flops", "boundary_bytes", "graph_bytes", "waiting_bytes")
    most = {name: max(getattr(visit, name) for visit in visits) for name in names}
    return VisitSize(**most, graph_blocks=min(visit.graph_blocks for visit in visits))


def describe_places(count: int, prospects: Sequence[Prospect], planned: PlannedRun) -> str:
    """For the user, before the plan of a step."""
    total = len(prospects)
    if count == total:
        return f"{total} runs, which step together: a step of all of them reads the model once"
    return (
        f"{total} runs: {count} fit together, in {format_mib(planned.plan.host_peak_bytes)}, and a step of these reads the "
        "model once; the others begin, in their order, as places become free"
    )
