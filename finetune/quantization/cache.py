"""The cache of quantised models: a directory with one for each original and way of packing, which is whole as soon as it has
its name.

    NAME/                 config.json, weights, tokenizer: a checkpoint for any program; quantized.json says what of
    .NAME.partial/        one that was interrupted: the next run goes on with it
    .NAME.lock            locked by who makes or removes NAME, shared by who reads it
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import read_checkpoint
from finetune.offload.files.lock import lock
from finetune.offload.files.sealed import unseal
from finetune.offload.files.user_cache import user_cache
from finetune.offload.weights.digest import model_digest

FORMAT = 1
NOTE = "quantized.json"
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One of the cache."""

    name: str
    path: Path  # of the directory
    num_bytes: int  # that it takes
    about: dict[str, Any] | None  # what quantized.json says; None: it is not whole

    @property
    def is_whole(self) -> bool:
        return self.about is not None


def cache_home() -> Path:
    """Where quantised models are kept unless the user names a place."""
    return user_cache() / "quantized"


def cached_models(cache: Path) -> list[CachedModel]:
    """By name, unfinished ones among them; nothing where there is no such directory."""
    found = []
    for path in sorted(cache.iterdir() if cache.is_dir() else ()):
        is_partial = path.name.startswith(".") and path.name.endswith(_PARTIAL)
        if path.is_dir() and (is_partial or (path / NOTE).is_file()):
            num_bytes = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
            name = path.name[1 : -len(_PARTIAL)] if is_partial else path.name
            found.append(CachedModel(name, path, num_bytes, None if is_partial else _read_note(path)))
    return found


def remove_cached(cache: Path, name: str) -> int:
    """Removes what there is of a model, and returns how many bytes. Raises UserError when there is none of that name, or when a
    process is at it."""
    models = [model for model in cached_models(cache) if model.name == name]
    if not models:
        known = ", ".join(sorted({model.name for model in cached_models(cache)})) or "none"
        raise UserError(f"{cache}: expected a name of a quantised model, found {name!r}; there are: {known}")
    descriptor = open_lock(cache, name)
    try:
        lock(descriptor)
        for model in models:
            doomed = model.path
            if not doomed.name.startswith("."):  # out of the way first: what is half removed must not have a model's name
                aside = partial_path(cache, f"{name}.removed")
                shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed here
                doomed = doomed.rename(aside)
            shutil.rmtree(doomed)
    except BlockingIOError:
        raise UserError(f"{cache / name} is in use by another process: wait for it, or end it") from None
    finally:
        os.close(descriptor)
    return sum(model.num_bytes for model in models)


def partial_path(cache: Path, name: str) -> Path:
    """Of the directory in which a model is made."""
    return cache / f".{name}{_PARTIAL}"


def whole(path: Path) -> dict[str, Any] | None:
    """What quantized.json says of a model that is there and as it was written: sizes, headers and a sample of its weights.
    None: it is not there, or damaged."""
    about = _read_note(path)
    if about is None or about.get("format") != FORMAT:
        return None
    try:
        same = all((path / name).stat().st_size == size for name, size in about["files"].items())
        return about if same and model_digest(read_checkpoint(path)) == about["digest"] else None
    except (OSError, KeyError, AttributeError, UserError):
        return None


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        return unseal(json.loads((path / NOTE).read_bytes()))
    except (OSError, ValueError):
        return None


def open_lock(cache: Path, name: str) -> int:
    """The file whose lock says who is at a model: open, and not locked yet."""
    return os.open(cache / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
