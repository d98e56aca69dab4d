"""What the command line says of itself: an error in one message, after a signal how to go on, versions; and how it asks."""

from __future__ import annotations

import contextlib
import errno
import shlex
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import typer

from finetune import __version__
from memory.errors import UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


def message_of(error: Exception) -> str:
    """One line for most, without a traceback."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.strerror and (error.filename or error.errno in _DISK_ERRORS):
        return f"error: {error.filename or 'a file'}: {error.strerror}. Mend it, or make room, and try again"
    kind = type(error).__name__
    detail = " ".join(str(error).split())
    if kind == "OutOfMemoryError":  # torch's, which must not be imported for this
        return (
            f"error: the accelerator ran out of memory ({detail}). Raise --device-memory, lower --micro-batch-size or "
            "--sequence-length, or end what else uses it"
        )
    return f"error: {kind}{f': {detail}' if detail else ''} (run with FINETUNE_DEBUG=1 for the traceback)"


def how_to_go_on(command: str, step: int) -> str:
    """step: the last whole one that is saved; 0: none was done."""
    if command not in ("run", "resume", "sweep"):
        return ""
    if not step:
        return f" No step was done. Start again with:\n  finetune {shlex.join(sys.argv[1:])}"
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--no-resume")]
    flag = "" if command == "resume" else " --resume"
    return f" Go on from the last committed step with:\n  finetune {shlex.join(words)}{flag}"


def print_versions() -> None:
    typer.echo(f"finetune {__version__}")
    typer.echo(f"python {sys.version.split()[0]}")
    for package in ("torch", "transformers", "peft"):
        try:
            typer.echo(f"{package} {installed_version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")


def read_turn() -> str:
    """A line of a conversation; empty at its end."""
    with contextlib.suppress(EOFError, ImportError):
        import readline  # noqa: F401  # lines can be edited then

        return input("> " if sys.stdin.isatty() else "").strip()
    return ""
