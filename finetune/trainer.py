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

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.config.unused_keys import unused_adapter_note
from finetune.data import BatchPlan, TokenDataset
from finetune.data.model_kinds import refuse_text
from finetune.data.packed_rows import check_texts_stay_apart
from finetune.data.preparation import describe, prepare_for
from finetune.data.tensor_rows import TensorRows, open_tensor_rows
from finetune.evaluate import HeldOut, evaluate, evaluate_open, open_rows, plan_with_evaluation
from finetune.export import export
from finetune.methods.base import Method, make_method
from finetune.methods.schedule import check_schedule
from finetune.micro_batch_choice import (
    MicroBatchChoice,
    choose_micro_batch_size,
    padding_of,
    refuse_tensors,
    settle_full_steps,
    with_micro_batch_size,
)
from finetune.nearest_plans import Knobs, nearest_named
from finetune.objectives.base import Objective, make_objective, objective_class
from finetune.objectives.judged import MeasuredRows
from finetune.objectives.scoring import TextRows
from finetune.planned_run import SHORTEST_ROW, BatchShape, PlannedRun
from finetune.prediction import with_prediction
from finetune.quantization.base import is_quantized
from finetune.reporting.progress import LastingStream, Progress
from finetune.reporting.report import MetricsWriter, summary_table, write_report
from finetune.runs.directory import RunDirectory
from finetune.runs.disk import check_disk
from finetune.runs.identity import RunIdentity
from finetune.runs.signals import REPEAT_SECONDS, Stopped, stop_requests
from finetune.session import Session
from finetune.training.after_step import AfterStep
from finetune.training.callbacks import Callbacks
from finetune.training.loop import TrainingLoop
from finetune.training.run_report import run_report
from finetune.training.traces import write_traces
from memory.errors import UserError
from memory.meter import MemoryMeter
from memory.plan import PlanRefused
from memory.trace import Trace
from memory.units import format_mib
from offload.devices import DescribedDevice
from offload.sizing.compression import try_compression


