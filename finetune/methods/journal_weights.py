"""What zeroth-order tuning has made of a model's own weights: all whole steps of a journal, and weights that hold some of them.

What no folded weights hold is applied while blocks are fetched, as the run itself does it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.needs import Needs
from finetune.methods.perturbation_needs import is_packed, most_product_groups, perturbed_sizes
from finetune.methods.zeroth_order_options import ZerothOrderOptions
from finetune.offload.devices import choose_device
from finetune.offload.files.checkpoint import Checkpoint, resolve_model
from finetune.offload.perturb.folds import newest_fold
from finetune.offload.perturb.journal import Journal
from finetune.offload.perturb.perturbed_weights import PerturbedWeights
from finetune.offload.perturb.replay import Changes, moved_sources, replay
from finetune.offload.perturb.scales import LEAST_SCALE, check_scales, scale_keys, scale_tensors
from finetune.offload.perturb.unpacked import write_unpacked
from finetune.offload.perturb.variants import noise_keys
from finetune.offload.sizing.needs import Streamed
from finetune.offload.step.weights import Weights
from finetune.offload.weights.formats.plain import TORCH_DTYPES
from finetune.offload.weights.parts import ModelParts, cut
from finetune.offload.weights.streamed_parts import Room
from finetune.planned_run import BatchShape, MeasuredBatch
from finetune.quantization.base import open_base
from finetune.reporting.report import last_step
from finetune.runs.best import read_best
from finetune.runs.directory import check_belongs, reading
from finetune.runs.exports import Export
from finetune.runs.identity import check_model, check_same_run, recorded_setting
from finetune.session import Session
from finetune.setup import Setup


def journal_path(run: Path) -> Path:
    return run / "journal.zo"


def moves_weights(journal: Journal) -> bool:
    """Whether its steps are of the model's own weights, not of an adapter."""
    return recorded_setting(journal.about, "zo.parameters") in ("all", "scales")


def _moves_scales(journal: Journal) -> bool:
    """Whether its steps are of the scales of packed weights alone."""
    return recorded_setting(journal.about, "zo.parameters") == "scales"


class JournalWeights(Setup):
    """The model after all steps of the run in `run`, or after its best one, where that is its result. No run begins there until
    `close`; one under way is not hindered."""

    frozen = False
    tuned = True

    def __init__(self, config: Config, run: Path) -> None:
        super().__init__(config)
        self._run = run
        self._fold: Checkpoint | None = None
        self._folded_steps = 0
        self._held = ExitStack()
        try:
            self._is_free = self._held.enter_context(reading(run))
            self._journal = Journal.read(journal_path(run))
            check_belongs(run, self._journal.path, self._journal.about)
            if self._is_free:  # of a run that is under way, the newest step may not be whole yet
                _check_whole(self._journal, run, "")
            self._steps = self.result_step = _result_step(self._journal, run, self._is_free)
        except BaseException:
            self.close()
            raise

    def check_model(self, directory: Path) -> None:
        """An adapter that lies beside the model is none of the run's."""

    def wrap(self, parts: ModelParts) -> tuple[nn.Module, ModelParts]:
        """As they are: the model is moved once it is open."""
        journal = self._journal
        check_model(f"the run in {self._run} tuned", journal.about["model"], parts, self.config.model)
        # A run that is under way removes folded weights; the journal alone gives the same.
        if self._is_free:
            whole = self._steps - self._steps % journal.about["group_steps"]
            weights, io_backend = self._run / "weights", self.config.engine.io_backend
            self._folded_steps, self._fold = newest_fold(weights, journal, whole, io_backend, _say) or (0, None)
        _say(f"note: with the weights that the run has tuned in {self._steps} steps")
        return parts.model, parts

    def needs(self, session: Session, batch: MeasuredBatch, streamed: Streamed) -> tuple[Needs, Streamed]:
        # Steps none or unknown: whether there is room for folded weights, which may be wider.
        steps = 0 if self._fold is None else None
        options = _options(self._journal, session.parts)
        if options.perturb == "products":  # whose groups stay apart
            steps = self._steps
        perturbed = perturbed_sizes(session.parts, options, steps)
        return perturbed.needs, streamed.holding(perturbed.block_bytes, perturbed.chunk_bytes, perturbed.expert_bytes)

    def uses_of_weights(self, parts: ModelParts, shape: BatchShape) -> int:
        # Weights that the run has moved otherwise are made in the dtype that computes.
        return shape.micro_batches if is_packed(parts) else 0

    def cut_options(self) -> dict[str, Any]:
        return {"streams_experts": not _moves_scales(self._journal)}

    def open_weights(self, session: Session) -> Callable[[Room], Weights]:
        journal, scales = self._journal, _moves_scales(self._journal)
        if scales:
            check_scales(session.parts)
        groups = most_product_groups(session.parts, _options(journal, session.parts), self._steps)
        return partial(PerturbedWeights, noise=journal.noise, product_groups=groups, scales=scales)

    def opened(self, session: Session) -> None:
        """Makes the weights of the open model, which are the original's, those of the last step."""
        weights: PerturbedWeights = session.streamed.weights
        if self._fold is not None:
            weights.move_to(self._fold)
        weights.perturbation.pending = self._journal.groups(self._folded_steps, self._steps)

    def close(self) -> None:
        self._held.close()


