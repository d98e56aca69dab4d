"""Loss on held-out data, and accuracy where rows choose among a few completions, on the streamed model.

See [Note: what is asked of a sequence] in `finetune.objectives.scoring`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.data.image_rows import open_samples
from finetune.data.micro_batches import make_micro_batches
from finetune.data.options import name_of
from finetune.data.preparation import describe, prepare_for
from finetune.data.tensor_rows import TensorRows
from finetune.memory.errors import UserError
from finetune.memory.meter import MemoryMeter
from finetune.memory.plan import PlanRefused
from finetune.methods.results import find_result
from finetune.nearest_plans import Knobs, nearest_named
from finetune.objectives.base import make_objective, objective_class
from finetune.objectives.judged import MeasuredRows
from finetune.objectives.metrics import Predictions, load_metrics
from finetune.objectives.registry import find_objective
from finetune.objectives.scoring import Asked, TextRows, score
from finetune.objectives.written_rows import WrittenRows
from finetune.offload.sizing.needs import HIDDEN_STATES
from finetune.offload.streamed_model import StreamedModel
from finetune.planned_run import BatchShape, PlannedRun
from finetune.reporting.progress import Progress
from finetune.runs.evaluations import keep_evaluation
from finetune.runs.prompts import as_trained
from finetune.sequence_chunk_choice import settle_sequence_chunk
from finetune.session import Session

MICRO_BATCH_TOKENS = 256  # short rows compute together up to so many: fewer leave cores idle
PASS_TOKENS = 1 << 15  # one pass over the weights serves at most so many: beyond, reading is hidden on any machine


def evaluate(config: Config, adapter: Path | str | None = None) -> dict[str, float]:
    """Measures the model on `config.eval_data` (else on `config.data`), with `adapter`: a PEFT adapter, or the directory of a
    run, whose adapter or tuned weights are used.

    What is measured of a run's result is a row of its metrics.jsonl too.

    Returns loss (mean cross entropy of the trained tokens, in nats), perplexity, tokens (that the loss is over),
    examples and seconds; accuracy too, where rows are a prompt with one of at most 16 completions. Samples of tensors
    give loss, examples, seconds, and accuracy where the labels are classes.
    Raises UserError for bad input and PlanRefused for budgets that are too small.
    """
    started = time.perf_counter()
    config = as_trained(config, adapter)
    session = Session(find_result(config, adapter))
    try:
        rows = open_rows(session, config)
        text = not isinstance(rows, TensorRows)
        with nearest_named(session, lambda config: _least_plan(session, rows, config), Knobs(text, False)):
            chunk_chosen = text and settle_sequence_chunk(session, lambda config: _least_plan(session, rows, config))
            planned = replace(_plan(session, rows, config.training.least_micro_batch_size), chunk_chosen=chunk_chosen)
        with MemoryMeter() as meter, _progress(planned, meter) as progress:
            streamed = session.open(planned, config.output / "scratch", progress.inside)
            result = _measure(streamed, rows, planned.shape, partial(progress.work, "evaluate"))
        if not math.isfinite(result["loss"]):
            raise UserError(f"the loss on the evaluation data is {result['loss']}. {session.faulty_weight()}")
    finally:
        session.close()
    result |= {"seconds": time.perf_counter() - started}
    step, source = session.setup.result_step, config.data if config.eval_data is None else config.eval_data
    if step is not None:
        keep_evaluation(config, Path(adapter).expanduser(), step, name_of(source), result)
    return result


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that are measured in the middle of a training run, and the shape of the passes that its plan has room for."""

    rows: TextRows | MeasuredRows | WrittenRows | TensorRows  # all of the evaluation data
    shape: BatchShape  # of a pass over them


