"""What a run has left, for those who measure the model or speak with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters import saved
from finetune.adapters.seal import WEIGHTS, made_by, step_of, trained_on
from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.methods.base import Method
from finetune.methods.registry import METHODS
from finetune.offload.files.checkpoint import TensorEntry, read_header
from finetune.offload.weights.parts import ModelParts
from finetune.runs.directory import check_belongs, recorded
from finetune.runs.identity import check_model
from finetune.session import Session
from finetune.setup import Setup


class SavedAdapter(Setup):
    """The model with the adapter in `directory`, a run's or any other's, around it."""

    def __init__(self, config: Config, directory: Path) -> None:
        super().__init__(config)
        self._directory = directory

    def check_model(self, directory: Path) -> None:
        """An adapter that lies beside the model is this one, or does not matter."""

    def wrap(self, parts: ModelParts) -> tuple[nn.Module, ModelParts]:
        config, adapter = self.config, self._directory
        base = trained_on(adapter)
        if base is not None:
            check_model(f"the adapter in {adapter} was trained on", base, parts, config.model)
        model, parts = saved.load(parts, adapter)
        if base is None and (other := saved.differing_base(adapter, config.model)):
            self.notes.append(f"note: the adapter {adapter} says that it was trained on {other}")
        return model, parts

    def check_reference(self, session: Session) -> None:
        super().check_reference(session)
        if saved.replaces_modules(self._directory):
            raise UserError(
                f"training.objective {self.config.objective}: expected an adapter without modules_to_save, whose modules are "
                f"read in place of the base's where an adapter is loaded, found them in {self._directory}: evaluate within the "
                "run (--eval-data)"
            )

    def own_tensors(self) -> list[TensorEntry]:
        return read_header(self._directory / WEIGHTS)


def find_result(config: Config, adapter: Path | str | None) -> Setup:
    """adapter: a saved adapter (a directory or a hub id), or the directory of a run, whose result is meant: its adapter, or the
    weights that it has tuned. None: the model as it is. Raises UserError when there is neither."""
    if adapter is None:
        return Setup(config)
    run = saved.find(adapter)
    if (run / "adapter_config.json").is_file():
        return SavedAdapter(config, run)
    for method in makers(recorded(run)):
        if (tuned := method.tuned_weights(config, run)) is not None:
            return tuned
    if (run / "adapter" / "adapter_config.json").is_file():
        check_belongs(run, run / "adapter", made_by(run / "adapter"))
        setup = SavedAdapter(config, run / "adapter")
        setup.result_step = step_of(run / "adapter")
        return setup
    raise UserError(
        f"{run} is not an adapter (expected adapter_config.json in it), nor does it hold what a run has tuned: if one was "
        "stopped there, let it end with --resume"
    )


def makers(run: Mapping[str, Any] | None) -> list[type[Method]]:
    """The method that has made a run, by what its run.json says; all, where there is none."""
    entry = None if run is None else METHODS.get(run["method"])
    entries = METHODS.values() if entry is None else [entry]
    return list(dict.fromkeys(entry.load() for entry in entries))
