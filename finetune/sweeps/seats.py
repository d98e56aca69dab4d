"""The sessions of a sweep: one over the base that all runs share, and for each run one that has its adapter on that base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from finetune.adapters.base import adapter_of
from finetune.adapters.lora_sums import sum_in_one_pass
from finetune.adapters.side_by_side import SideBySide, SideBySideWeights
from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.needs import Item, Needs, Tier
from finetune.methods.base import Method
from finetune.needs_of_model import trained_adapter_needs
from finetune.offload.sizing.dry_run import VisitSize
from finetune.offload.sizing.needs import Streamed
from finetune.offload.step.weights import Weights
from finetune.offload.weights.parts import ModelParts
from finetune.offload.weights.streamed_parts import Room
from finetune.planned_run import MeasuredBatch
from finetune.planner import Planner
from finetune.session import Session
from finetune.setup import Setup

LAYER_BYTES = 4096
"""Of one module of an adapter: Python's objects, beside its numbers."""


class SharedBase(Setup):
    """The base of all runs, planned for those that step together.

    together: what the adapter of each of these asks for. later: the same of those that come after them. layers: modules of the
    adapters of all that step together.
    """

    has_gradients = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.together: Sequence[Needs] = ()
        self.later: Sequence[Needs] = ()
        self.layers = 0
        self.visits: dict[str, dict[Any, VisitSize]] = {}  # of adapters with the same options, which differ in values only

    def wrap(self, parts: ModelParts) -> tuple[nn.Module, ModelParts]:
        self.adapters = SideBySide(parts.model)
        return parts.model, parts

    def needs(self, session: Session, batch: MeasuredBatch, streamed: Streamed) -> tuple[Needs, Streamed]:
        needs = Needs.of(Item("layers of adapters", LAYER_BYTES * self.layers, Tier.HOST))
        for one in self.together:
            needs += one
        for one in self.later:
            needs += Needs.of(*(item for item in one.items if item.tier is Tier.DISK))
        return needs, streamed

    def set_mode(self, model: nn.Module, training: bool) -> None:
        model.train(training)

    def open_weights(self, session: Session) -> Callable[[Room], Weights]:
        return partial(SideBySideWeights, adapters=self.adapters)


class Seat(Session):
    """A run's session over the base of another one, `shared`, which opens and closes the model.

    attached: the run's adapter, which is in its place whenever the run's code runs.
    """

    def __init__(self, shared: Session, method: Method, only_plan: bool = False) -> None:
        """only_plan: nothing of the run will be computed, so that its adapter needs no values. Raises UserError for an adapter
        that cannot share the base."""
        self.config = method.config
        self.setup = method
        self.process_bytes = None
        method.only_plan = only_plan
        self.base, self.machine, self.device, self.parts = shared.base, shared.machine, shared.device, shared.parts
        self.arena, self.streamed = shared.arena, None
        self.attached = shared.setup.adapters.attach(lambda: self._wrap(method))
        self.model = self.attached.model
        self.adapter = adapter_of(self.model)
        self.trainable = self.adapter_parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.adapter_buffers = []
        self._check_shares()
        method.prepare(self)
        read = self.adapter.reads_weights
        for binding in self.parts.bindings:
            binding.convert_at_bind(read)
        self.set_training(True)
        self.planner = Planner(self, shared.setup.visits.setdefault(repr(self.config.lora), {}))

    def _wrap(self, method: Method) -> nn.Module:
        model, parts = method.wrap(self.parts)
        if parts is not self.parts:
            raise UserError("lora.init_lora_weights: runs of a sweep share the base as it is, and this one would change it")
        if self.device.traits.computes_on_host:
            sum_in_one_pass(model)
        return model

    def _check_shares(self) -> None:
        outside = self.attached.outside_of(self.parts.blocks)
        if outside or self.config.lora.target_parameters:
            found = outside[0] if outside else "lora.target_parameters"
            raise UserError(
                f"the runs of a sweep share one read of the model: expected adapters of linear layers inside its blocks, found "
                f"one of {found}: leave it out of lora's targets, or start this run by itself"
            )

    def adapter_needs(self) -> Needs:
        """While its adapter is in place."""
        return trained_adapter_needs(self, micro_batches=1)  # LoRA shares nothing between blocks

    @property
    def num_layers(self) -> int:
        """Modules of its adapter."""
        return sum(1 for _, _, _, layer in self.attached.places for _ in layer.modules())

    @property
    def notes(self) -> list[str]:
        """What the user should know of this run; the shared session's are said once."""
        return [f"note: {note}" for note in self.setup.notes]

    def set_training(self, training: bool) -> None:
        super().set_training(training)
        self.attached.note_mode()

    def move_in(self) -> None:
        """The shared model is open: the adapter moves to where it computes."""
        shared = {module for _, _, own, _ in self.attached.places for module in own.modules()}
        layers = (layer for _, _, _, layer in self.attached.places)
        self._move_in(module for layer in layers for module in layer.modules() if module not in shared)
