"""What every export of a tuned model is given, and which files go along with its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.meter import host_bytes
from finetune.memory.units import available_host_bytes, format_bytes, parse_bytes, total_host_bytes

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".tflite", ".onnx", ".onnx_data",
    ".onnx.data", ".index.json",
)  # fmt: skip

Progress = Callable[[int, int], None]
"""Is told the bytes that are done, and of all."""


@dataclass(frozen=True, slots=True)
class Export:
    """One export of the run in `config.output`."""

    config: Config
    run: Mapping[str, Any] | None  # what run.json says of it; None: it began before there was one
    is_free: bool  # no process is at the run, which would write where this reads
    directory: Path  # to write; it does not exist, or is empty
    at_step: int | None  # the model as of that step; None: the last
    progress: Progress  # for whoever shows it

    def side_files(self, model: Path) -> dict[Path, Path]:
        """What goes along with the weights of the model in a directory."""
        return side_files(model, (self.config.output,))


def side_files(model: Path, without: Collection[Path]) -> dict[Path, Path]:
    """Path in the model's directory -> file, of all that stands beside the weights, in subdirectories too: configuration,
    tokenizer, chat templates, the model's own code, licence. Not weights in other formats, nor what runs have left.

    without: directories to pass over."""
    found, passed = {}, {path.resolve() for path in without}
    for folder, subfolders, names in os.walk(model):
        inside = Path(folder)
        subfolders[:] = [
            name for name in sorted(subfolders) if not name.startswith(".") and (inside / name).resolve() not in passed
        ]
        for path in (inside / name for name in sorted(names)):
            if path.is_file() and not path.name.endswith(_WEIGHTS):
                found[path.relative_to(model)] = path
    return found


def check_new(directory: Path) -> None:
    """Raises UserError for a place where there is something already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists: name a directory that does not, so that nothing is overwritten")


def check_memory(config: Config, need: int, doing: str, of: str) -> None:
    """need: bytes of host memory that the process will take more. doing, of: what for, in the message. Raises UserError where
    the limit does not allow them."""
    try:
        amount = config.host_memory
        limit = host_bytes() + available_host_bytes() if amount is None else parse_bytes(amount, total_host_bytes())
    except ValueError as error:
        raise UserError(f"host_memory: {error}") from None
    if host_bytes() + need > limit:
        raise UserError(
            f"{doing} takes {format_bytes(host_bytes() + need)} of host memory ({format_bytes(need)} for {of}), "
            f"{format_bytes(limit)} are "
            + ("available: end what else uses it" if amount is None else "allowed: raise --host-memory")
        )
