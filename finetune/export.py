"""The model as a zeroth-order run has moved it, written as a checkpoint of the original's kind, in a stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.config import Config
from memory.checkpoint import resolve_model
from memory.errors import UserError
from offload.block_store import TORCH_DTYPES
from offload.journal import Journal
from offload.model_parts import cut
from offload.perturbed import noise_keys
from offload.replay import moved_sources, newest_fold, replay

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def export(
    config: Config,
    directory: Path,
    at_step: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes `config.model` with the steps of the run in `config.output` to `directory`; returns how many steps.

    at_step: as of that step; None: all. Same files, names, shapes and dtypes as the original, with configuration and
    tokenizer. Memory does not depend on the model's size. Raises UserError.
    """
    path = config.output / "journal.zo"
    if not path.is_file():
        raise UserError(
            f"{config.output} has no journal.zo: export writes models that method zo has tuned. A LoRA adapter needs no "
            f"export, it is in {config.output / 'adapter'}"
        )
    journal = Journal.read(path)
    if journal.about["zo"]["parameters"] == "lora":
        raise UserError(f"this run tuned an adapter, not the model: it is in {config.output / 'adapter'}")
    steps = journal.steps if at_step is None else at_step
    if not 0 <= steps <= journal.steps:
        raise UserError(f"--at-step: expected 0 to {journal.steps}, the steps in {path}, found {at_step}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists: name a directory that does not, so that nothing is overwritten")
    model = resolve_model(config.model)
    if model.name != journal.about["model"]:
        raise UserError(f"the run in {config.output} tuned {journal.about['model']}, --model names {model.name}")
    parts = cut(model, trust_remote_code=config.trust_remote_code)
    keys = noise_keys(parts.sources, parts.parameters)
    checkpoint, sources, first_step = parts.checkpoint, parts.sources, 0
    if (folded := newest_fold(config.output / "weights", steps)) is not None:
        first_step, checkpoint = folded
        sources = moved_sources(parts.sources, parts.checkpoint, checkpoint)
    replay(
        checkpoint, sources, keys, journal.noise, journal.groups(first_step, steps), directory,
        stored_dtypes={name: TORCH_DTYPES[entry.dtype] for name, entry in parts.checkpoint.tensors.items()},
        side_files=[p for p in sorted(model.iterdir()) if p.is_file() and not p.name.endswith(_WEIGHTS)],
        io_backend=config.engine.io_backend, progress=progress,
    )  # fmt: skip
    return steps
