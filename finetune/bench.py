"""`finetune bench`: this machine, measured once and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from finetune.machines.kept import keep_profile
from finetune.machines.words import describe_machine
from finetune.memory.machine import MachineProfile
from finetune.offload.devices import choose_device
from finetune.offload.files.checkpoint import is_gguf, read_checkpoint, resolve_model
from finetune.offload.rates.disk import nearest_directory
from finetune.offload.rates.machine import Effort, FileRange, measure_machine


class Measured(NamedTuple):
    profile: MachineProfile
    path: Path
    """Where it is kept."""


def bench(
    output: str,
    model: str | None,
    device: str,
    say: Callable[[str], None] = lambda words: None,
    effort: Effort | None = None,
) -> Measured:
    """output: a directory on the drive that runs write to; it need not be there. model: a directory or hub id, whose drive is
    read where it is another. device: of `DEVICE_WORDS`. Raises UserError."""
    ranges: list[FileRange] = []
    directory = None
    if model is not None:
        source = resolve_model(model)
        directory = source.parent if is_gguf(source) else source
        ranges = _ranges(source)
    there = choose_device(device)
    try:
        profile = measure_machine(there, nearest_directory(Path(output)), ranges, directory, effort, say)
    finally:
        there.close()
    return Measured(profile, keep_profile(profile))


def describe(measured: Measured) -> str:
    return f"{describe_machine(measured.profile)}\nkept in {measured.path}"


def _ranges(source: Path) -> list[FileRange]:
    """The bytes of a model's files, the largest file first."""
    files = [source] if is_gguf(source) else read_checkpoint(source).files
    sizes = {path: path.stat().st_size for path in files}
    return [(path, 0, sizes[path]) for path in sorted(files, key=sizes.__getitem__, reverse=True)]
