"""A directory of a checkpoint that appears only once it is whole and durable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from memory.checkpoint import Checkpoint
from memory.errors import UserError


@contextmanager
def new_checkpoint(directory: Path, original: Checkpoint, side_files: Sequence[Path]) -> Iterator[Path]:
    """Gives a temporary directory to write (and flush) weights to, named as those of `original`; at the end of the block
    the index and `side_files` are copied beside them, all files made private, and the directory takes the place of
    `directory`.

    After an error nothing is left of it, and what was in `directory` is as it was. Raises UserError for an OSError.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(mode=0o700, parents=True)
        yield temporary
        for path in (*original.directory.glob("*.index.json"), *side_files):
            shutil.copyfile(path, temporary / path.name)
        for path in temporary.iterdir():
            path.chmod(0o600)
        _sync(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        _sync(directory.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the weights to {directory}: {error.strerror or error}. Make room, or name another directory; "
            "nothing that was there before is lost"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
