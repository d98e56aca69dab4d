"""The model as a run has changed it, written as a checkpoint of the original's kind, in a stream."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.runs.directory import reading, recorded
from finetune.runs.identity import check_model, check_same_run, recorded_setting
from finetune.runs.tuned_weights import check_whole
from memory.errors import UserError
from offload.files.checkpoint import resolve_model
from offload.perturb.folds import newest_fold
from offload.perturb.journal import Journal
from offload.perturb.replay import Changes, moved_sources, replay
from offload.perturb.variants import noise_keys
from offload.update.export import export_store
from offload.update.parts import find_trained
from offload.update.store import lock_store, read_manifest
from offload.update.stored_parts import StoredPieces
from offload.weights.formats.plain import TORCH_DTYPES
from offload.weights.parts import cut

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".tflite", ".onnx", ".onnx_data",
    ".onnx.data", ".index.json",
)  # fmt: skip

Progress = Callable[[int, int], None]
"""Is told the bytes that are done, and of all."""


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
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists: name a directory that does not, so that nothing is overwritten")
    run = recorded(config.output)
    method = run["method"] if run else None
    with reading(config.output) as is_free:
        if (config.output / "journal.zo").is_file() and method in (None, "zo"):
            return _export_journal(config, run, is_free, directory, at_step, progress)
        if (config.output / "store" / "manifest.json").is_file() and method not in ("lora", "zo"):
            return _export_store(config, run, directory, at_step, progress)
    adapter = config.output / "adapter"
    found = f"found an adapter, which needs no export: it is in {adapter}" if adapter.is_dir() else "found none of these"
    raise UserError(
        f"{config.output}: expected a run that has tuned a model's own weights (journal.zo or store/manifest.json), {found}"
    )


def _export_store(
    config: Config, run: Mapping[str, Any] | None, directory: Path, at_step: int | None, progress: Progress
) -> int:
    lock = lock_store(config.output / "store")  # a run that goes on would write where this reads
    try:
        return _export_locked_store(config, run, directory, at_step, progress)
    finally:
        os.close(lock)


def _export_locked_store(
    config: Config, run: Mapping[str, Any] | None, directory: Path, at_step: int | None, progress: Progress
) -> int:
    store = config.output / "store"
    manifest = read_manifest(store)
    steps, about = manifest["step"], manifest["about"]
    if run is not None:
        check_same_run(store, about, run)
    if at_step not in (None, steps):
        raise UserError(f"--at-step: a working store keeps its newest step only, which is {steps}; found {at_step}")
    if manifest["writing"]:
        raise UserError(f"{store} keeps one version of the weights and a process died while it wrote: they are a mixture")
    model = resolve_model(config.model)
    parts = cut(
        model, trust_remote_code=config.trust_remote_code, trains_weights=True,
        tile_vocab=recorded_setting(about, "engine.loss_tile_vocab"),
    )  # fmt: skip
    check_model(f"the run in {config.output} tuned", about["model"], parts, config.model)
    stored = StoredPieces.of(store, manifest, find_trained(parts, recorded_setting(about, "train")))
    export_store(
        parts.checkpoint, parts.sources, stored, directory,
        side_files=_side_files(config, model), io_backend=config.engine.io_backend, progress=progress,
    )  # fmt: skip
    return steps


def _export_journal(
    config: Config,
    run: Mapping[str, Any] | None,
    is_free: bool,
    directory: Path,
    at_step: int | None,
    progress: Progress,
) -> int:
    path = config.output / "journal.zo"
    journal = Journal.read(path)
    if run is not None:
        check_same_run(path, journal.about, run)
    if recorded_setting(journal.about, "zo.parameters") != "all":
        raise UserError(f"this run tuned an adapter, not the model: it is in {config.output / 'adapter'}")
    if at_step is None and is_free:  # of a run that is under way, the newest step may not be whole yet
        check_whole(journal, config.output, f", or export what is whole with --at-step {journal.steps}")
    steps = journal.steps if at_step is None else at_step
    if not 0 <= steps <= journal.steps:
        raise UserError(f"--at-step: expected 0 to {journal.steps}, the steps in {path}, found {at_step}")
    model = resolve_model(config.model)
    parts = cut(model, trust_remote_code=config.trust_remote_code)
    check_model(f"the run in {config.output} tuned", journal.about["model"], parts, config.model)
    keys = noise_keys(parts.sources, parts.parameters)
    checkpoint, sources, first_step = parts.checkpoint, parts.sources, 0
    # A run that is under way removes folded weights; the journal alone gives the same.
    weights = config.output / "weights"
    folded = newest_fold(weights, journal, steps, config.engine.io_backend, _say) if is_free else None
    if folded is not None:
        first_step, checkpoint = folded
        sources = moved_sources(parts.sources, parts.checkpoint, checkpoint)
    stored_dtypes = {name: TORCH_DTYPES[entry.dtype] for name, entry in parts.checkpoint.tensors.items()}
    changes = Changes(sources, keys, journal.noise, journal.groups(first_step, steps), stored_dtypes)
    replay(
        checkpoint, changes, directory,
        side_files=_side_files(config, model), io_backend=config.engine.io_backend, progress=progress,
    )  # fmt: skip
    return steps


def _say(note: str) -> None:
    print(note, file=sys.stderr)


def _side_files(config: Config, model: Path) -> dict[Path, Path]:
    """Path in the model's directory -> file, of all that stands beside the weights, in subdirectories too: configuration,
    tokenizer, chat templates, the model's own code, licence. Not weights in other formats, nor what runs have left in there."""
    found = {}
    for folder, subfolders, names in os.walk(model):
        inside = Path(folder)
        subfolders[:] = [
            name for name in sorted(subfolders)
            if not name.startswith(".") and (inside / name).resolve() != config.output.resolve()
        ]  # fmt: skip
        for path in (inside / name for name in sorted(names)):
            if path.is_file() and not path.name.endswith(_WEIGHTS):
                found[path.relative_to(model)] = path
    return found
