"""Transformers' callbacks around our loop: the events, arguments, state and control that its Trainer gives them.

Their events come in its order: on_step_end, then on_log, on_evaluate and on_save as `control` asks for them, which
Transformers' own DefaultFlowCallback sets first and others may change; an epoch's end likewise. on_optimizer_step follows an
update; on_pre_optimizer_step comes where gradients are there together, with LoRA. What a resumed run must know of the steps
before is in the rows of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from finetune.config import Config
from finetune.data import BatchPlan
from finetune.memory.errors import UserError
from finetune.methods.base import Method
from finetune.offload.devices import Device
from finetune.reporting.report import METRIC_KEYS
from finetune.runs.best import BestStep, best_directory
from finetune.session import Session

if TYPE_CHECKING:
    from transformers import TrainingArguments

CALLBACK_STATE = "callback_state"
"""Key of a row of metrics: what callbacks that export a state had as theirs after this step."""


@dataclass(slots=True)
class _Control:
    """Transformers' TrainerControl, where there are no callbacks."""

    should_training_stop: bool = False  # the run ends after this step
    should_epoch_stop: bool = False  # no epoch of ours can
    should_evaluate: bool = False  # after this step
    should_save: bool = False  # after this step


class Callbacks:
    """Transformers callbacks, those of `training.report_to` among them; nothing of its trainer is imported when there are none.

    rows: of the steps that earlier processes have done. best: the best step, in these too.

    Raises UserError when a callback cannot serve the run.
    """

    def __init__(
        self, callbacks: Sequence[Any], config: Config, session: Session, method: Method, batches: BatchPlan,
        rows: Iterable[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        self.best = BestStep(config.training)
        self._config = config
        self._handler: Any = None
        self._control: Any = _Control()
        self._in_epoch = False
        if not callbacks and not config.training.report_to:
            self.best.take_rows(rows)
            return
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState

        reporters = _reporters(config)
        self._control = TrainerControl()
        self._args = training_arguments(config, batches.num_steps, session.device)
        self._state = TrainerState(
            max_steps=batches.num_steps, num_train_epochs=ceil(batches.epoch(batches.num_steps)), logging_steps=1,
            eval_steps=self._args.eval_steps, save_steps=self._args.save_steps,
            train_batch_size=config.training.micro_batch_size,
        )  # fmt: skip
        self._handler = CallbackHandler(
            [DefaultFlowCallback(), *reporters, *callbacks], session.model, None, method.optimizer, method.scheduler
        )
        self._resume(rows)
        method.watch(lambda: self._call("on_pre_optimizer_step"), lambda: self._call("on_optimizer_step"))
        try:
            self._call("on_init_end")
            self._call("on_train_begin")
        except AssertionError as error:  # Transformers' own ask so for what they need
            raise UserError(
                f"a callback cannot serve this run: {error}. training.eval_steps and eval_data give it evaluations"
            ) from error

    @property
    def should_stop(self) -> bool:
        return self._control.should_training_stop or self.best.should_stop

    @property
    def should_end_epoch(self) -> bool:
        return self._control.should_epoch_stop

    @property
    def should_evaluate(self) -> bool:
        """Raises UserError when a callback asks for what there is no data for."""
        if self._control.should_evaluate and self._config.eval_data is None:
            raise UserError("a callback asked for an evaluation (should_evaluate): expected eval_data, found none")
        return self._control.should_evaluate

    @property
    def should_save(self) -> bool:
        return self._control.should_save

    def step_begin(self) -> None:
        if self._handler is not None:
            if not self._in_epoch:
                self._in_epoch = True
                self._call("on_epoch_begin")
            self._call("on_step_begin")

    def step_end(self, row: Mapping[str, Any]) -> None:
        """row: of metrics. Sets what should be done now."""
        step, options = row["step"], self._config.training
        if self._handler is None:
            self._control.should_evaluate = self._is_due(options.eval_steps, step) and self._config.eval_data is not None
            self._control.should_save = self._is_due(options.save_steps, step)
            return
        self._state.global_step, self._state.epoch = step, row["epoch"]
        self._state.num_input_tokens_seen += row["tokens"]
        self._call("on_step_end")
        if self._control.should_log:
            self._log(_training_logs(row))

    def epoch_end(self) -> None:
        """Also where training ends within an epoch. Sets what should be done now."""
        if self._handler is not None and self._in_epoch:
            self._in_epoch = False
            self._call("on_epoch_end")
        else:
            options = self._config.training
            self._control.should_evaluate = options.eval_steps == "epoch" and self._config.eval_data is not None
            self._control.should_save = options.save_steps == "epoch"

    def resumed(self, row: Mapping[str, Any], ends_epoch: bool) -> None:
        """row: of metrics, of the step that the run goes on from, the last of an epoch or not. Sets whether it lacks an
        evaluation."""
        steps = self._config.training.eval_steps
        is_due = ends_epoch if steps == "epoch" else self._is_due(steps, row["step"])
        is_done = any(key.startswith("eval_") for key in row)
        self._control.should_evaluate = is_due and not is_done and self._config.eval_data is not None

    @staticmethod
    def _is_due(steps: int | str | None, step: int) -> bool:
        return isinstance(steps, int) and step % steps == 0

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """metrics: "eval_loss" and the like."""
        self._control.should_evaluate = False
        if self._handler is not None:
            logs = dict(metrics)
            self._log(logs)
            self._call("on_evaluate", logs)
            self._show_best()

    def saved(self) -> None:
        self._control.should_save = False
        self._call("on_save")

    def train_end(self, training_loss: float, seconds: float) -> None:
        if self._handler is not None:
            self._log({"train_runtime": seconds, "train_loss": training_loss})
            self._call("on_train_end")

    def exported(self) -> dict[str, list[dict[str, Any]]]:
        """Name of a class -> what its callbacks want to know again in a resumed run."""
        found: dict[str, list[dict[str, Any]]] = {}
        for callback in self._stateful():
            found.setdefault(type(callback).__name__, []).append(dict(callback.state()["attributes"]))
        return found

    def _call(self, event: str, *more: Any) -> None:
        if self._handler is not None:
            self._control = getattr(self._handler, event)(self._args, self._state, self._control, *more)

    def _log(self, logs: dict[str, Any]) -> None:
        logs["epoch"] = self._state.epoch
        self._state.log_history.append({**logs, "step": self._state.global_step})
        self._call("on_log", logs)

    def _show_best(self) -> None:
        if self.best.step:
            self._state.best_metric, self._state.best_global_step = self.best.value, self.best.step
            if self._config.training.load_best_model_at_end:
                self._state.best_model_checkpoint = str(best_directory(self._config.output, self.best.step))

    def _resume(self, rows: Iterable[Mapping[str, Any]]) -> None:
        exported: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            self._state.global_step, self._state.epoch = row["step"], row["epoch"]
            self._state.num_input_tokens_seen += row["tokens"]
            measured = {key: value for key, value in row.items() if key.startswith("eval_")}
            for logs in (_training_logs(row), measured):
                if logs:
                    self._state.log_history.append({**logs, "epoch": row["epoch"], "step": row["step"]})
            self.best.take(row["step"], measured)
            exported = row.get(CALLBACK_STATE, exported)
        self._show_best()
        waiting = {name: list(states) for name, states in exported.items()}
        for callback in self._stateful():
            if states := waiting.get(type(callback).__name__):
                for name, value in states.pop(0).items():
                    setattr(callback, name, value)

    def _stateful(self) -> list[Any]:
        if self._handler is None:
            return []
        from transformers.trainer_callback import ExportableState

        return [callback for callback in self._handler.callbacks if isinstance(callback, ExportableState)]


def training_arguments(config: Config, num_steps: int, device: Device) -> TrainingArguments:
    """Transformers' arguments that say of a run what `config` says. No device is claimed for them, nothing is written."""
    from transformers import TrainingArguments

    class Arguments(TrainingArguments):
        @property
        def _setup_devices(self) -> torch.device:
            self.distributed_state, self._n_gpu = None, int(not device.traits.computes_on_host)
            return device.torch_device

    options = config.training
    evaluation = _when(options.eval_steps if config.eval_data is not None else None)
    saving = _when(options.save_steps)
    return Arguments(
        output_dir=str(config.output), seed=options.seed, max_steps=num_steps, num_train_epochs=options.epochs,
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=ceil(options.batch_size / options.micro_batch_size),
        learning_rate=config.learning_rate, lr_scheduler_type=options.lr_scheduler,
        lr_scheduler_kwargs=dict(options.lr_scheduler_kwargs), warmup_steps=options.warmup_steps or options.warmup_ratio,
        weight_decay=options.weight_decay, adam_beta1=options.adam_beta1, adam_beta2=options.adam_beta2,
        adam_epsilon=options.adam_epsilon, max_grad_norm=options.max_grad_norm or 0.0,
        logging_strategy="steps", logging_steps=1, save_strategy=saving[0], save_steps=saving[1] or 500,
        save_total_limit=options.save_total_limit, eval_strategy=evaluation[0], eval_steps=evaluation[1],
        metric_for_best_model=options.best_metric, greater_is_better=options.best_is_greater,
        report_to=list(options.report_to), use_cpu=device.traits.computes_on_host, do_train=True,
    )  # fmt: skip


def _when(steps: int | str | None) -> tuple[str, int | None]:
    """Transformers' strategy, and steps."""
    return ("no", None) if steps is None else (steps, None) if isinstance(steps, str) else ("steps", steps)


def _reporters(config: Config) -> list[Any]:
    """Transformers' own callbacks for `training.report_to`. Raises UserError for one that cannot begin."""
    from transformers.integrations import get_reporting_integration_callbacks

    reporters = []
    for kind in get_reporting_integration_callbacks(config.training.report_to):
        try:
            reporters.append(kind())
        except (RuntimeError, ImportError) as error:
            raise UserError(f"training.report_to: {error}") from error
        if hasattr(reporters[-1], "tb_writer"):
            reporters[-1].logging_dir = reporters[-1].logging_dir or str(config.output / "tensorboard")
    return reporters


def _training_logs(row: Mapping[str, Any]) -> dict[str, Any]:
    logged = [key for key in row if key not in METRIC_KEYS and key != CALLBACK_STATE and not key.startswith("eval_")]
    return {key: row[key] for key in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "stall_seconds", *logged)}
