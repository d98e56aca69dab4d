"""What a user calls: from a configuration and its data to a plan, a finished run, an evaluation, a model.

[Note: the reference loop]
For every step, in plain PyTorch with everything resident, the same bits come from:
    for index, batch in enumerate(micro_batches):
        torch.manual_seed(lane_seed(seed, step, index))
        loss = cross_entropy(model(batch), reduction="sum") / labelled_tokens_of_the_step
        loss.backward()
    clip_grad_norm_(trainable, max_grad_norm); optimizer.step(); scheduler.step(); optimizer.zero_grad()
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.merging import can_merge
from finetune.config import Config
from finetune.config.loading import expand_shorthands, merge
from finetune.data.image_rows import open_samples
from finetune.data.options import with_splits
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.memory.arena import trim_malloc
from finetune.memory.errors import UserError
from finetune.memory.meter import MemoryMeter
from finetune.memory.trace import Trace
from finetune.methods.base import Method, make_method
from finetune.micro_batch_choice import refuse_tensors, settle_full_steps, with_least_rows
from finetune.nearest_plans import Knobs, nearest_named
from finetune.objectives.base import make_objective, objective_class
from finetune.offload.devices import DescribedDevice
from finetune.offload.sizing.compression import try_compression
from finetune.one_run import ReadyRun, Run, check_start, full_shape, get_ready, identity_of, refuse_writes, take_rows
from finetune.planned_run import PlannedRun
from finetune.prediction import predict_step, with_prediction
from finetune.quantization.base import is_quantized
from finetune.reporting.ending import describe_ending
from finetune.reporting.progress import Progress, say
from finetune.reporting.report import summary_table
from finetune.runs.directory import RunDirectory
from finetune.runs.disk import check_disk
from finetune.runs.signals import StopRequest, stop_requests
from finetune.sequence_chunk_choice import settle_sequence_chunk
from finetune.session import Session
from finetune.training.arguments import values_of
from finetune.training.traces import write_traces

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True, slots=True)
class TrainResult:
    """global_step: updates done in all. training_loss: mean of this call's step losses. report: what report.json holds.
    summary: of it what a person wants to know, as lines, which the command line prints."""

    global_step: int
    training_loss: float
    report: dict[str, Any] = field(repr=False)
    summary: str = field(repr=False)


class Trainer:
    """Fine-tunes the model that `config` names, within its budgets.

    callbacks: Transformers `TrainerCallback` objects. `config.data` and `config.eval_data` may be paths, hub ids, rows, or
    sequences of dicts of tensors for models that do not read text.
    """

    def __init__(
        self, config: Config | None = None, callbacks: Sequence[Any] = (), args: TrainingArguments | None = None, **values: Any
    ) -> None:
        """values: in place of a configuration, what it is made of: `Trainer(model=..., data=...)`. args: Transformers'
        arguments, all of whose values then count; what `values` say besides comes first."""
        if config is not None and (values or args is not None):
            found = [*values, *(["args"] if args is not None else [])]
            raise UserError(f"expected a configuration or its values, found both ({', '.join(found)})")
        if args is not None:
            values = merge(values_of(args), expand_shorthands(values))
        self.config = Config(**values) if config is None else config
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            if not hasattr(callback, "on_init_end"):
                raise UserError(
                    f"callbacks: expected transformers.TrainerCallback objects or classes, found {callback!r:.80}: "
                    "derive it from TrainerCallback"
                )

    def plan(self) -> PlannedRun:
        """What would live where for a full-length step, and how long that takes at this machine's rates; reads some MiB of
        weights for these, and of data only rows of tensors. Raises PlanRefused."""
        config = self.config
        session = Session(make_method(config), only_plan=True)
        try:
            tensors = None if config.data is None else open_samples(config.data, session.parts, config)
            choice, is_text = None, tensors is None

            def plan(config: Config) -> PlannedRun:
                shape = full_shape(config, session) if is_text else make_objective(config, session, tensors).shape(session)
                return session.plan(shape, elsewhere=True)

            if is_text:
                objective_class(config).check_model(session.parts)
            else:
                refuse_tensors(config)
            with nearest_named(session, plan, Knobs(is_text, is_text)):
                chunk_chosen = is_text and settle_sequence_chunk(session, lambda config: plan(with_least_rows(config)))
                config = session.config
                if is_text:
                    config, choice = settle_full_steps(config, session)
                planned = plan(config)
            if config.disk is not None:
                check_disk(config, planned.plan, 0)
            # What only CPUs decode, and only adapters are trained over.
            can_be_compressed = config.adapter_kind is not None and config.quantize is None and not session.on_device
            compression = try_compression(session.parts) if can_be_compressed else None
            if compression is not None and isinstance(session.device, DescribedDevice):
                compression = compression.decoded_at(session.device.rates)
            planned = replace(
                planned, choice=choice, chunk_chosen=chunk_chosen, compression=compression, num_steps=config.training.max_steps
            )
            planned = with_prediction(session, planned)
            if planned.num_steps is not None and planned.rates:
                refuse_writes(config, planned, planned.num_steps)
            if config.trace is not None:
                write_traces(config.trace, planned)
            return planned
        finally:
            session.close()

    def train(self) -> TrainResult:
        """Runs to the end of the schedule, from the saved state where `resume` is set. What a run says while it goes on goes to
        standard error; nothing is written to standard output.

        Ctrl-C, SIGTERM and SIGHUP end the step at its next block, save the state and raise KeyboardInterrupt; see
        `finetune.runs.signals` for a second one. A failure in mid-run saves the state too, where that is possible.
        Raises UserError for bad input and PlanRefused for budgets that are too small; nothing is written then but a token
        cache.
        """
        config = self.config
        check_start(config)
        directory = RunDirectory(config.output)
        if config.quantize is not None and not is_quantized(config):
            self.plan()  # refuses before that work what it would refuse after it
        try:
            with stop_requests():
                return self._train_in(directory)
        finally:
            directory.close()
            # What a session was made of refers to itself, and is out of reach only here.
            gc.collect()
            trim_malloc()

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Loss (and accuracy for prompt+completion data) of what was trained, the adapter or the model itself, on `data`,
        default `config.eval_data`."""
        config = self.config if data is None else self.config.model_copy(update=with_splits({"eval_data": data}))
        return evaluate(config, config.output)

    def save_model(self, directory: str | Path | None = None) -> Path:
        """Copies the trained adapter, in PEFT's format, to `directory`; None: it is already in `output/adapter`.

        Where the model itself was tuned, exports it to `directory`.
        """
        source = make_method(self.config).adapter_directory
        if source is None:
            if directory is None:
                raise UserError("the model itself was tuned: expected a directory to write it to, found None")
            export(self.config, Path(directory))
            return Path(directory)
        if not source.is_dir():
            raise UserError(f"there is no trained adapter in {source} yet: call train() first")
        if directory is None:
            return source
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            shutil.copyfile(path, target / path.name)  # others may read it as the umask says: not as the run's own files
        return target

    def _train_in(self, directory: RunDirectory) -> TrainResult:
        config, method = self.config, make_method(self.config)
        session = Session(method)
        try:
            data = take_rows(session, directory, config.output, say)
            return self._train(session, method, get_ready(session, method, data, directory, config.output), directory)
        finally:
            session.close()

    def _train(self, session: Session, method: Method, ready: ReadyRun, directory: RunDirectory) -> TrainResult:
        config, num_steps = session.config, ready.batches.num_steps
        identity = identity_of(config, session.parts, ready)
        planned = with_prediction(session, ready.planned, needs_rates=True)
        check_disk(config, planned.plan, directory.earlier_bytes)
        if not config.resume:
            refuse_writes(config, planned, num_steps)
        method.about = directory.begin(identity, num_steps)
        meter, stop = MemoryMeter().start(), StopRequest()
        progress = Progress(
            num_steps, host_budget_bytes=planned.plan.host_budget_bytes, device_budget_bytes=planned.plan.device_budget_bytes,
            step_seconds=predict_step(planned, planned.rates, planned.timing).seconds, peak_bytes=lambda: meter.peak_bytes,
        )  # fmt: skip
        run = Run(session, method, ready, planned, meter, progress, stop.stop_if_asked)
        run.say([planned.describe(), *directory.notes, *ready.notes])
        try:
            with stop_requests(stop.ask):
                return self._go(run, None if config.trace is None else Trace())
        finally:
            run.progress.close()
            run.meter.stop()

    def _go(self, run: Run, trace: Trace | None) -> TrainResult:
        session, config = run.session, run.session.config
        make_loss = session.adapter.make_loss(run.ready.objective.make_loss)
        streamed = session.open(run.planned, config.output / "scratch", run.inside, make_loss, trace)
        run.say([*session.notes, *streamed.notes])
        loop, report = run.go(self.callbacks)
        if trace is not None:
            write_traces(config.trace, run.planned, trace)
        run.progress.close()
        is_text = run.planned.shape.samples is None and session.parts.head is not None
        ending = describe_ending(report, config.output, run.method.adapter_directory is not None, is_text, can_merge(config))
        return TrainResult(loop.step, loop.training_loss, report, f"{summary_table(report)}\n\n{ending}")
