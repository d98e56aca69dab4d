"""The model as a run has changed it, written as a checkpoint of the original's kind, in a stream."""

from __future__ import annotations

from pathlib import Path

from finetune.config import Config
from finetune.methods.results import makers
from finetune.runs.directory import reading, recorded
from finetune.runs.exports import Export, Progress, check_new
from memory.errors import UserError


def export(
    config: Config,
    directory: Path,
    at_step: int | None = None,
    progress: Progress = lambda done, total: None,
) -> int:
    """Writes `config.model` with the steps of the run in `config.output` to `directory`; returns how many steps.

    at_step: as of that step; None: all, the only choice but for method zo. Same files, names, shapes and dtypes as the
    original, with every file beside its weights, and readable by others as the umask says. Memory does not depend on the
    model's size. Raises UserError.
    """
    check_new(directory)
    run = recorded(config.output)
    with reading(config.output) as is_free:
        job = Export(config, run, is_free, directory, at_step, progress)
        for method in makers(run):
            if (steps := method.export(job)) is not None:
                return steps
    adapter = config.output / "adapter"
    found = "found none of these"
    if adapter.is_dir():
        found = f"found an adapter: {adapter} needs no export; --merge merges it into the model"
    raise UserError(
        f"{config.output}: expected a run that has tuned a model's own weights (journal.zo or store/manifest.json), {found}"
    )
