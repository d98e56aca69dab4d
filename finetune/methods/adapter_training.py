"""Gradients and AdamW for resident adapters. See [Note: the reference loop] in `finetune.trainer`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from finetune.adapters import peft_files as adapters
from finetune.config import Config
from finetune.data.batches import Row
from finetune.methods.base import StepResult
from finetune.methods.first_order import check_finite, lane_seed
from finetune.methods.schedule import make_scheduler
from finetune.methods.weight_decay import undecayed
from finetune.objectives.base import Objective, check_gradient
from finetune.runs.state import load_state, save_state, saved_states
from finetune.session import Session
from memory.errors import UserError


class AdapterTraining:
    """A `finetune.methods.Method`. Raises UserError when the saved state is another run's or damaged."""

    def __init__(
        self, config: Config, session: Session, objective: Objective, num_steps: int, about: dict[str, Any]
    ) -> None:
        options = config.training
        self._config = config
        check_gradient(objective, config.method)
        self._objective = objective
        self._session = session
        self._about = about
        self._trainable = {name: p for name, p in session.model.named_parameters() if p.requires_grad}
        self._parameters = list(self._trainable.values())
        left_alone = undecayed(session.model, self._trainable, options)
        groups = {options.weight_decay: [], 0.0: []}
        for name, parameter in self._trainable.items():
            groups[0.0 if name in left_alone else options.weight_decay].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for decay, group in groups.items() if group],
            lr=config.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
        )
        self._updating = False  # True as well after an update that failed half-way
        self.first_step = 0
        self.notes: list[str] = []
        if config.resume:
            self.first_step = load_state(config.output / "state", self._trainable, self.optimizer, about)
        self.scheduler = make_scheduler(options, self.optimizer, num_steps, self.first_step)

    def step(self, step: int, groups: Sequence[Sequence[Row]]) -> StepResult:
        options = self._config.training
        batches = self._objective.lanes(groups, self._session.device.torch_device)
        seeds = [lane_seed(options.seed, step, i) for i in range(len(groups))]
        loss = float(self._session.streamed.train_step(batches.inputs, batches.labels, seeds))
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, options.max_grad_norm or float("inf")))
        check_finite(step, loss, grad_norm)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self._updating = True
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise UserError(
                f"the size of step {step + 1} is beyond what fp32 holds: lower training.learning_rate, {learning_rate:g}"
            ) from error
        self._check_updated(step)
        self.scheduler.step()
        self._updating = False
        self.optimizer.zero_grad()
        return StepResult(loss, batches.tokens, learning_rate, grad_norm)

    def _check_updated(self, step: int) -> None:
        for name, parameter in self._trainable.items():
            if not bool(parameter.detach().isfinite().all()):
                raise UserError(
                    f"the update of step {step + 1} made {name} infinite or NaN: lower training.learning_rate, or raise "
                    "training.adam_epsilon"
                )

    def save(self, step: int) -> None:
        save_state(self._config.output / "state", step, self._trainable, self.optimizer, self._about)

    def rescue(self, step: int) -> str:
        folder = self._config.output / "state"
        if step and not self._updating:
            with contextlib.suppress(UserError):  # the failure that has led here may be the reason for this one
                self.save(step)
        saved = saved_states(folder)
        if not saved:
            return "No state was saved yet: start again (with --resume too, the run starts with its first step)"
        return f"The newest saved state is {saved[-1]}: go on with --resume"

    def finish(self, step: int) -> None:
        adapters.save(self._session.model, self._config.output / "adapter", self._about)

    def close(self) -> None:
        """Nothing is open."""