def plan_with_evaluation(
    session: Session, rows: TextRows | MeasuredRows | WrittenRows | TensorRows | None, shape: BatchShape, most_tokens: int
) -> tuple[PlannedRun, HeldOut | None]:
    """The plan of a training run whose steps have `shape` and which measures `rows`, where there are any.

    Rows compute together as where they are measured by themselves, so that both give the same numbers; only where there is no
    room for that, in micro-batches of as many rows as those of a step. most_tokens: that a row of text has,
    `dataset.sequence_length`. Raises PlanRefused when the budgets are too small.
    """
    if rows is None:
        return session.plan(shape), None
    if isinstance(rows, TensorRows) != (shape.samples is not None):
        kinds = ("text", "rows of tensors") if shape.samples is None else ("rows of tensors", "text")
        raise UserError(f"eval_data: expected {kinds[0]}, as the training data are, found {kinds[1]}")
    if isinstance(rows, TensorRows):
        together = 1 if session.plan(shape).plan.count(HIDDEN_STATES) else shape.micro_batches
        measured = _shape_of_samples(rows, shape.samples, together)
        return session.plan(shape, measured), HeldOut(rows, measured)
    if isinstance(rows, WrittenRows):
        planned, measured = rows.beside(session, shape)
        return planned, HeldOut(rows, measured)
    shape = shape.keeping(shape.kept_bytes + _kept_bytes(rows))
    planned = session.plan(shape)
    longest, waits = shape.inputs["input_ids"].shape[1], planned.plan.count(HIDDEN_STATES)
    max_length = min(rows.max_length, most_tokens)
    size = session.config.training.least_micro_batch_size
    # As many tokens a pass as a step has; where they do not fit, one micro-batch. Micro-batches of a pass wait in memory.
    for together in dict.fromkeys((_rows_together(rows, size), size, 1)):
        most = 1 if waits else max(1, shape.rows * shape.micro_batches // (together * max_length))
        for micro_batches in sorted({most, 1}, reverse=True):
            lanes = micro_batches * rows.versions
            measured = BatchShape.of_text(together, max_length, lanes, train=False).keeping(_kept_bytes(rows))
            try:
                return session.plan(shape, measured), HeldOut(rows, measured)
            except PlanRefused as error:
                refused = error
    raise PlanRefused(
        f"the longest row of eval_data has {max_length} tokens, that of training {longest}: with eval_data {refused.message}",
        refused.smallest_bytes,
        refused.remedies,
        refused.key,
    )


def _progress(planned: PlannedRun, meter: MemoryMeter) -> Progress:
    budget = planned.plan.host_budget_bytes
    return Progress(None, host_budget_bytes=budget, peak_bytes=lambda: meter.peak_bytes)


def evaluate_open(
    session: Session, held_out: HeldOut, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, float]:
    """As `evaluate`, on the model that is open in the middle of a training run. It is left in eval mode. progress: is told the
    rows that are done, and all."""
    started = time.perf_counter()
    session.set_training(False)
    measured = _measure(session.streamed, held_out.rows, held_out.shape, progress)
    return measured | {"seconds": time.perf_counter() - started}


def _prepare(config: Config, directory: Path) -> TokenDataset:
    """The token cache of the evaluation data, made now where there is none; with choices where completions are few.

    directory: of the model.
    """
    source, is_trained_on = config.eval_data, config.eval_data is None
    if is_trained_on:
        source = config.data
        if source is None:
            raise UserError("no data to evaluate on: give --data (a path, a hub id, or rows)")
        print("note: there is no eval_data; measuring on the training data", file=sys.stderr)
    append_eos = config.dataset.append_eos
    stride = config.dataset.evaluation_stride
    prepared = partial(prepare_for, config, source, directory, is_trained_on=is_trained_on, stride=stride)
    data = prepared(choices=False, append_eos=append_eos, judged=objective_class(config).judged)
    if (data.meta["different_completions"] or 0) >= 2 and not find_objective(config.objective).section:
        # The loss is to be that of training, so the end-of-text token is there; comparing candidates leaves it out.
        append_eos = data.meta["eos_token_id"] is not None and append_eos is not False
        data = prepared(choices=True, append_eos=append_eos)
    for line in describe(data):
        print(line, file=sys.stderr)
    return data


def open_rows(session: Session, config: Config) -> TextRows | MeasuredRows | WrittenRows | TensorRows:
    """The evaluation data, else the training data. Tokens are made now: in mid-run that would be more than is planned."""
    source = config.data if config.eval_data is None else config.eval_data
    tensors = open_samples(source, session.parts, config)
    if tensors is not None:
        if config.training.compute_metrics is not None:
            raise UserError("training.compute_metrics: expected rows of text, found samples of tensors: leave it out")
        return tensors
    objective_class(config).check_model(session.parts)
    if find_objective(config.objective).has_reference:
        session.setup.check_reference(session)
    data = _prepare(config, session.parts.directory)
    if find_objective(config.objective).section:
        return make_objective(config, session, data).measured()
    return TextRows(data, load_metrics(config.training.compute_metrics))


def _plan(session: Session, rows: TextRows | MeasuredRows | WrittenRows | TensorRows, micro_batch_size: int) -> PlannedRun:
    """The plan that reads least: more micro-batches a pass make fewer passes, but leave less for resident blocks."""
    if isinstance(rows, TensorRows):
        shape = _shape_of_samples(rows, micro_batch_size, 1)
        return _least_reading(session, shape, -(-len(rows) // micro_batch_size), PASS_TOKENS)
    if isinstance(rows, WrittenRows):
        return session.plan(rows.shape(session))
    together = _rows_together(rows, micro_batch_size)
    try:
        return _plan_text(session, rows, together)
    except PlanRefused:
        if together <= micro_batch_size:
            raise
        return _plan_text(session, rows, micro_batch_size)


def _rows_together(rows: TextRows | MeasuredRows, micro_batch_size: int) -> int:
    """That compute together, of the longest."""
    return min(max(micro_batch_size, MICRO_BATCH_TOKENS // rows.max_length), len(rows))


def _least_plan(session: Session, rows: TextRows | MeasuredRows | WrittenRows | TensorRows, config: Config) -> PlannedRun:
    """Of passes with one micro-batch."""
    size = config.training.least_micro_batch_size
    if isinstance(rows, TensorRows):
        return session.plan(_shape_of_samples(rows, size, 1))
    if isinstance(rows, WrittenRows):
        return session.plan(rows.shape(session))
    length = min(rows.max_length, config.dataset.sequence_length)
    return session.plan(BatchShape.of_text(min(size, len(rows)), length, rows.versions, train=False))


def _kept_bytes(rows: TextRows | MeasuredRows) -> int:
    """What a pass over the rows keeps of all of them."""
    return rows.kept_bytes if isinstance(rows, TextRows) else 0


def _shape_of_samples(rows: TensorRows, size: int, micro_batches: int) -> BatchShape:
    """size: rows of a micro-batch."""
    samples = min(size, len(rows))
    shape = BatchShape(rows.largest(samples), micro_batches, train=False, samples=samples)
    return shape.keeping(rows.reading_bytes(samples))


def _plan_text(session: Session, rows: TextRows | MeasuredRows, micro_batch_size: int) -> PlannedRun:
    capacity = micro_batch_size * rows.max_length
    shape = BatchShape.of_text(micro_batch_size, rows.max_length, rows.versions, train=False).keeping(_kept_bytes(rows))
    return _least_reading(session, shape, -(-rows.tokens // capacity), PASS_TOKENS // capacity)


def _least_reading(session: Session, shape: BatchShape, micro_batches: int, limit: int) -> PlannedRun:
    best, least, lanes = session.plan(shape), math.inf, shape.micro_batches
    limit = min(micro_batches, limit)
    planned = best
    while True:
        reading = planned.read_bytes * -(-micro_batches // lanes)
        if reading < least:
            best, least = planned, reading
        if lanes >= limit or not reading:
            return best
        lanes = min(2 * lanes, limit)
        try:
            planned = session.plan(replace(shape, micro_batches=lanes))
        except PlanRefused:
            return best


def _measure(
    streamed: StreamedModel,
    rows: TextRows | MeasuredRows | WrittenRows | TensorRows,
    shape: BatchShape,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    progress(0, len(rows))
    if isinstance(rows, TensorRows):
        return _measure_tensors(streamed, rows, shape, progress)
    if isinstance(rows, WrittenRows):
        return rows.measure(streamed, shape.micro_batches, progress)
    if not isinstance(rows, TextRows):
        return _measure_judged(streamed, rows, shape, progress)
    totals: dict[int, float] = {}
    tokens = done = 0
    micro_batches = _micro_batches(rows, shape)
    predictions = None if rows.metrics is None else rows.predictions()
    while lanes := list(islice(micro_batches, shape.micro_batches)):
        found = score(streamed, lanes, rows.pad_token_id, predicts=predictions is not None)
        for scores, lane in zip(found, lanes, strict=True):
            accounts = np.concatenate([one.accounts for one in lane])
            if predictions is not None:
                _take(predictions, lane, scores.tokens)
            for account, loss in zip(accounts.tolist(), scores.losses.tolist(), strict=True):
                totals[account] = totals.get(account, 0.0) + loss
            tokens += int((accounts == 0).sum())
            done += sum(bool((one.accounts == 0).any()) for one in lane)
        progress(done, len(rows))
    result = rows.result(totals, tokens)
    return result if predictions is None else result | predictions.measure(rows.metrics)


def _take(predictions: Predictions, lane: list[Asked], tokens: np.ndarray) -> None:
    """tokens: of all that the lane was asked. What was asked for the loss is of the row itself."""
    start = 0
    for one in lane:
        of_loss, predicted = one.accounts == 0, tokens[start : start + len(one.accounts)]
        if of_loss.any():
            predictions.take(one.positions[of_loss], one.targets[of_loss], predicted[of_loss])
        start += len(one.accounts)


def _measure_judged(
    streamed: StreamedModel, rows: MeasuredRows, shape: BatchShape, progress: Callable[[int, int], None]
) -> dict[str, float]:
    totals = np.zeros((rows.versions, rows.num_accounts))
    micro_batches, done = _micro_batches(rows, shape), 0
    while lanes := list(islice(micro_batches, max(1, shape.lanes // rows.versions))):
        versions = [version for version in range(rows.versions) for _ in lanes]
        found = rows.ask(streamed, lanes * rows.versions, versions)
        for version, scores, lane in zip(versions, found, lanes * rows.versions, strict=True):
            np.add.at(totals[version], np.concatenate([one.accounts for one in lane]), scores.losses)
        done += sum(len(lane) for lane in lanes)
        progress(done // 2, len(rows))
    streamed.weights.enter(0)
    return rows.result(totals)


def _micro_batches(rows: TextRows | MeasuredRows, shape: BatchShape) -> Iterator[list[Asked]]:
    """Sequences together as long as, padded to the longest, they are no more tokens than `shape` has, and the mask that
    padding asks for is one that was planned."""
    batch: list[Asked] = []
    longest = 0
    for one in (one for row in rows for one in row):
        longer = max(longest, len(one.input_ids))
        count = len(batch) + 1
        if batch and (count * longer > shape.rows or count * longer**2 > shape.mask_pairs):
            yield batch
            batch, longer = [], len(one.input_ids)
        batch.append(one)
        longest = longer
    if batch:
        yield batch


def _measure_tensors(
    streamed: StreamedModel, rows: TensorRows, shape: BatchShape, progress: Callable[[int, int], None]
) -> dict[str, float]:
    """Samples of tensors: the model's own loss, and accuracy where labels are the classes of logits [B, classes]."""
    size = shape.samples
    starts = range(0, len(rows), size)
    total, items, right, classified = 0.0, 0, 0, 0
    for first in range(0, len(starts), shape.micro_batches):
        group = [
            [(row,) for row in range(start, min(start + size, len(rows)))]
            for start in starts[first : first + shape.micro_batches]
        ]
        batches = make_micro_batches(rows, group, streamed.device.torch_device)
        found = streamed.step_losses(batches.inputs, batches.labels, keep_outputs=True, models_own=True)
        total += float(found.losses) * (1 if found.is_sum else found.num_items)
        items += found.num_items
        for labels, output in zip(batches.labels, found.outputs, strict=True):
            logits = getattr(output, "logits", None)
            if isinstance(logits, torch.Tensor) and logits.ndim == 2 and _are_classes(labels):
                right += int((logits.argmax(dim=1) == labels).sum())
                classified += len(labels)
        progress(group[-1][-1][0] + 1, len(rows))
    result: dict[str, Any] = {"loss": total / max(1, items), "examples": len(rows)}
    return result | ({"accuracy": right / classified} if classified else {})


def _are_classes(labels: torch.Tensor | None) -> bool:
    return labels is not None and labels.ndim == 1 and not labels.is_floating_point()
