"""Transformers' callbacks around our loop: the events, arguments, state and control that they expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetune.config import Config


class Callbacks:
    """Transformers callbacks and TensorBoard; nothing of Transformers' trainer is imported when there are none."""

    def __init__(
        self,
        callbacks: Sequence[Any],
        config: Config,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        num_steps: int,
    ) -> None:
        self._handler = None
        callbacks = list(callbacks)
        if not callbacks and not config.training.report_to:
            return
        from types import SimpleNamespace

        from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

        if "tensorboard" in config.training.report_to:
            from transformers.integrations import TensorBoardCallback

            callbacks.append(TensorBoardCallback())
        self._args = SimpleNamespace(
            output_dir=str(config.output),
            logging_dir=str(config.output / "tensorboard"),
            max_steps=num_steps,
            num_train_epochs=config.training.epochs,
            learning_rate=config.learning_rate,
            seed=config.training.seed,
            to_json_string=lambda: json.dumps(
                config.model_dump(mode="json", exclude={"data", "eval_data"}), default=str
            ),
        )
        self._control = TrainerControl()
        self._state = TrainerState(max_steps=num_steps, is_world_process_zero=True, is_local_process_zero=True)
        self._handler = CallbackHandler(callbacks, model, None, optimizer, scheduler)

    @property
    def should_stop(self) -> bool:
        return self._handler is not None and self._control.should_training_stop

    @property
    def should_save(self) -> bool:
        return self._handler is not None and self._control.should_save

    def call(self, event: str, step: int | None = None) -> None:
        if self._handler is None:
            return
        if step is not None:
            self._state.global_step = step
        self._control = getattr(self._handler, event)(self._args, self._state, self._control)

    def logs(self, row: dict[str, Any], step: int) -> None:
        if self._handler is None:
            return
        self._state.epoch = row["epoch"]
        self.call("on_step_end", step)
        logs = {
            key: row[key] for key in ("loss", "learning_rate", "grad_norm", "epoch", "tokens_per_s", "stall_seconds")
        }
        self._state.log_history.append({**logs, "step": step})
        self._control = self._handler.on_log(self._args, self._state, self._control, logs)
