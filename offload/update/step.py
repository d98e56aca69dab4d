"""One step that changes weights: what was asked for, and what is known of it so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from finetune.offload.step.engine import Engine
from finetune.offload.update.kernels import Sums
from finetune.offload.update.stream import Request
from finetune.offload.update.units import UpdateUnit


@dataclass(frozen=True, slots=True)
class Update:
    """How one step changes the weights.

    requests: by name of the unit (of experts, that of their block); units that are not in it are frozen. grad_scale: what
    gradients are multiplied by; None: they are clipped to `max_grad_norm` by this step's own norm, exactly. step: of the run,
    from 1. sums_of_all: whether `Updated.sums` have experts that the step leaves as they are.
    """

    requests: Mapping[str, Request]
    learning_rate: float  # of the step
    step: int
    grad_scale: float | None = 1.0
    max_grad_norm: float = 0.0
    sums_of_all: bool = False


@dataclass(frozen=True, slots=True)
class Updated:
    """loss: fp32 [], before the update. grad_norm: of all gradients, before clipping. sums: by name of the unit."""

    loss: torch.Tensor
    grad_norm: float
    sums: Mapping[str, Sums]


@dataclass(slots=True)
class Step:
    """What is going on between the begin of a step and its end."""

    update: Update  # what was asked for
    engine: Engine  # whose order of visits is that of the last forward
    measures_norm: bool = False  # and nothing else: gradients are dropped
    norms: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # by fqn, of each of its chunks
    sums: dict[str, Sums] = field(default_factory=dict)  # by name of the unit

    @property
    def exact(self) -> bool:
        """Whether gradients wait for the norm of all of them."""
        return self.update.grad_scale is None

    def request(self, unit: UpdateUnit) -> Request | None:
        return self.update.requests.get(unit.name)

    def requests(self, units: Iterable[UpdateUnit]) -> list[Request]:
        return [self.update.requests[unit.name] for unit in units if unit.name in self.update.requests]

    def count(self, unit: UpdateUnit, gradients: Mapping[str, torch.Tensor]) -> None:
        for name, grad in gradients.items():
            self.norms.setdefault(unit.fqns[name], []).append(torch.linalg.vector_norm(grad))

    def add_sums(self, name: str, sums: Sums) -> None:
        """Of a part of the unit of this name."""
        before = self.sums.get(name, Sums(0.0, 0.0))
        self.sums[name] = Sums(before.change_sq + sums.change_sq, before.weight_sq + sums.weight_sq)