@dataclass(frozen=True, slots=True)
class TrainResult:
    """global_step: updates done in all. training_loss: mean of this call's step losses. report: what report.json holds."""

    global_step: int
    training_loss: float
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A run from its plan on."""

    session: Session  # with the open model
    method: Method  # the session's setup
    planned: PlannedRun  # what was planned and printed
    objective: Objective  # what steps minimise
    batches: BatchPlan  # which rows each step has
    meter: MemoryMeter  # peaks since the model was opened
    progress: Progress  # the live line
    trace: Trace | None = None  # where one is asked for

    def say(self, notes: Iterable[str]) -> None:
        for note in notes:
            self.progress.message(note)


class Trainer:
    """Fine-tunes the model that `config` names, within its budgets.

    callbacks: Transformers `TrainerCallback` objects. `config.data` and `config.eval_data` may be paths, hub ids, rows, or
    sequences of dicts of tensors for models that do not read text.
    """

    def __init__(self, config: Config, callbacks: Sequence[Any] = ()) -> None:
        self.config = config
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            if not hasattr(callback, "on_init_end"):
                raise UserError(
                    f"callbacks: expected transformers.TrainerCallback objects or classes, found {callback!r:.80}: "
                    "derive it from TrainerCallback"
                )
        self._stop_signal: int | None = None
        self._held_out: HeldOut | None = None

    def plan(self) -> PlannedRun:
        """What would live where for a full-length step, and how long that takes at this machine's rates; reads some MiB of
        weights for these, and of data only rows of tensors. Raises PlanRefused."""
        config = self.config
        session = Session(make_method(config), only_plan=True)
        try:
            tensors = None if config.data is None else open_tensor_rows(config.data, session.parts)
            choice, is_text = None, tensors is None

            def plan(config: Config) -> PlannedRun:
                shape = _full_shape(config, session) if is_text else make_objective(config, session, tensors).shape(session)
                return session.plan(shape, elsewhere=True)

            if is_text:
                refuse_text(session.parts)
            else:
                refuse_tensors(config)
            with nearest_named(session, plan, Knobs(is_text, is_text)):
                if is_text:
                    config, choice = settle_full_steps(config, session)
                planned = plan(config)
            # What only CPUs decode, and only adapters are trained over.
            can_be_compressed = config.adapter is not None and config.quantize is None and not session.on_device
            compression = try_compression(session.parts) if can_be_compressed else None
            if compression is not None and isinstance(session.device, DescribedDevice):
                compression = compression.decoded_at(session.device.rates)
            planned = replace(planned, choice=choice, compression=compression, num_steps=config.training.max_steps)
            planned = with_prediction(session, planned)
            if config.trace is not None:
                write_traces(config.trace, planned)
            return planned
        finally:
            session.close()

    def train(self) -> TrainResult:
        """Runs to the end of the schedule, from the saved state where `resume` is set.

        Ctrl-C, SIGTERM and SIGHUP end the step at its next block, save the state and raise KeyboardInterrupt; see
        `finetune.runs.signals` for a second one. A failure in mid-run saves the state too, where that is possible.
        Raises UserError for bad input and PlanRefused for budgets that are too small; nothing is written then but a token
        cache.
        """
        config = self.config
        if config.trace is not None and not config.trace.absolute().parent.is_dir():
            raise UserError(f"trace: expected a file in a directory that is there, found {config.trace}: make its directory")
        if config.data is None:
            raise UserError("no training data: give --data (a path, a hub id, or rows)")
        if "tensorboard" in config.training.report_to and find_spec("tensorboard") is None:
            raise UserError("training.report_to: expected the package tensorboard to be installed, found it missing")
        directory = RunDirectory(config.output)
        if config.quantize is not None and not is_quantized(config):
            self.plan()  # refuses before that work what it would refuse after it
        with stop_requests():
            method = make_method(config)
            session = Session(method)
            try:
                data = self._prepare(config.data, session, directory)
                return self._train(session, method, data, directory)
            finally:
                session.close()
                directory.close()

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Loss (and accuracy for prompt+completion data) of what was trained, the adapter or the model itself, on `data`,
        default `config.eval_data`."""
        config = self.config if data is None else self.config.model_copy(update={"eval_data": data})
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

    def _prepare(self, source: Any, session: Session, directory: RunDirectory) -> TokenDataset | TensorRows:
        """The rows; the directory is taken. Refuses before tokenising what no data could make fit."""
        config = self.config
        inputs = [session.base.source, session.parts.directory, *_local_paths(config.data, config.eval_data)]
        tensors = open_tensor_rows(source, session.parts)
        if tensors is not None:
            refuse_tensors(config)
            directory.take(config, inputs)
            return tensors
        refuse_text(session.parts)
        kind, least = objective_class(config), with_micro_batch_size(config, config.training.least_micro_batch_size)
        with nearest_named(session, lambda config: session.plan(_full_shape(config, session))):
            _refuse_all_rows(least, session)
        directory.take(config, inputs)
        append_eos = False if kind.compares_choices else config.dataset.append_eos
        data = prepare_for(
            config, source, session.parts.directory, choices=kind.compares_choices, append_eos=append_eos, judged=kind.judged
        )
        for line in describe(data):
            print(line, file=LastingStream(sys.stderr))
        return data

    def _train(
        self, session: Session, method: Method, data: TokenDataset | TensorRows, directory: RunDirectory
    ) -> TrainResult:
        config, options = self.config, self.config.training
        objective = make_objective(config, session, data)
        packing = config.dataset.sequence_length if config.dataset.packing else None
        batches = BatchPlan(
            len(objective.lengths), options.batch_size, options.least_micro_batch_size, options.seed, objective.lengths,
            epochs=None if options.max_steps else options.epochs, steps=options.max_steps, packing=packing,
        )  # fmt: skip
        method.num_steps = batches.num_steps
        notes = _notes(method)
        held_out = None if config.eval_data is None else open_rows(session, config)

        def plan(config: Config) -> tuple[PlannedRun, HeldOut | None]:
            shape, most_tokens = make_objective(config, session, data).shape(session), config.dataset.sequence_length
            shape = shape.of_length(most_tokens) if shape.samples is None else shape
            return plan_with_evaluation(session, held_out, shape, most_tokens)

        choice, is_text = None, not isinstance(data, TensorRows)
        with nearest_named(session, lambda config: plan(config)[0], Knobs(is_text, is_text)):
            if options.micro_batch_size == "auto":
                choice = _choose_micro_batch_size(session, data, held_out, batches, directory)
                config = with_micro_batch_size(config, choice.size)
                session.settle(config)
                objective, batches.micro_batch_size = make_objective(config, session, data), choice.size
            planned, self._held_out = plan(config)
        identity = RunIdentity.of(config, session.parts, data, len(objective.lengths))
        planned = replace(planned, choice=choice, num_steps=batches.num_steps)
        planned = with_prediction(session, planned, needs_rates=True)

        check_disk(config, planned.plan, directory.earlier_bytes)
        method.about = directory.begin(identity, batches.num_steps)
        budgets = {name: getattr(planned.plan, name) for name in ("host_budget_bytes", "device_budget_bytes")}
        run = _UnderWay(
            session, method, planned, objective, batches, MemoryMeter().start(), Progress(batches.num_steps, **budgets),
            None if config.trace is None else Trace(),
        )  # fmt: skip
        run.say([planned.describe(), *directory.notes, *notes])
        try:
            with stop_requests(self._ask_to_stop):
                return self._run(run)
        finally:
            self._stop_signal = None
            run.progress.close()
            run.meter.stop()

    def _run(self, run: _UnderWay) -> TrainResult:
        session, method = run.session, run.method

        def inside(phase: str, done: int, total: int) -> None:
            if method.may_stop_inside:
                self._stop_if_asked()
            run.progress.inside(phase, done, total)

        streamed = session.open(
            run.planned, self.config.output / "scratch", inside, run.objective.make_loss, run.trace
        )  # fmt: skip
        run.say([*session.notes, *streamed.notes])
        if run.planned.shape.packed:
            session.set_training(False)
            check_texts_stay_apart(streamed, run.planned.shape.rows)
            session.set_training(True)
        run.say(method.begin(session, run.objective))
        if method.first_step:
            run.say([f"resumed after step {method.first_step}"])
        return self._run_steps(run)

    def _run_steps(self, run: _UnderWay) -> TrainResult:
        session, method = run.session, run.method
        config, output = session.config, session.config.output
        loop = TrainingLoop(session, method, run.batches, run.meter, run.progress, self._stop_if_asked)

        def measure(step: int) -> dict[str, float]:
            return self._evaluate_inside(run, step)

        with MetricsWriter(output / "metrics.jsonl", method.first_step) as metrics:
            callbacks = Callbacks(self.callbacks, config, session, method, run.batches, metrics.rows())
            after = AfterStep(method, callbacks, metrics, None if config.eval_data is None else measure)
            loop.run(callbacks, after, metrics)
        report = run_report(run.planned, session, run.meter, loop) | {"evaluation": after.evaluation}
        write_report(output / "report.json", report)
        if run.trace is not None:
            write_traces(config.trace, run.planned, run.trace)
        run.progress.close()
        words = summary_table(report)
        if method.adapter_directory is None:
            quantized = f" --quantize {config.quantize}" if config.quantize else ""
            words += f"\nThe tuned model: finetune export --model {config.model}{quantized} --output {output} --to DIRECTORY"
        print(words, file=LastingStream(sys.stdout), flush=True)
        return TrainResult(loop.step, loop.training_loss, report)

    def _evaluate_inside(self, run: _UnderWay, step: int) -> dict[str, float]:
        results = evaluate_open(run.session, self._held_out)
        run.session.set_training(True)
        run.say([f"step {step}: " + ", ".join(f"eval {key} {value:.4f}" for key, value in results.items())])
        return results

    def _ask_to_stop(self, number: int) -> None:
        """From a signal handler: whatever the main thread was about to write, it must not be entered again."""
        self._stop_signal = number
        words = (
            f"\n{signal.Signals(number).name}: stopping at the next block, the last whole step is saved. A second one after "
            f"{REPEAT_SECONDS:g} s stops at once, and saves nothing more\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, words.encode())

    def _stop_if_asked(self) -> None:
        if self._stop_signal is not None:
            raise Stopped(self._stop_signal)


def _refuse_all_rows(config: Config, session: Session) -> None:
    """Raises PlanRefused where not even the shortest rows fit: it names what full ones need, and what those do."""
    shortest, longest = min(SHORTEST_ROW, config.dataset.sequence_length), config.dataset.sequence_length
    try:
        session.plan(objective_class(config).full_shape(config, session, shortest))
    except PlanRefused as refused:
        try:
            session.plan(_full_shape(config, session))
        except PlanRefused as full:
            raise full.noting(
                f"That is for rows of {longest} tokens: the data has not been read yet. Rows of {shortest} tokens need "
                f"{format_mib(refused.smallest_bytes)}."
            ) from None
        raise


def _full_shape(config: Config, session: Session) -> BatchShape:
    """Of a step whose rows are as long as they may be."""
    return objective_class(config).full_shape(config, session, config.dataset.sequence_length)


def _choose_micro_batch_size(
    session: Session, data: TokenDataset, held_out: TextRows | MeasuredRows | None, batches: BatchPlan,
    directory: RunDirectory,
) -> MicroBatchChoice:  # fmt: skip
    """For a run over these data; that of a run that goes on is as when it began."""
    recorded = directory.recorded_setting("training.micro_batch_size")
    if recorded is not None:
        return MicroBatchChoice(recorded)
    config, options = session.config, session.config.training
    # Every size is of the same rows; its own objective is made for what is chosen.
    whole = make_objective(with_micro_batch_size(config, options.batch_size), session, data).shape(session)

    def plan(size: int) -> PlannedRun:
        return plan_with_evaluation(session, held_out, whole.of_rows(size), config.dataset.sequence_length)[0]

    return choose_micro_batch_size(session, whole.inputs["input_ids"].shape[0], plan, padding_of(batches))


def _local_paths(*sources: Any) -> list[Path]:
    return [Path(source) for source in sources if isinstance(source, (str, os.PathLike)) and os.path.exists(source)]


def _notes(method: Method) -> list[str]:
    """What a run of so many steps does not do, though its settings might make one think so. Raises UserError when they are too
    few for the schedule."""
    config, options = method.config, method.config.training
    notes = [check_schedule(options, method.num_steps), unused_adapter_note(config)]
    if options.eval_steps and config.eval_data is None:
        notes.append("there is no eval_data, so training.eval_steps evaluates nothing")
    notes += method.schedule_notes
    return [f"note: {note}" for note in notes if note is not None]
