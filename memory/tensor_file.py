"""Torch's CPU tensors in a file: what the hidden states of long texts take is a question of the disk.

[Note: tensors in a file]
Inside `in_file`, what torch allocates lies in a scratch file that is mapped into memory, not in the arena. To PyTorch these are
tensors like any other, with the same bits. The kernel writes their pages to the disk and reads them back as it needs memory;
they are no part of what a process must hold. So nothing has to know which of a model's tensors are as long as a text: whatever
its own code makes of them outside of blocks is in the file. A visit says which parts it is done with (`let_go`), which are the
first to leave, and what comes next (`fetch_soon`).

Room for all of it is taken from the disk when the file is opened, so that a full disk is one message. What could not be written
is told by `TensorFile.check`, which is called before a step's result is used. A page that cannot be read ends the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes

if TYPE_CHECKING:
    import torch

MIN_BYTES = 256 * 1024
"""Of a tensor in the file: smaller ones are not worth it."""

_thread = threading.local()
_open: TensorFile | None = None


class TensorFile:
    """The process's one file, until `close`. It has no name, and goes with the process."""

    def __init__(self, directory: Path, num_bytes: int) -> None:
        """Raises UserError where there is no room for `num_bytes` in `directory`, or tensors can't lie in files here."""
        global _open
        try:
            from finetune_native import arena as native
        except ImportError as error:
            raise UserError(f"engine.hidden_states: no tensors can be on disk, because {error}: set it to host") from error
        self._native = native
        try:
            file = _scratch_file(directory, num_bytes)
        except OSError as error:
            raise UserError(
                f"cannot write {format_bytes(num_bytes)} to {directory}, for hidden states on disk: {error.strerror}. Mend it, "
                "or name another --output"
            ) from error
        try:
            native.map_file(file, num_bytes)
        except RuntimeError as error:
            raise UserError(f"cannot map {format_bytes(num_bytes)} of a file in {directory}: {error}") from error
        finally:
            os.close(file)  # what is mapped has a descriptor of its own
        _open = self

    def check(self) -> None:
        """Raises UserError where something could not be written since this was called last."""
        if code := self._native.file_error():
            raise UserError(f"hidden states could not be written to disk: {os.strerror(code)}: the step is not used")

    @property
    def used_bytes(self) -> int:
        """Of tensors that are there now."""
        return self._native.bytes_in_file()

    @property
    def beside_bytes(self) -> int:
        """Of tensors that were to lie in it and found no room, all together: they were in memory, beside what is planned."""
        return self._native.bytes_beside_file()

    def close(self) -> None:
        """Tensors that are there stay valid."""
        global _open
        if _open is self:
            _open = None
            self._native.map_file(-1, 0)


@contextlib.contextmanager
def in_file(inside: bool = True) -> Iterator[None]:
    """What this thread allocates inside lies in the file, where one is open. See [Note: tensors in a file].

    inside: False: in memory, inside of another `in_file`.
    """
    before, native = allocates_in_file(), None if _open is None else _open._native
    _thread.inside = inside
    before_bytes = 0 if native is None else native.set_in_file(MIN_BYTES if inside else 0)
    try:
        yield
    finally:
        _thread.inside = before
        if native is not None:
            native.set_in_file(before_bytes)


def allocates_in_file() -> bool:
    """Whether this thread is inside of `in_file`, with a file or without."""
    return getattr(_thread, "inside", False)


def beside_file_bytes() -> int:
    """`TensorFile.beside_bytes` of the file that is open; 0 without one."""
    return 0 if _open is None else _open.beside_bytes


def moved_to_file(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the file; itself where there is none, or it is small."""
    if _open is None or tensor.nbytes < MIN_BYTES:
        return tensor
    with in_file():
        return tensor.detach().clone()


def let_go(part: torch.Tensor) -> None:
    """Of a tensor in the file: it is not wanted for a while, and goes to the disk."""
    _advise("let_go", part)


def fetch_soon(part: torch.Tensor) -> None:
    """Of a tensor in the file: it is wanted next."""
    _advise("fetch_soon", part)


def _advise(name: str, part: torch.Tensor) -> None:
    if _open is None or part.is_meta:
        return
    advise = getattr(_open._native, name)
    for row in part.unbind() if part.ndim > 2 else (part,):  # of a text each: what is between them is not meant
        if row.is_contiguous():
            advise(row.data_ptr(), row.nbytes)


def _scratch_file(directory: Path, num_bytes: int) -> int:
    """A file without a name, and with room; its descriptor."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"texts-{os.getpid()}.scratch"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()
        os.ftruncate(file, num_bytes)
        try:
            os.posix_fallocate(file, 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    except BaseException:
        os.close(file)
        raise
    return file
