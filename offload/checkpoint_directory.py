"""A checkpoint that is written beside what it takes the place of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from memory.checkpoint import Checkpoint
from memory.errors import UserError
from memory.new_directory import new_directory


@contextmanager
def new_checkpoint(directory: Path, original: Checkpoint, side_files: Sequence[Path]) -> Iterator[Path]:
    """Gives a temporary directory to write weights to, named as those of `original`; at the end of the block the index and
    `side_files` are copied beside them, and the directory takes the place of `directory`, as `new_directory` has it.

    Raises UserError for an OSError.
    """
    try:
        with new_directory(directory) as temporary:
            yield temporary
            for path in (*original.directory.glob("*.index.json"), *side_files):
                shutil.copyfile(path, temporary / path.name)
    except OSError as error:
        raise UserError(
            f"cannot write the weights to {directory}: {error.strerror or error}. Make room, or name another directory; "
            "nothing that was there before is lost"
        ) from error
