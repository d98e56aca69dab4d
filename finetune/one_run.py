"""One run, from its rows to its report: what a `Trainer` does once, and a sweep for each of its runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.adapters.merging import can_merge
from finetune.config import Config
from finetune.config.training_options import REPORTERS
from finetune.config.unused_keys import unused_adapter_note
from finetune.data import BatchPlan, TokenDataset
from finetune.data.image_rows import open_samples
from finetune.data.options import sources_in
from finetune.data.packed_rows import check_texts_stay_apart
from finetune.data.preparation import describe, prepare_for
from finetune.data.tensor_rows import TensorRows
from finetune.evaluate import HeldOut, evaluate_open, open_rows, plan_with_evaluation
from finetune.memory.errors import UserError
from finetune.memory.meter import MemoryMeter
from finetune.memory.plan import PlanRefused
from finetune.memory.units import format_bytes, format_mib
from finetune.methods.base import Method
from finetune.methods.schedule import check_schedule
from finetune.micro_batch_choice import (
    MicroBatchChoice,
    choose_micro_batch_size,
    padding_of,
    refuse_tensors,
    with_least_rows,
    with_micro_batch_size,
)
from finetune.nearest_plans import Knobs, nearest_named
from finetune.objectives.base import Objective, make_objective, objective_class
from finetune.objectives.judged import MeasuredRows
from finetune.objectives.scoring import TextRows
from finetune.offload.weights.parts import ModelParts
from finetune.planned_run import SHORTEST_ROW, BatchShape, PlannedRun
from finetune.prediction import predict_step
from finetune.reporting.ending import describe_result, describe_values
from finetune.reporting.page import write_page
from finetune.reporting.progress import Progress
from finetune.reporting.report import MetricsWriter, read_metrics, write_report, write_text
from finetune.runs.directory import RunDirectory
from finetune.runs.identity import RunIdentity, model_name
from finetune.runs.model_card import CARD, model_card
from finetune.runs.writes import WriteCount, check_writes
from finetune.sequence_chunk_choice import settle_sequence_chunk
from finetune.session import Session
from finetune.training.after_step import AfterStep
from finetune.training.callbacks import Callbacks
from finetune.training.loop import TrainingLoop
from finetune.training.run_report import run_report


@dataclass(frozen=True, slots=True)
class ReadyRun:
    """A run of which everything is known that can be before its model is open."""

    data: TokenDataset | TensorRows  # what is trained on
    objective: Objective  # what steps minimise
    batches: BatchPlan  # which rows each step has
    held_out: HeldOut | None  # what is measured between steps
    planned: PlannedRun  # with the whole budget for it
    notes: list[str]  # for the user


def check_start(config: Config) -> None:
    """Before anything is read. Raises UserError for what a run cannot do without."""
    if config.trace is not None and not config.trace.absolute().parent.is_dir():
        raise UserError(f"trace: expected a file in a directory that is there, found {config.trace}: make its directory")
    if config.data is None:
        raise UserError("no training data: give --data (a path, a hub id, or rows)")
    options = config.training
    for package in (REPORTERS[word] for word in options.report_to):
        if find_spec(package) is None:
            raise UserError(
                f"training.report_to: expected the package {package} to be installed, found it missing: pip install {package}"
            )
    for key in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(options, key) and config.eval_data is None:
            raise UserError(f"training.{key}: expected eval_data, which evaluations are over, found none")


def take_rows(
    session: Session, directory: RunDirectory, beside: Path, say: Callable[[str], None]
) -> TokenDataset | TensorRows:
    """The rows; the directory is taken. Refuses before tokenising what no data could make fit.

    beside: the output directory that has token caches. say: gets lines about the rows, for the user.
    """
    config, source = session.config, session.config.data
    inputs = [session.base.source, session.parts.directory, *_local_paths(config.data, config.eval_data)]
    tensors = open_samples(source, session.parts, config)
    if tensors is not None:
        refuse_tensors(config)
        directory.take(config, inputs)
        for line in tensors.describe():
            say(line)
        return tensors
    objective_class(config).check_model(session.parts)
    kind, least = objective_class(config), with_least_rows(config)
    with nearest_named(session, lambda config: session.plan(full_shape(config, session))):
        _refuse_all_rows(least, session)
    directory.take(config, inputs)
    append_eos = False if kind.compares_choices else config.dataset.append_eos
    data = prepare_for(
        _in(beside, config), source, session.parts.directory,
        choices=kind.compares_choices, append_eos=append_eos, judged=kind.judged, is_trained_on=True,
    )
    for line in describe(data):
        say(line)
    return data


def get_ready(
    session: Session, method: Method, data: TokenDataset | TensorRows, directory: RunDirectory, beside: Path
) -> ReadyRun:
    """The session's configuration says a number of rows that compute together afterwards. beside: as for `take_rows`. Raises
    PlanRefused when not even this run fits, and UserError for whatever is wrong with it."""
    config, options = session.config, session.config.training
    objective = make_objective(config, session, data)
    packing = config.dataset.sequence_length if config.dataset.packing else None
    batches = BatchPlan(
        len(objective.lengths), options.batch_size, options.least_micro_batch_size, options.seed, objective.lengths,
        epochs=None if options.max_steps else options.epochs, steps=options.max_steps, packing=packing,
    )  # fmt: skip
    method.num_steps = batches.num_steps
    notes = _notes(method)
    held_out = None if config.eval_data is None else open_rows(session, _in(beside, config))

    def plan(config: Config) -> tuple[PlannedRun, HeldOut | None]:
        shape, most_tokens = make_objective(config, session, data).shape(session), config.dataset.sequence_length
        shape = shape.of_length(most_tokens) if shape.samples is None else shape
        return plan_with_evaluation(session, held_out, shape, most_tokens)

    choice, is_text = None, not isinstance(data, TensorRows)
    with nearest_named(session, lambda config: plan(config)[0], Knobs(is_text, is_text)):
        recorded = directory.recorded_setting("engine.sequence_chunk")
        chunk_chosen = is_text and settle_sequence_chunk(session, lambda config: plan(with_least_rows(config)), recorded)
        config = session.config
        if options.micro_batch_size == "auto":
            choice = _choose_micro_batch_size(session, data, held_out, batches, directory)
            config = with_micro_batch_size(config, choice.size)
            session.settle(config)
            objective, batches.micro_batch_size = make_objective(config, session, data), choice.size
        planned, measured = plan(config)
    planned = replace(planned, choice=choice, chunk_chosen=chunk_chosen, num_steps=batches.num_steps)
    objective.take_plan(planned.shape)
    return ReadyRun(data, objective, batches, measured, planned, notes)


def identity_of(config: Config, parts: ModelParts, ready: ReadyRun) -> RunIdentity:
    """config: that of the session after `get_ready`."""
    return RunIdentity.of(config, parts, ready.data, len(ready.objective.lengths))


def refuse_writes(config: Config, planned: PlannedRun, num_steps: int, earlier_bytes: int = 0) -> None:
    """Raises UserError when so many more steps write more than `max_writes` leaves. planned: with a prediction."""
    if config.max_writes is not None:
        step = predict_step(planned, planned.rates, planned.timing)
        check_writes(config, planned.plan, step.write_bytes, num_steps, earlier_bytes)


@dataclass(frozen=True, slots=True)
class Run:
    """A run whose model is about to be open."""

    session: Session
    method: Method  # the session's setup
    ready: ReadyRun
    planned: PlannedRun  # what was planned and printed
    meter: MemoryMeter  # peaks since the model was opened
    progress: Progress  # the live line
    stop_if_asked: Callable[[], None]  # raises `finetune.runs.signals.Stopped` where the user wants the run to end

    def say(self, notes: Iterable[str]) -> None:
        for note in notes:
            self.progress.message(note)

    def inside(self, phase: str, done: int, total: int) -> None:
        """So many visits of this phase of a step are over."""
        if self.method.may_stop_inside:
            self.stop_if_asked()
        self.progress.inside(phase, done, total)

    def go(self, callbacks: Sequence[Any] = ()) -> tuple[TrainingLoop, dict[str, Any]]:
        """The model is open: from the state that earlier processes have left to the end of the schedule. Metrics, what the
        method leaves and the report are written then; returns the loop at its end, and the report."""
        session, method, ready = self.session, self.method, self.ready
        shape = ready.planned.shape
        if shape.packed:
            session.set_training(False)
            check_texts_stay_apart(session.streamed, shape.rows)
            session.set_training(True)
        self.say(method.begin(session, ready.objective))
        self.progress.begin_at(method.first_step)
        if method.first_step:
            self.say([f"resumed after step {method.first_step}"])
        config, output = session.config, session.config.output
        loop = TrainingLoop(session, method, ready.batches, self.meter, self.progress, self.stop_if_asked)
        path = output / "metrics.jsonl"
        writes = WriteCount(config, read_metrics(path) if method.first_step and path.exists() else ())
        refuse_writes(config, self.planned, ready.batches.num_steps - method.first_step, writes.earlier_bytes)
        with MetricsWriter(path, method.first_step) as metrics:
            watching = Callbacks(callbacks, config, session, method, ready.batches, metrics.rows())
            after = AfterStep(method, watching, metrics, None if config.eval_data is None else self._evaluate)
            loop.run(watching, after, metrics, writes)
        best = after.best
        if best.should_stop and loop.step < ready.batches.num_steps:
            self.say([f"stopped early after step {loop.step}: {best.describe()}, and {best.misses} evaluations since"])
        kept = best.about if best.step and config.training.load_best_model_at_end else None
        report = run_report(self.planned, session, self.meter, loop) | {"evaluation": after.evaluation, "best": kept}
        if beside_bytes := (report["arena"] or {}).get("beside_file_bytes"):
            self.say([
                f"note: {format_bytes(beside_bytes)} of hidden states, in all steps together, found no room in their file, and "
                "were in memory beside what is planned. Where memory is short, set engine.hidden_states to host"
            ])  # fmt: skip
        write_report(output / "report.json", report)
        is_text = shape.samples is None and session.parts.head is not None
        write_page(output, describe_result(output, method.adapter_directory is not None, is_text, can_merge(config)))
        if (output / "adapter").is_dir():
            words = "An adapter for use with PEFT, made with finetune."
            write_text(output / "adapter" / CARD, model_card(output, model_name(config.model), "peft", words))
        return loop, report

    def _evaluate(self, step: int) -> dict[str, float]:
        results = evaluate_open(self.session, self.ready.held_out, partial(self.progress.work, "evaluate"))
        self.session.set_training(True)
        self.say([f"step {step}: evaluation: {describe_values(results)}"])
        return results


def _in(output: Path, config: Config) -> Config:
    return config.model_copy(update={"output": output})


def full_shape(config: Config, session: Session) -> BatchShape:
    """Of a step whose rows are as long as they may be."""
    return objective_class(config).full_shape(config, session, config.dataset.sequence_length)


def _refuse_all_rows(config: Config, session: Session) -> None:
    """Raises PlanRefused where not even the shortest rows fit: it names what full ones need, and what those do."""
    shortest, longest = min(SHORTEST_ROW, config.dataset.sequence_length), config.dataset.sequence_length
    try:
        session.plan(objective_class(config).full_shape(config, session, shortest))
    except PlanRefused as refused:
        try:
            session.plan(full_shape(config, session))
        except PlanRefused as full:
            raise full.noting(
                f"That is for rows of {longest} tokens: the data has not been read yet. Rows of {shortest} tokens need "
                f"{format_mib(refused.smallest_bytes)}."
            ) from None
        raise


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
    named = [one for source in sources for one in sources_in(source) if isinstance(one, (str, os.PathLike))]
    return [Path(one) for one in named if os.path.exists(one)]


def _notes(method: Method) -> list[str]:
    """What a run of so many steps does not do, though its settings might make one think so. Raises UserError when they are too
    few for the schedule."""
    config, options = method.config, method.config.training
    notes = [*config.renamed, check_schedule(options, method.num_steps), unused_adapter_note(config)]
    if options.eval_steps and config.eval_data is None:
        notes.append("there is no eval_data, so training.eval_steps evaluates nothing")
    notes += method.schedule_notes
    return [f"note: {note}" for note in notes if note is not None]
