"""Gradients and AdamW for resident adapters. See [Note: the reference loop] in `finetune.trainer`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from finetune.adapters import peft_files as adapters
from finetune.adapters.residual import initials, read_initial, write_initial
from finetune.data.batches import Row
from finetune.data.micro_batches import MicroBatches
from finetune.memory.errors import UserError
from finetune.memory.needs import Needs
from finetune.methods.base import Method, StepResult
from finetune.methods.first_order import check_finite, lane_seed
from finetune.methods.schedule import make_scheduler
from finetune.methods.weight_decay import undecayed
from finetune.needs_of_model import trained_adapter_needs
from finetune.objectives.base import Objective, check_gradient
from finetune.offload.sizing.needs import Streamed
from finetune.planned_run import MeasuredBatch
from finetune.runs.state import load_state, save_state, saved_states
from finetune.session import Session


class AdapterTraining(Method):
    """State directories hold the adapter with its moments."""

    def needs(self, session: Session, batch: MeasuredBatch, streamed: Streamed) -> tuple[Needs, Streamed]:
        return trained_adapter_needs(session, batch.shape.micro_batches), streamed

    def opened(self, session: Session) -> None:
        if session.adapter.needs_first_visit:
            session.streamed.visit_modules(session.adapter.first_visit)

    def begin(self, session: Session, objective: Objective) -> list[str]:
        config, options = self.config, self.config.training
        check_gradient(objective, config.method)
        self._objective = objective
        self._session = session
        self._trainable = {name: p for name, p in session.model.named_parameters() if p.requires_grad}
        self._parameters = list(self._trainable.values())
        left_alone = undecayed(session.model, self._trainable, options)
        rates = session.adapter.own_rates(config)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by decay and learning rate; those of the run come first
        for decay in (options.weight_decay, 0.0):
            groups[decay, config.learning_rate] = []
        for name, parameter in self._trainable.items():
            decay = 0.0 if name in left_alone else options.weight_decay
            groups.setdefault((decay, rates.get(name, config.learning_rate)), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay, "lr": rate} for (decay, rate), group in groups.items() if group],
            lr=config.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
        )
        self._updating = False  # True as well after an update that failed half-way
        self.first_step = 0
        if config.resume:
            set_more = session.adapter.set_state
            self.first_step = load_state(config.output / "state", self._trainable, self.optimizer, self.about, set_more)
        # Made by the first update, as PyTorch does, they would lie between gradients, in whose places nothing larger fits then.
        for parameter in self._parameters:
            if not self.optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        if initials(session.model):
            (read_initial if self.first_step else write_initial)(session.model, config.output)
        self.scheduler = make_scheduler(options, self.optimizer, self.num_steps, self.first_step)
        return []

    def watch(self, before_update: Callable[[], None], after_update: Callable[[], None]) -> None:
        self.optimizer.register_step_pre_hook(lambda *_: before_update())
        super().watch(before_update, after_update)

    def step(self, step: int, groups: Sequence[Sequence[Row]]) -> StepResult:
        rate, lanes, tokens = self.optimizer.param_groups[0]["lr"], 0, 0
        losses, norms = [], []
        for batches in self._objective.updates(self._session, step, groups):
            seeds = [lane_seed(self.config.training.seed, step, lanes + i) for i in range(len(batches.inputs))]
            loss, norm = self._update(step, batches, seeds)
            lanes, tokens = lanes + len(seeds), tokens + batches.tokens
            losses.append(loss)
            norms.append(norm)
        self.scheduler.step()
        self._updating = False
        count = len(losses)
        return StepResult(sum(losses) / count, tokens, rate, sum(norms) / count, self._objective.logged())

    def _update(self, step: int, batches: MicroBatches, seeds: Sequence[int]) -> tuple[float, float]:
        """(loss, norm of the gradients) of one update."""
        options = self.config.training
        adapter = self._session.adapter
        adapter.begin_step()
        own = adapter.own_loss()
        loss = self._session.streamed.train_step(batches.inputs, batches.labels, seeds, batches.versions)
        adapter.after_backward()
        loss = float(loss if own is None else loss + own)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, options.max_grad_norm or float("inf")))
        check_finite(step, loss, grad_norm)
        self._updating = True
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            rate = self.optimizer.param_groups[0]["lr"]
            raise UserError(
                f"the size of step {step + 1} is beyond what fp32 holds: lower training.learning_rate, {rate:g}"
            ) from error
        adapter.after_update(step)
        self._check_updated(step)
        self.optimizer.zero_grad()
        return loss, grad_norm

    def _check_updated(self, step: int) -> None:
        for name, parameter in self._trainable.items():
            if not bool(parameter.detach().isfinite().all()):
                raise UserError(
                    f"the update of step {step + 1} made {name} infinite or NaN: lower training.learning_rate, or raise "
                    "training.adam_epsilon"
                )

    def save(self, step: int) -> None:
        more = self._session.adapter.state()
        save_state(
            self.config.output / "state", step, self._trainable, self.optimizer, self.about, more,
            keep=self.config.training.kept_states,
        )  # fmt: skip

    def rescue(self, step: int) -> str:
        folder = self.config.output / "state"
        if step and not self._updating:
            with contextlib.suppress(UserError):  # the failure that has led here may be the reason for this one
                self.save(step)
        saved = saved_states(folder)
        if not saved:
            return "No state was saved yet: start again (with --resume too, the run starts with its first step)"
        return f"The newest saved state is {saved[-1]}: go on with --resume"

    def write_adapter(self, directory: Path, step: int) -> None:
        adapters.save(self._session.model, directory, self.about | {"step": step})
