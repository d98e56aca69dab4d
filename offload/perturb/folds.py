"""Folded weights: what a run has made of its first steps, so that they need not be applied again and again.

Each is a checkpoint in a directory of its own, `step-N`, with checksums beside it and the digest of the N steps that are in it.
The journal is complete, so one that is damaged, lost or another run's is passed over, and made again: that costs a pass over
the weights and changes no bit.

[Note: when folds are checked]
Once, when a process takes one up: all of it is read in a stream, which costs as much as the reading of one step. Blocks, rows
of the embedding and chunks of the head are then read again in every step in pieces of all sizes, for which a checksum would
have to be kept each; a file that goes bad within the process is the disk's fault to report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from finetune.offload.files.sealed import file_checksum, seal, unseal
from finetune.offload.perturb.journal import Journal
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.pieces import new_pool, pass_through
from finetune.offload.update.kernels import checksum

CHECKSUMS = "checksums.json"
_BUFFERS = 4
_NAME = re.compile(r"step-\d{8}")

WrittenRange = tuple[int, int, int]
"""(offset in its file, bytes, kernels.checksum of them)"""


def write_checksums(directory: Path, steps: str, weights: Mapping[str, Sequence[WrittenRange]]) -> None:
    """Says what was written to `directory`: the digest of its steps, and the ranges, without gaps, of every file of weights."""
    others = {path.name: file_checksum(path) for path in directory.glob("*.index.json")}
    content = seal({"steps": steps, "weights": weights, "others": others})
    (directory / CHECKSUMS).write_text(json.dumps(content, separators=(",", ":")))


def folds(folder: Path) -> list[Path]:
    """The checkpoints among a run's folded weights, oldest first; what else is in `folder` is somebody else's."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def newest_fold(
    folder: Path, journal: Journal, last_step: int, io_backend: str, passed_over: Callable[[str], None]
) -> tuple[int, Checkpoint] | None:
    """The newest whole checkpoint in `folder` that `journal` leads to by step `last_step`, and its step.

    passed_over: is told of each that cannot be used, and why.
    """
    for path in reversed(folds(folder)):
        step = int(path.name.removeprefix("step-"))
        if step > last_step:
            continue
        try:
            _check(path, journal.digest(step), io_backend)
            return step, read_checkpoint(path)
        except CheckpointError as error:
            passed_over(f"note: {path} is passed over ({error}); older weights and the journal give the same bits")
    return None


def _check(directory: Path, steps: str, io_backend: str) -> None:
    """Raises CheckpointError unless all bytes are those that were written for these steps."""
    try:
        content = unseal(json.loads((directory / CHECKSUMS).read_text()))
        if content["steps"] != steps:
            raise CheckpointError("it was made of other steps than this journal's")
        for name, expected in content["others"].items():
            if file_checksum(directory / name) != expected:
                raise CheckpointError(f"{name} is damaged")
        with IOEngine(io_backend) as io:
            for name, written in content["weights"].items():
                _check_weights(io, directory / name, written)
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is not there") from error
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{CHECKSUMS} is damaged ({error})") from error


def _check_weights(io: IOEngine, path: Path, written: Sequence[WrittenRange]) -> None:
    end = sum(num_bytes for _, num_bytes, _ in written)
    if path.stat().st_size != end:
        raise CheckpointError(f"{path.name} has {path.stat().st_size} bytes, expected {end}")
    pool, file = new_pool(max(num_bytes for _, num_bytes, _ in written), _BUFFERS), io.open(path)
    try:
        for (offset, num_bytes, expected), piece in pass_through(io, pool, ((r, file, r[0], r[1]) for r in written)):
            if checksum(piece.buffer, num_bytes) != expected:
                raise CheckpointError(f"{path.name} is damaged: {num_bytes} bytes at {offset} do not match their checksum")
    except UserError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(str(error)) from error
    finally:
        io.close_file(file)
