"""Gradients for the model's own weights, all of them or some at a time, with the optimizer out of core.

See [Note: the reference loop] in `finetune.trainer` for the gradients, and `finetune.offload.update.rules` for the arithmetic
of the optimizer. Every step is committed to the working store, which is the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from finetune.config import Config
from finetune.data.batches import Row
from finetune.memory.errors import UserError
from finetune.memory.needs import Needs
from finetune.methods.base import Method, StepResult
from finetune.methods.first_order import check_finite, lane_seed
from finetune.methods.rounding import check_stochastic_rounding
from finetune.methods.schedule import make_scheduler
from finetune.methods.selection import make_selection
from finetune.methods.stored_weights import StoredWeights, export_stored, has_store
from finetune.methods.weight_decay import undecayed
from finetune.methods.weight_needs import (
    make_keeping,
    make_rule,
    store_size,
    streamed_with_tables,
    streams_experts,
    trained_weight_needs,
)
from finetune.objectives.base import Objective, check_gradient
from finetune.objectives.errors import StepNotKept
from finetune.offload.devices import DescribedDevice, Device
from finetune.offload.residency.io import IOFailure
from finetune.offload.sizing.kernel_timing import update_seconds
from finetune.offload.sizing.needs import Streamed
from finetune.offload.step.weights import Weights
from finetune.offload.streamed_model import StreamedModel
from finetune.offload.update.expert_units import stack_of
from finetune.offload.update.parts import TrainedParts, find_trained
from finetune.offload.update.rules.rule import Rule
from finetune.offload.update.rules.signs import SignSgd
from finetune.offload.update.step import Update
from finetune.offload.update.stream import Request
from finetune.offload.update.trained_weights import StoreOptions, TrainedWeights, clip_scale
from finetune.offload.update.units import UpdateUnit
from finetune.offload.weights.streamed_parts import Room
from finetune.planned_run import MeasuredBatch, StoreSize
from finetune.runs.exports import Export
from finetune.runs.identity import check_same_run
from finetune.session import Session


class WeightTraining(Method):
    """The working store holds what it has trained. trained: what of the model that is, once a session has prepared it."""

    frozen = False

    trained: TrainedParts

    def cut_options(self) -> dict[str, Any]:
        return {"trains_weights": True, "streams_experts": streams_experts(self.config)}

    def prepare(self, session: Session) -> None:
        self.trained = find_trained(session.parts, self.config.train)
        if self.config.optimizer.master == "none":
            check_stochastic_rounding(session.parts, self.trained.fqns, "optimizer.master none", "float32")
        for binding in session.parts.bindings:
            binding.convert_at_bind()
        for stack in self.trained.stacks:
            stack.matrices.trained = True  # for what is measured; each step then says which ones it trains

    @property
    def gradient_names(self) -> list[frozenset[str]]:
        return [frozenset(unit.fqns) for unit in self.trained.blocks]

    @property
    def store(self) -> StoreSize:
        return store_size(self.config, self.trained)

    def needs(self, session: Session, batch: MeasuredBatch, streamed: Streamed) -> tuple[Needs, Streamed]:
        streamed = streamed_with_tables(streamed, self.trained)
        needs = trained_weight_needs(self.config, session.parts, self.trained, batch, streamed, session.on_device)
        return needs, streamed

    def weight_seconds(self, session: Session, device: Device) -> float:
        if isinstance(device, DescribedDevice):
            rates = device.machine.host.updated_elements_per_second
            rate = rates.get(self.config.optimizer.name, rates.get("adamw"))
            return 1 / rate if rate else 0.0
        unit = next(unit for unit in self.trained.units if unit.fqns)
        stored = unit.layout.views[next(iter(unit.fqns))].dtype
        rule = make_rule(self.config, of_blocks=True)
        return update_seconds(rule, make_keeping(self.config), stored, session.parts.dtype)

    def open_weights(self, session: Session) -> Callable[[Room], Weights]:
        config = self.config
        store = StoreOptions(config.output / "store", self.about, config.resume, config.optimizer.versions)
        return partial(
            TrainedWeights, trained=self.trained, store=store, keeping=make_keeping(config), seed=config.training.seed
        )

    def begin(self, session: Session, objective: Objective) -> list[str]:
        config, trained = self.config, self.trained
        self._session = session
        check_gradient(objective, config.method)
        self._objective = objective
        self._model: StreamedModel = session.streamed
        self._weights: TrainedWeights = self._model.weights
        store = self._weights.store
        check_same_run(store.directory, store.about, self.about)
        self._rule, self._block_rule = make_rule(config), make_rule(config, of_blocks=True)
        self._signs = SignSgd(weight_decay=config.training.weight_decay)
        self._selection = make_selection(config, len(trained.blocks), self._weights.resident_blocks)
        self._selection.restore(store.notes)
        self._undecayed = undecayed(session.model, trained.fqns, config.training)
        self._ends = [unit for unit in trained.ends if unit.fqns] if self._selection.ends else []
        self.first_step = store.step
        # Schedules are written for optimizers: this one holds the learning rate and nothing else.
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
        self.scheduler = make_scheduler(config.training, self.optimizer, self.num_steps, self.first_step)
        return []

    @property
    def may_stop_inside(self) -> bool:
        return self.config.optimizer.versions > 1  # of one, what is written in a step is lost with it

    def step(self, step: int, groups: Sequence[Sequence[Row]]) -> StepResult:
        options = self.config.training
        batches = self._objective.lanes(groups, self._session.device.torch_device)
        seeds = [lane_seed(options.seed, step, i) for i in range(len(batches.inputs))]
        learning_rate = self.optimizer.param_groups[0]["lr"]
        max_norm = options.max_grad_norm or 0.0
        requests = self._requests(step)
        if not self._selection.keeps_state:
            self._forget_state(requests)
        try:
            scale: float | None = 1.0
            if max_norm and self.config.optimizer.clipping == "exact":
                scale = None
            elif max_norm:
                norm = self._weights.store.notes.get("grad_norm")
                if norm is None:
                    # Unclipped, a first gradient that is large would stay in the second moments for hundreds of steps.
                    norm = self._weights.gradient_norm(self._model, batches.inputs, batches.labels, seeds, requests)
                    if not isfinite(norm):
                        raise StepNotKept(
                            f"the gradients of the first step have norm {norm}: with engine.dtype float16 use bfloat16, else "
                            "look for a faulty weight"
                        )
                scale = clip_scale(norm, max_norm)
            update = Update(requests, learning_rate, step + 1, scale, max_norm, self._selection.observes)
            updated = self._weights.update_step(self._model, batches.inputs, batches.labels, seeds, update)
            check_finite(step, float(updated.loss), updated.grad_norm)
            for name, sums in updated.sums.items():
                if not all(map(isfinite, sums)):
                    raise StepNotKept(
                        f"the change of {name} in step {step + 1} is not finite, so the step is not kept: lower "
                        "training.learning_rate"
                    )
            index = {unit.name: i for i, unit in enumerate(self._weights.trained.blocks)}
            self._selection.observe({index[name]: tuple(s) for name, s in updated.sums.items() if name in index})
            self._weights.commit(step + 1, {"grad_norm": updated.grad_norm} | self._selection.notes())
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the accelerator ran out of memory ({' '.join(str(error).split())}). Raise --device-memory, or lower "
                f"--sequence-length. {self._weights.store.how_to_go_on}"
            ) from error
        except IOFailure as error:
            raise UserError(f"{error}. Mend the disk, or make room. {self._weights.store.how_to_go_on}") from error
        self.optimizer.step()
        self.scheduler.step()
        return StepResult(float(updated.loss), batches.tokens, learning_rate, updated.grad_norm, self._objective.logged())

    def save(self, step: int) -> None:
        """Every step is durable already."""

    def rescue(self, step: int) -> str:
        return self._weights.store.how_to_go_on

    @classmethod
    def tuned_weights(cls, config: Config, run: Path) -> StoredWeights | None:
        return StoredWeights(config, run) if has_store(run) else None

    @classmethod
    def export(cls, job: Export) -> int | None:
        return export_stored(job) if has_store(job.config.output) else None

    def _requests(self, step: int) -> dict[str, Request]:
        chosen = set(self._selection.blocks(step))
        requests = {}
        for index, unit in enumerate(self._weights.trained.blocks):
            if not self.trained.trains(index):
                continue
            if index in chosen:
                requests[unit.name] = self._request(unit, self._block_rule, self._selection.importance(index))
            elif self._selection.sign_scale is not None:
                requests[unit.name] = self._request(unit, self._signs, self._selection.sign_scale)
        for unit in self._ends:
            requests[unit.name] = self._request(unit, self._rule)
        return requests

    def _request(self, unit: UpdateUnit, rule: Rule, scale: float = 1.0) -> Request:
        return Request(unit, frozenset(unit.fqns), rule, scale, self._undecayed)

    def _forget_state(self, requests: dict[str, Request]) -> None:
        store, homes = self._weights.store, self.trained.homes
        for key, piece in list(store.pieces.items()):
            home = homes.get(stack_of(key[0]), key[0])
            if piece.state_bytes and (home not in requests or not requests[home].rule.keeps_state):
                store.drop_state(key)
