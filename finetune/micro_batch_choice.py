"""`training.micro_batch_size: auto`: how many rows compute together.

More rows make products larger and calls fewer. They also take memory, in which blocks or graphs would stay, and are padded to
the longest of them. Of the sizes that fit, the smallest is chosen whose predicted step is as fast as the fastest, or nearly.

[Note: the same choice again]
Nothing is measured for it: visits are counted at the rates that `finetune bench` has kept or, without these, at those of a
machine that comes with the package. So the same configuration, data and budget give the same choice. A run records it and goes
on with it, because other sizes round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from finetune.config import Config
from finetune.data.batches import BatchPlan
from finetune.machines.profiles import find_machine
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.memory.units import format_seconds
from finetune.objectives.base import objective_class
from finetune.objectives.router_loss import RouterLoss
from finetune.offload.devices import DescribedDevice
from finetune.planned_run import BatchShape, PlannedRun
from finetune.prediction import count_step, described_device
from finetune.session import Session

WORTH = 1.02  # times the fastest step: a smaller micro-batch whose step takes no longer needs less memory
REFERENCE_MACHINE = "rtx4060-32gb-gen4"  # whose rates count where `finetune bench` has not been run
PADDED_STEPS = 64  # of which padding is counted


@dataclass(frozen=True, slots=True)
class MicroBatchChoice:
    size: int  # rows that compute together
    seconds: Mapping[int, float | None] = field(default_factory=dict)  # of a step, by size; None: it does not fit
    rates: str = ""  # whose they are, in words

    @property
    def words(self) -> str:
        """For the user, a line."""
        if not self.rates:
            return f"micro-batches of {self.size}, as when the run began"
        found = ", ".join(
            f"{size}: {'does not fit' if seconds is None else format_seconds(seconds)}"
            for size, seconds in self.seconds.items()
        )
        return f"micro-batches of {self.size}: steps predicted by rows that compute together, at {self.rates}: {found}"


def with_micro_batch_size(config: Config, size: int) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": size})})


def with_least_rows(config: Config) -> Config:
    """With the smallest micro-batches that it can have."""
    return with_micro_batch_size(config, config.training.least_micro_batch_size)


def refuse_tensors(config: Config) -> None:
    """Raises UserError for what is not done with rows of tensors."""
    if config.dataset.probabilities or config.dataset.streaming:
        key = "probabilities" if config.dataset.probabilities else "streaming"
        raise UserError(f"dataset.{key}: expected rows of text, found rows of tensors: leave it out")
    if config.training.micro_batch_size == "auto":
        raise UserError(
            "training.micro_batch_size: expected a number, because steps over rows of tensors are not predicted, found auto"
        )


def settle_full_steps(config: Config, session: Session) -> tuple[Config, MicroBatchChoice | None]:
    """`config` with a number, for steps whose rows are as long as they may be, before there is data. The run may be on another
    machine. Raises as `choose_micro_batch_size`."""
    if config.training.micro_batch_size != "auto":
        return config, None
    kind = objective_class(config)

    def shape(size: int) -> BatchShape:
        return kind.full_shape(with_micro_batch_size(config, size), session, config.dataset.sequence_length)

    rows = shape(config.training.batch_size).inputs["input_ids"].shape[0]
    choice = choose_micro_batch_size(session, rows, lambda size: session.plan(shape(size), elsewhere=True))
    return with_micro_batch_size(config, choice.size), choice


def choose_micro_batch_size(
    session: Session, rows: int, plan: Callable[[int], PlannedRun], padding: Callable[[int], float] = lambda size: 1.0
) -> MicroBatchChoice:
    """rows: of a step. plan: of a run with micro-batches of so many rows. padding: how many times as much they compute.

    Raises UserError where the size would change what a step makes small, PlanRefused when micro-batches of one row do not fit.
    """
    _check_routers(session)
    device, rates = _counted_device(session)
    seconds: dict[int, float | None] = {}
    for size in sizes(rows):
        try:
            planned = plan(size)
        except PlanRefused:
            if not seconds:
                raise
            seconds[size] = None  # and larger ones neither
            break
        seconds[size] = count_step(session, planned, device, padding(size)).seconds
    fitting = {size: found for size, found in seconds.items() if found is not None}
    enough = WORTH * min(fitting.values())
    return MicroBatchChoice(next(size for size, found in fitting.items() if found <= enough), seconds, rates)


def sizes(rows: int) -> list[int]:
    """That cut so many rows into ever fewer, nearly equal parts."""
    found, parts = {rows}, rows
    while parts > 1:
        found.add(-(-rows // parts))
        parts = -(-parts // 2)
    return sorted(found)


def padding_of(batches: BatchPlan) -> Callable[[int], float]:
    """How many tokens steps have with padding, relative to micro-batches of one row; counted over the first steps."""
    steps = [
        np.array([batches.lengths[list(row)].sum() for group in batches.step(index) for row in group])
        for index in range(min(PADDED_STEPS, batches.num_steps))
    ]

    def padding(size: int) -> float:
        padded = sum(
            lengths[start] * len(lengths[start : start + size])  # rows come longest first
            for lengths in steps
            for start in range(0, len(lengths), size)
        )
        return float(padded / sum(lengths.sum() for lengths in steps))

    return padding


def _check_routers(session: Session) -> None:
    config = session.config
    if config.objective == "loss" and RouterLoss(config.training, session.parts.model).is_of_micro_batches:
        raise UserError(
            "training.micro_batch_size: expected a number, because the routers' loss is one over each micro-batch, found auto: "
            "set training.router_loss to global_batch, or give a number"
        )


def _counted_device(session: Session) -> tuple[DescribedDevice, str]:
    """By whose rates visits are counted, and these in words."""
    device = described_device(session)
    if device is not None:
        here = session.machine is None
        return device, "the rates that finetune bench has measured here" if here else f"the rates of {device.machine.name}"
    kind = "cpu" if session.device.traits.computes_on_host else "cuda"
    words = f"the rates of {REFERENCE_MACHINE}, because finetune bench has not measured this machine"
    return DescribedDevice(kind, find_machine(REFERENCE_MACHINE)), words
