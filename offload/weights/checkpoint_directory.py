"""A checkpoint that is written beside what it takes the place of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import Checkpoint
from finetune.offload.files.new_directory import new_directory


@contextmanager
def new_checkpoint(
    directory: Path, original: Checkpoint, side_files: Mapping[Path, Path] | None
) -> Iterator[Path]:
    """Gives a temporary directory with the index of `original` and `side_files`, to write weights to that are named as its; at
    the end of the block it takes the place of `directory`, as `new_directory` has it.

    side_files: path in the directory -> file; others may read the directory then as the umask says. None: a run's own weights,
    private and with nothing beside them.

    Raises UserError for an OSError.
    """
    try:
        with new_directory(directory, private=side_files is None) as temporary:
            indices = {Path(path.name): path for path in original.directory.glob("*.safetensors.index.json")}
            for name, path in (indices | (side_files or {})).items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, temporary / name)
            yield temporary
    except OSError as error:
        raise UserError(
            f"cannot write the weights to {directory}: {error.strerror or error}. Make room, or name another directory; "
            "nothing that was there before is lost"
        ) from error
