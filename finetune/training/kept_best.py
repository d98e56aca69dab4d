"""The adapter of the best step: kept while a run goes on, its result when it ends."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.memory.errors import UserError
from finetune.methods.base import Method
from finetune.offload.files.new_directory import new_directory
from finetune.offload.files.sealed import seal
from finetune.reporting.report import write_report
from finetune.runs.best import BEST, BEST_FILE, BestStep, best_directory


class KeptBest:
    """What a run keeps of its best step, and at its end leaves in place of the last one's: adapters as directories, of weights
    that the journal tells nothing but the step.

    Until the state after a better step is durable, the one before stays.
    """

    def __init__(self, method: Method, best: BestStep) -> None:
        """Raises UserError where the best step of earlier processes is lost."""
        self._method = method
        self._best = best
        self._output = method.config.output
        if best.step and method.adapter_directory is not None and not self._directory.is_dir():
            raise UserError(
                f"training.load_best_model_at_end: {self._directory}, the adapter of the best step so far, is missing: bring "
                "it back from a copy, or set training.load_best_model_at_end to false"
            )

    @property
    def _directory(self) -> Path:
        return best_directory(self._output, self._best.step)

    def keep(self) -> None:
        """The best step is that of now."""
        if self._method.adapter_directory is not None:
            self._method.write_adapter(self._directory, self._best.step)

    def forget_others(self) -> None:
        for path in (self._output / BEST).glob("step-*"):
            if path != self._directory:
                shutil.rmtree(path, ignore_errors=True)

    def finish(self) -> None:
        """The run's result is the best step's. Raises UserError: the disk is full."""
        target = self._method.adapter_directory
        if not self._best.step:  # no evaluation was a number
            return
        if target is not None:
            try:
                with new_directory(target) as temporary:
                    shutil.copytree(self._directory, temporary, dirs_exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot write the adapter to {target}: {error.strerror or error}. Make room or mend it, then go on with "
                    f"--resume; the best one is in {self._directory}"
                ) from error
        write_report(self._output / BEST_FILE, seal(self._best.about))
