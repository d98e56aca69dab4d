"""The model as a run has changed it, written as a checkpoint of the original's kind, in a stream."""

from __future__ import annotations

import tempfile
from pathlib import Path

from finetune.config import Config
from finetune.gguf_adapter import write_adapter
from finetune.gguf_export import check_target, write_model
from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes
from finetune.methods.results import makers
from finetune.offload.files.checkpoint import resolve_model
from finetune.offload.rewrite.gguf_contents import check_type
from finetune.runs.directory import reading, recorded
from finetune.runs.exports import Export, Progress, check_new
from finetune.runs.model_card import CARD, model_card


def export_gguf(
    config: Config,
    target: Path,
    kind: str,
    adapter: Path | str | None = None,
    at_step: int | None = None,
    progress: Progress = lambda done, total: None,
) -> str:
    """Writes a GGUF file `target` for llama.cpp, and returns what it is, for people: a run's or another adapter, the model with
    the weights that a run has tuned, or the model as it is where no run is named. kind: of `GGUF_TYPES`.

    The weights of a tuned model are written beside `target` first, as `export` does it. Raises UserError.
    """
    check_type(kind)
    check_target(target)
    named = config.output if "output" in config.model_fields_set else None
    if adapter is not None or named is not None and (named / "adapter").is_dir():
        num_bytes = write_adapter(config, target, kind, adapter, progress)
        return f"{target}: the adapter alone, {format_bytes(num_bytes)}; --merge plain merges it into the model"
    if named is None:
        return f"{target}: the model, {format_bytes(write_model(config, target, kind, None, progress))}"
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as temporary:
        tuned = Path(temporary) / "model"
        steps = export(config, tuned, at_step, progress)
        num_bytes = write_model(config, target, kind, tuned, progress)
    return f"{target}: the model after {steps} steps, {format_bytes(num_bytes)}"


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
                words = f"The base model after {steps} steps of tuning, made with finetune."
                base = resolve_model(config.model)
                card = model_card(config.output, config.model, "transformers", words, base / CARD)
                try:
                    (directory / CARD).write_text(card, encoding="utf-8")
                except OSError as error:
                    raise UserError(
                        f"the model is written, but not {directory / CARD}: {error.strerror or error}. Make room, or do without"
                    ) from error
                return steps
    adapter = config.output / "adapter"
    found = "found none of these"
    if adapter.is_dir():
        found = f"found an adapter: {adapter} needs no export; --merge merges it into the model"
    raise UserError(
        f"{config.output}: expected a run that has tuned a model's own weights (journal.zo or store/manifest.json), {found}"
    )