def export_journal(job: Export) -> int:
    """Writes the model with the steps of the run's journal; returns how many. Raises UserError."""
    config, path = job.config, journal_path(job.config.output)
    journal = Journal.read(path)
    if job.run is not None:
        check_same_run(path, journal.about, job.run)
    if not moves_weights(journal):
        raise UserError(f"this run tuned an adapter, not the model: it is in {config.output / 'adapter'}")
    if job.at_step is None and job.is_free:  # of a run that is under way, the newest step may not be whole yet
        _check_whole(journal, config.output, f", or export what is whole with --at-step {journal.steps}")
    steps = _result_step(journal, config.output, job.is_free) if job.at_step is None else job.at_step
    if not 0 <= steps <= journal.steps:
        raise UserError(f"--at-step: expected 0 to {journal.steps}, the steps in {path}, found {job.at_step}")
    base = open_base(config, resolve_model(config.model), choose_device("cpu"), lambda stored: stored, only_plan=False)
    try:
        _write(job, journal, steps, base.directory)
    finally:
        base.close()
    return steps


def _write(job: Export, journal: Journal, steps: int, model: Path) -> None:
    """`export_journal` of the run over the checkpoint in `model`."""
    config = job.config
    parts = cut(model, trust_remote_code=config.trust_remote_code)
    check_model(f"the run in {config.output} tuned", journal.about["model"], parts, config.model)
    scales, keys = _moves_scales(journal), noise_keys(parts.sources, parts.parameters)
    if is_packed(parts) and not scales:
        write_unpacked(
            parts, keys, journal.noise, journal.groups(0, steps), job.directory,
            job.side_files(model), config.engine.io_backend, job.progress,
        )  # fmt: skip
        return
    # A run that is under way removes folded weights; the journal alone gives the same.
    weights = config.output / "weights"
    folded = newest_fold(weights, journal, steps, config.engine.io_backend, _say) if job.is_free else None
    first_step, fold = folded or (0, None)
    stored_dtypes = {name: TORCH_DTYPES[entry.dtype] for name, entry in parts.checkpoint.tensors.items()}
    how = Changes(parts.sources, keys, journal.noise, journal.groups(first_step, steps), stored_dtypes)
    checkpoint, newer = parts.checkpoint, None
    if scales:  # a fold has these and nothing else
        how, newer = replace(how, sources=scale_tensors(parts), keys=scale_keys(parts), least=LEAST_SCALE), fold
    elif fold is not None:
        how, checkpoint = replace(how, sources=moved_sources(parts.sources, parts.checkpoint, fold)), fold
    replay(
        checkpoint, how, job.directory, newer=newer,
        side_files=job.side_files(model), io_backend=config.engine.io_backend, progress=job.progress,
    )  # fmt: skip


def _options(journal: Journal, parts: ModelParts) -> ZerothOrderOptions:
    """How the model of `parts` meets the updates of this journal: weights and scales are moved, packed weights have them in
    their products."""
    if _moves_scales(journal):
        return ZerothOrderOptions(parameters="scales")
    if not is_packed(parts):
        return ZerothOrderOptions(rounding=journal.about["rounding"])
    noise, rank = journal.noise
    return ZerothOrderOptions(noise=noise, rank=rank, perturb="products", fold_steps=journal.about["group_steps"])


def _check_whole(journal: Journal, run: Path, more: str) -> None:
    """Raises UserError when steps that the run in `run` has shown are not in its journal. more: what else can be done."""
    shown = last_step(run / "metrics.jsonl")
    if journal.torn_bytes or journal.steps < shown:
        found = f"metrics.jsonl has {shown}" if journal.steps < shown else "there is a part of another"
        raise UserError(
            f"{journal.path} has {journal.steps} whole steps, {found}: a process died while it wrote, or its end is damaged. "
            f"Bring it back from a copy, or let the run make the rest again with --resume{more}"
        )


def _result_step(journal: Journal, run: Path, is_free: bool) -> int:
    """After which step the run's weights are its result. is_free: whether it is over, or stopped."""
    best = read_best(run) if is_free else None
    return journal.steps if best is None else min(best["step"], journal.steps)


def _say(note: str) -> None:
    print(note, file=sys.stderr)
