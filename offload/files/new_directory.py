"""A directory that appears only once it is whole and durable."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from finetune.offload.files.lock import lock


@contextmanager
def new_directory(directory: Path, *, private: bool = True) -> Iterator[Path]:
    """Gives a temporary directory to fill; at the end of the block its files are flushed to disk, and it takes the place of
    `directory`. Where that holds files of other names they stay, and those of the same names are replaced one by one.

    private: for the owner alone; else files have the access with which they were made, and the directory what the umask gives.

    After an error, which is raised on, nothing is left of it, and what was in `directory` is as it was. What safetensors could
    not write becomes the OSError that it was. What a killed process has left of the same directory is removed.
    """
    _remove_left(directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    held = -1
    try:
        temporary.mkdir(mode=0o700 if private else 0o777, parents=True)
        held = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        lock(held)
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
    finally:
        if held >= 0:
            os.close(held)


def _remove_left(directory: Path) -> None:
    """What killed processes have left of the same directory: no process has the number in its name, and none its lock."""
    prefix = f".{directory.name}."
    for path in directory.parent.glob(f"{escape(prefix)}*.tmp"):
        number = path.name[len(prefix) : -len(".tmp")]
        if not number.isdecimal() or Path("/proc", number).exists() or path.is_symlink():
            continue
        with suppress(OSError):  # of another user, or locked by a process that is not seen from here, as in another container
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if lock(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def flush(path: Path) -> None:
    """Makes what was written to a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
