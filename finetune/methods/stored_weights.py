"""What methods with gradients have made of a model's own weights: the newest committed step of a working store."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import resolve_model
from finetune.offload.update.export import export_store
from finetune.offload.update.parts import EXPERTS_APART, TrainedParts, find_trained
from finetune.offload.update.store import lock_store, read_manifest
from finetune.offload.update.stored_parts import StoredPieces, stored_parts
from finetune.offload.weights.parts import ModelParts, cut
from finetune.runs.directory import check_belongs, reading
from finetune.runs.exports import Export
from finetune.runs.identity import check_model, check_same_run, recorded_setting
from finetune.setup import Setup


def has_store(run: Path) -> bool:
    return (run / "store" / "manifest.json").is_file()


class StoredWeights(Setup):
    """The model with the weights of the run in `run`, read where they lie. No run begins there until `close`."""

    tuned = True

    def __init__(self, config: Config, run: Path) -> None:
        super().__init__(config)
        self._run = run
        self._held = ExitStack()
        try:
            if not self._held.enter_context(reading(run)):
                raise UserError(f"a run is writing in {run}: wait for it")
            self._manifest = read_manifest(run / "store")
            check_belongs(run, run / "store", self._manifest["about"])
            _check_whole(run / "store", self._manifest)
            self.result_step = self._manifest["step"]
        except BaseException:
            self.close()
            raise

    def check_model(self, directory: Path) -> None:
        """An adapter that lies beside the model is none of the run's."""

    def wrap(self, parts: ModelParts) -> tuple[nn.Module, ModelParts]:
        """Every stored byte is checked once, here."""
        config, about = self.config, self._manifest["about"]
        check_model(f"the run in {self._run} tuned", about["model"], parts, config.model)
        _, trained = _cut_as_trained(config, parts.directory, about)
        stored = StoredPieces.of(self._run / "store", self._manifest, trained)
        stored.check(config.engine.io_backend)
        print(f"note: with the weights that the run has tuned in {self._manifest['step']} steps", file=sys.stderr)
        return parts.model, stored_parts(parts, stored)

    def close(self) -> None:
        self._held.close()


def export_stored(job: Export) -> int:
    """Writes the model with the store of the run; returns its steps. Raises UserError."""
    store = job.config.output / "store"
    lock = lock_store(store)  # a run that goes on would write where this reads
    try:
        return _export_locked(job, store)
    finally:
        os.close(lock)


def _export_locked(job: Export, store: Path) -> int:
    config, manifest = job.config, read_manifest(store)
    steps, about = manifest["step"], manifest["about"]
    if job.run is not None:
        check_same_run(store, about, job.run)
    if job.at_step not in (None, steps):
        raise UserError(f"--at-step: a working store keeps its newest step only, which is {steps}; found {job.at_step}")
    _check_whole(store, manifest)
    model = resolve_model(config.model)
    parts, trained = _cut_as_trained(config, model, about)
    check_model(f"the run in {config.output} tuned", about["model"], parts, config.model)
    export_store(
        parts.checkpoint, parts.sources, StoredPieces.of(store, manifest, trained), job.directory,
        side_files=job.side_files(model), io_backend=config.engine.io_backend, progress=job.progress,
    )  # fmt: skip
    return steps


def _check_whole(store: Path, manifest: dict[str, Any]) -> None:
    if manifest["writing"]:
        raise UserError(f"{store} keeps one version of the weights and a process died while it wrote: they are a mixture")


def _cut_as_trained(config: Config, model: Path, about: dict[str, Any]) -> tuple[ModelParts, TrainedParts]:
    """The parts of the model in `model` as the run with this `about` has cut them."""
    parts = cut(
        model, trust_remote_code=config.trust_remote_code, trains_weights=True,
        streams_experts=about.get(EXPERTS_APART, False),
        tile_vocab=recorded_setting(about, "engine.loss_tile_vocab"),
    )  # fmt: skip
    return parts, find_trained(parts, recorded_setting(about, "train"))
