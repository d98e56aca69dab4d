"""The words of a command line, and what it says of itself: an error in one message, after a signal how to go on, versions."""

from __future__ import annotations

import contextlib
import errno
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import typer

from finetune import __version__
from finetune.memory.errors import UserError

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


def how_to_go_on(command: str, step: int, output: Path | None) -> str:
    """step: the last whole one that is saved; 0: none was done. output: of the run, whose settings it keeps."""
    if command not in ("run", "resume", "sweep"):
        return ""
    if not step:
        return f" No step was done. Start again with:\n  finetune {shlex.join(sys.argv[1:])}"
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--no-resume")]
    words = {"run": ["resume", str(output)], "resume": words, "sweep": [*words, "--resume"]}[command]
    return f" Go on from the last committed step with:\n  finetune {shlex.join(words)}"


def print_versions() -> None:
    typer.echo(f"finetune {__version__}")
    typer.echo(f"python {sys.version.split()[0]}")
    for package in ("torch", "transformers", "peft"):
        try:
            typer.echo(f"{package} {installed_version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")


def one_a_flag(words: Sequence[str]) -> list[str]:
    """The words of a command line with --data A B as --data A --data B, which typer reads. Words that name a configuration, a
    key with values or an option end the list."""
    found, flag = [], None
    for number, word in enumerate(words):
        if word == "--":
            return [*found, *words[number:]]
        if word.startswith("-") and len(word) > 1:
            flag = word if word in ("--data", "--eval-data") else None
        elif flag is not None and found[-1] != flag:
            if _names_a_configuration(word):
                flag = None
            else:
                found.append(flag)
        found.append(word)
    return found


def _names_a_configuration(word: str) -> bool:
    from finetune.config.loading import RUN_FILE
    from finetune.config.presets import preset_names

    path = Path(word).expanduser()
    return "=" in word or path.suffix in (".yaml", ".yml") or word in preset_names() or (path / RUN_FILE).is_file()


def read_turn() -> str:
    """A line of a conversation; empty at its end."""
    with contextlib.suppress(EOFError, ImportError):
        import readline  # noqa: F401  # lines can be edited then

        return input("> " if sys.stdin.isatty() else "").strip()
    return ""


def require(value: object, what: str, remedy: str) -> None:
    """Raises UserError for what a command cannot do without."""
    # Not `if value`: a data set object given in a configuration may have any truth value; text must not be blank.
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"expected {what}, found none: give {remedy}")
