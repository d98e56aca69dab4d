"""What a run has made of a model's own weights, for those who measure it: read where the run keeps it, nothing is exported.

Both kinds give the skeleton `parts` that read the tuned bytes; after a zeroth-order run, what no folded weights hold is
applied while blocks are fetched, as the run itself does it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from finetune.adapters.seal import made_by
from finetune.config import Config
from finetune.methods.perturbation_needs import PerturbedWeights, perturbed_weights
from finetune.methods.zeroth_order_options import ZerothOrderOptions
from finetune.reporting.report import last_step
from finetune.runs.directory import reading, recorded
from finetune.runs.identity import check_model, check_same_run, recorded_setting
from memory.errors import UserError
from offload.files.checkpoint import Checkpoint
from offload.perturb.folds import newest_fold
from offload.perturb.journal import Journal
from offload.perturb.perturbed_weights import PerturbedWeights as VariantsOfWeights
from offload.update.parts import find_trained
from offload.update.store import read_manifest
from offload.update.stored_parts import StoredPieces, stored_parts
from offload.weights.parts import ModelParts, cut


class StoredWeights:
    """Of the methods with gradients: the newest committed step of a working store. No run begins there until `close`."""

    def __init__(self, config: Config, run: Path) -> None:
        self._config = config
        self._run = run
        self._held = ExitStack()
        try:
            if not self._held.enter_context(reading(run)):
                raise UserError(f"a run is writing in {run}: wait for it")
            self._manifest = read_manifest(run / "store")
            _check_same_run(run, run / "store", self._manifest["about"])
            if self._manifest["writing"]:
                raise UserError(
                    f"{run / 'store'} keeps one version of the weights and a process died while it wrote: they are a mixture"
                )
        except BaseException:
            self.close()
            raise
        self.num_steps: int = self._manifest["step"]

    def place(self, parts: ModelParts) -> ModelParts:
        """`parts` of the original, with their bytes where they are now. Every stored byte is checked once, here."""
        config, about = self._config, self._manifest["about"]
        check_model(f"the run in {self._run} tuned", about["model"], parts, config.model)
        units = cut(
            parts.directory, trust_remote_code=config.trust_remote_code, trains_weights=True,
            tile_vocab=recorded_setting(about, "engine.loss_tile_vocab"),
        )  # fmt: skip
        trained = find_trained(units, recorded_setting(about, "train"))
        stored = StoredPieces.of(self._run / "store", self._manifest, trained)
        stored.check(config.engine.io_backend)
        return stored_parts(parts, stored)

    def close(self) -> None:
        self._held.close()


class JournalWeights:
    """Of zeroth-order tuning: all whole steps of a journal. No run begins there until `close`; one that is under way is not
    hindered."""

    def __init__(self, config: Config, run: Path) -> None:
        self._config = config
        self._run = run
        self._fold: Checkpoint | None = None
        self._folded_steps = 0
        self._held = ExitStack()
        try:
            self._is_free = self._held.enter_context(reading(run))
            self.journal = Journal.read(run / "journal.zo")
            _check_same_run(run, self.journal.path, self.journal.about)
            if self._is_free:  # of a run that is under way, the newest step may not be whole yet
                check_whole(self.journal, run, "")
        except BaseException:
            self.close()
            raise

    @property
    def num_steps(self) -> int:
        return self.journal.steps

    def place(self, parts: ModelParts) -> ModelParts:
        """`parts` as they are: the model is moved once it is open."""
        check_model(f"the run in {self._run} tuned", self.journal.about["model"], parts, self._config.model)
        whole = self.journal.steps - self.journal.steps % self.journal.about["group_steps"]
        # A run that is under way removes folded weights; the journal alone gives the same.
        if self._is_free:
            weights, io_backend = self._run / "weights", self._config.engine.io_backend
            folded = newest_fold(weights, self.journal, whole, io_backend, lambda note: print(note, file=sys.stderr))
            self._folded_steps, self._fold = folded or (0, None)
        return parts

    def as_perturbed(self, parts: ModelParts) -> PerturbedWeights:
        options = ZerothOrderOptions(rounding=self.journal.about["rounding"])
        # Steps none or unknown: whether there is room for folded weights, which may be wider.
        return perturbed_weights(parts, options, 0 if self._fold is None else None)

    def move(self, weights: VariantsOfWeights) -> None:
        """Makes the weights of the open model, which are the original's, those of the last step."""
        if self._fold is not None:
            weights.move_to(self._fold)
        weights.perturbation.pending = self.journal.groups(self._folded_steps)

    def close(self) -> None:
        self._held.close()


def as_trained(config: Config, run: Path | str | None) -> Config:
    """`config` with the chat template that the run in `run` was given, where it names none: what the model reads is to be
    what it was tuned on. run: also an adapter's directory or hub id, which names none."""
    about = None if run is None or config.dataset.chat_template is not None else recorded(Path(run).expanduser())
    if about is None or (template := recorded_setting(about, "dataset.chat_template")) is None:
        return config
    return config.model_copy(update={"dataset": config.dataset.model_copy(update={"chat_template": template})})


def was_trained_on_plain_prompts(run: Path | str) -> bool:
    """Whether the run in `run` has seen no chat template: its model is to be asked without one."""
    about = recorded(Path(run).expanduser())
    return about is not None and about.get("data", {}).get("prompts") == "plain"


def find_result(config: Config, run: Path) -> StoredWeights | JournalWeights | Path:
    """What the run in `run` has tuned: the model's weights, or an adapter, whose directory this is then; `run` may be that of
    an adapter itself. Raises UserError when there is neither."""
    if (run / "adapter_config.json").is_file():
        return run
    about = recorded(run)
    method = about["method"] if about else None
    if (run / "journal.zo").is_file() and method in (None, "zo"):
        if recorded_setting(Journal.read(run / "journal.zo").about, "zo.parameters") == "all":
            return JournalWeights(config, run)
    elif (run / "store" / "manifest.json").is_file() and method not in ("lora", "zo"):
        return StoredWeights(config, run)
    if (run / "adapter" / "adapter_config.json").is_file():
        _check_same_run(run, run / "adapter", made_by(run / "adapter"))
        return run / "adapter"
    raise UserError(
        f"{run} is not an adapter (expected adapter_config.json in it), nor does it hold what a run has tuned: if one was "
        "stopped there, let it end with --resume"
    )


def check_whole(journal: Journal, run: Path, more: str) -> None:
    """Raises UserError when steps that the run in `run` has shown are not in its journal. more: what else can be done."""
    shown = last_step(run / "metrics.jsonl")
    if journal.torn_bytes or journal.steps < shown:
        found = f"metrics.jsonl has {shown}" if journal.steps < shown else "there is a part of another"
        raise UserError(
            f"{journal.path} has {journal.steps} whole steps, {found}: a process died while it wrote, or its end is damaged. "
            f"Bring it back from a copy, or let the run make the rest again with --resume{more}"
        )


def _check_same_run(run: Path, place: Path, found: Mapping[str, Any]) -> None:
    about = recorded(run)
    if about is not None:
        check_same_run(place, found, about)
