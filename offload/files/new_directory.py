"""A directory that appears only once it is whole and durable."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def new_directory(directory: Path, *, private: bool = True) -> Iterator[Path]:
    """Gives a temporary directory to fill; at the end of the block its files are flushed to disk, and it takes the place of
    `directory`. Where that holds files of other names they stay, and those of the same names are replaced one by one.

    private: for the owner alone; else files have the access with which they were made, and the directory what the umask gives.

    After an error, which is raised on, nothing is left of it, and what was in `directory` is as it was. What safetensors could
    not write becomes the OSError that it was.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(mode=0o700 if private else 0o777, parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            if private and path.is_file():
                path.chmod(0o600)
            flush(path)
        if directory.is_dir() and _names(directory) - _names(temporary):
            for path in temporary.iterdir():
                path.replace(directory / path.name)
            temporary.rmdir()
            flush(directory)
        else:
            shutil.rmtree(directory, ignore_errors=True)
            temporary.rename(directory)
        flush(directory.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError) and (code := re.search(r"\(os error (\d+)\)", str(error))):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from error
        raise


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def flush(path: Path) -> None:
    """Makes what was written to a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
