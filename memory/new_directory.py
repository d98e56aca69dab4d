"""A directory that appears only once it is whole and durable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Gives a temporary directory to fill; at the end of the block its files are private and flushed to disk, and it takes the
    place of `directory`.

    After an error, which is raised on, nothing is left of it, and what was in `directory` is as it was.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(mode=0o700, parents=True)
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o600)
            _flush(path)
        _flush(temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        _flush(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
