"""The directory of a run: which files are the run's, which process is at it, and what becomes of an earlier run's.

    run.lock        while a process runs or reads there
    run.json        the run's identity, which its states, journal and store repeat, and what it was made with
    config.yaml     its settings, for later commands; one that the user has put there stays
    previous/N/     earlier runs, whole, that a new run found in its place

Of what stands under the names that a run writes, an earlier run's files are set aside; for what no run has made, the new run
is refused. Nothing is deleted but what killed processes left half written.

[Note: setting aside]
run.json names what is to be moved, and where to, before the first move, and is that of the new run already: a process that is
killed in between leaves the rest to the next one, which never takes the earlier run's files for those of the new one.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import finetune
from finetune.config import Config
from finetune.config.loading import RUN_FILE
from finetune.config.run_file import may_be_replaced, run_text
from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes
from finetune.methods.registry import METHODS
from finetune.offload.files import lock as file_lock
from finetune.offload.files.replaced import replace_file
from finetune.offload.files.sealed import seal, unseal
from finetune.offload.perturb.journal import Journal
from finetune.offload.update.store import check_unused, read_manifest
from finetune.runs.identity import RunIdentity, check_same_run, recorded_setting
from finetune.runs.state import saved_states

FORMAT = 1
RUN, LOCK, PREVIOUS = "run.json", "run.lock", "previous"
_NUMBERED = r"step-\d{8}"
_ADAPTER = r"adapter_config\.json|adapter_model\.safetensors|README\.md"
# What runs write at the top of their directory, and what stands in it; None: it is a file.
_CONTENT: Mapping[str, str | None] = {
    "state": _NUMBERED,
    "journal.zo": None,
    "journal.zo.previous": None,  # of earlier versions
    "weights": _NUMBERED,
    "store": r"data|manifest\.json|lock|\.manifest\.json\.tmp",
    "initial-adapter": _ADAPTER,
    "adapter": _ADAPTER,
    RUN_FILE: None,
    "best": _NUMBERED,
    "best.json": None,
    "metrics.jsonl": None,
    "report.json": None,
    "report.html": None,
    "tensorboard": r"events\.out\.tfevents\..*|\d+(\.\d+)?",
}
# May be links to directories.
_WRITTEN_INTO = ("state", "weights", "store", "best", "tensorboard", "tokens", "scratch", PREVIOUS)
# Names of what a process that was killed has left half written, by folder.
_HALF_WRITTEN = {
    "": re.compile(
        r"\.(adapter|initial-adapter|metrics\.jsonl|(report|run|best)\.json|report\.html|config\.yaml|journal\.zo)(\.\d+)?\.tmp"
    ),
    "state": re.compile(rf"\.{_NUMBERED}\.\d+\.tmp"),
    "weights": re.compile(rf"\.{_NUMBERED}\.\d+\.tmp"),
    "best": re.compile(rf"\.{_NUMBERED}\.\d+\.tmp"),
    "adapter": re.compile(r"\.README\.md\.\d+\.tmp"),
    "scratch": re.compile(r"activations-\d+\.scratch|gradients"),
}


class RunDirectory:
    """`take` holds the directory until `close` and looks at what is there; `begin` makes it this run's.

    earlier_bytes: of earlier runs, set aside or about to be. notes: for the user.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.earlier_bytes = 0
        self._lock = -1
        self._recorded: dict[str, Any] | None = None  # what the run that goes on says of itself
        self._aside: list[str] = []

    def take(self, config: Config, inputs: Sequence[Path] = ()) -> None:
        """inputs: what the run reads. Nothing is written but the lock.

        Raises UserError when another process is there, when files stand in the way that no run has made, and when the run
        that is there is damaged or must not be replaced.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock, enforced = _open_lock(self.path)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is in use by another process{_holder(self.path)}: wait for it, or name another --output"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}: name another --output") from error
        if not enforced:
            self.notes.append(f"note: the file system of {self.path} has no locks: start no second run there")
        run = _read_run(self.path)
        if run is not None and "setting_aside" in run:
            run = self._set_aside(run)
        if config.resume:
            self._recorded = run or _recorded_by_files(self.path, config)
        if self._recorded is None and (run is not None or _has_files_of_a_run(self.path)):
            self._aside = self._find_earlier()
        self._refuse_what_no_run_has_made(config)
        for name in self._aside:
            for path in inputs:
                if path.resolve().is_relative_to((self.path / name).resolve()):
                    raise UserError(
                        f"{path} is input of this run, but belongs to the earlier run in {self.path}, which would be set "
                        "aside: name another --output"
                    )
        self.earlier_bytes = _num_bytes(self.path / PREVIOUS) + sum(_num_bytes(self.path / name) for name in self._aside)

    def recorded_setting(self, key: str) -> Any | None:
        """Of the run that goes on, see `finetune.runs.identity`; None: a run begins. After `take`."""
        return None if self._recorded is None else recorded_setting(self._recorded, key)

    def begin(self, identity: RunIdentity, num_steps: int) -> dict[str, Any]:
        """Goes on with the run that is there, or sets it aside; returns what this run's files are to say of it.

        Raises UserError when the run to go on with had other settings, another model or other data, naming all that differs.
        """
        about = identity.about()
        if self._recorded is not None:
            identity.check(self.path, self._recorded)
            about["run"] = self._recorded.get("run", about["run"])
            before = self._recorded.get("num_steps", num_steps)
            if before != num_steps and not identity.config.training.lr_scheduler.startswith("constant"):
                self.notes.append(
                    f"note: learning rates are from here on those of a run of {num_steps} steps; they were those of {before}"
                )
        self._clean()
        run = {"format": FORMAT, "num_steps": num_steps, "versions": _versions(), **about}
        if self._aside:
            place, moved_bytes = self._next_place(), sum(_num_bytes(self.path / name) for name in self._aside)
            run["setting_aside"] = {"place": place.name, "names": self._aside}
            self._write(run)
            self._set_aside(run)
            self.notes.append(
                f"the earlier run in {self.path} was set aside in {place} ({format_bytes(moved_bytes)}): delete it when it is "
                "not wanted"
            )
        else:
            self._write(run)
        if may_be_replaced(self.path / RUN_FILE):
            self._replace(RUN_FILE, run_text(identity.config))
        return about

    def close(self) -> None:
        """Lets the next process run here; also after an error."""
        if self._lock >= 0:
            _close_lock(self.path, self._lock)
            self._lock = -1

    def _find_earlier(self) -> list[str]:
        if (self.path / "store" / "manifest.json").is_file():
            check_unused(self.path / "store")
        # A store without steps is of no use to anyone: a new run takes it over with the room that it has on disk.
        names = (name for name in _CONTENT if name != "store")
        return [name for name in names if _stands(self.path / name) and not _strange(self.path / name)]

    def _refuse_what_no_run_has_made(self, config: Config) -> None:
        strange: list[Path] = []
        of_best = ("best", "best.json") if config.training.load_best_model_at_end else ()
        read = ("metrics.jsonl", "report.json", "report.html", *of_best)
        for name in (*read, "tokens", "scratch", PREVIOUS, *_files_of(config)):
            path = self.path / name
            if not _stands(path) or name in self._aside:
                continue
            if self._recorded is not None or name in ("tokens", "scratch", PREVIOUS):
                strange += _strange(path, inside=False)  # files beside a run's own are left alone
            elif name == "store" and (path / "lock").is_file():  # without steps: a run has begun, and ended before its first
                strange += _strange(path)
            else:
                strange += _strange(path) or [path]
        if strange:
            places, what = ", ".join(map(str, strange[:4])), "them" if strange[1:] else "it"
            raise UserError(
                f"{places}{' and more' if strange[4:] else ''} would be in the way of the run, and no run has made {what}: "
                f"move {what} away, or name another --output"
            )

    def _next_place(self) -> Path:
        """A new directory for an earlier run, with its run.json."""
        previous = self.path / PREVIOUS
        numbers = [int(path.name) for path in _entries(previous) if path.name.isdecimal()]
        place = previous / str(max(numbers, default=0) + 1)
        try:
            place.mkdir(mode=0o700, parents=True)
            if (self.path / RUN).exists():
                shutil.copy(self.path / RUN, place / RUN)
        except OSError as error:
            raise UserError(f"cannot set the earlier run aside in {place}: {error.strerror}") from error
        return place

    def _set_aside(self, run: dict[str, Any]) -> dict[str, Any]:
        """Moves what `run` says is to be moved; returns it without that. See [Note: setting aside]."""
        place = self.path / PREVIOUS / run["setting_aside"]["place"]
        try:
            for name in run["setting_aside"]["names"]:
                if os.path.lexists(self.path / name) and not os.path.lexists(place / name):
                    os.rename(self.path / name, place / name)
        except OSError as error:
            raise UserError(f"cannot set the earlier run aside in {place}: {error.strerror}") from error
        run = {key: value for key, value in run.items() if key != "setting_aside"}
        self._write(run)
        return run

    def _write(self, run: Mapping[str, Any]) -> None:
        self._replace(RUN, json.dumps(seal(run), indent=1) + "\n")

    def _replace(self, name: str, text: str) -> None:
        try:
            replace_file(self.path / name, text.encode())
        except OSError as error:
            raise UserError(f"cannot write {self.path / name}: {error.strerror}. Make room, or mend it") from error

    def _clean(self) -> None:
        for folder, pattern in _HALF_WRITTEN.items():
            for path in _entries(self.path / folder):
                if pattern.fullmatch(path.name):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)


@contextmanager
def reading(path: Path) -> Iterator[bool]:
    """While it lasts no run begins in `path`. Gives False when one is under way there, which it then does not hinder."""
    descriptor = -1
    try:
        descriptor, _ = _open_lock(path, shared=True)
        free = True
    except BlockingIOError:
        free = False
    except OSError:
        free = True  # it cannot be written, so nobody runs there
    try:
        yield free
    finally:
        if descriptor >= 0:
            _close_lock(path, descriptor)


def recorded(path: Path) -> dict[str, Any] | None:
    """What the run in `path` says of itself in run.json; None: there is none, or it is an earlier version's."""
    run = _read_run(path)
    if run is not None and "setting_aside" in run:
        raise UserError(f"the run in {path} was killed before its first step: start it again")
    return run


def check_belongs(path: Path, place: Path, found: Mapping[str, Any]) -> None:
    """Raises UserError when what `found` was read from in `place` is of another run than the one in `path`."""
    about = recorded(path)
    if about is not None:
        check_same_run(place, found, about)


def _open_lock(directory: Path, shared: bool = False) -> tuple[int, bool]:
    """A descriptor that holds the directory, and whether the file system cares. Raises BlockingIOError when another has it."""
    path = directory / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            enforced = file_lock.lock(descriptor, shared)
            # Whoever had it last has removed it; another may be there already.
            if os.path.lexists(path) and os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                if not re.fullmatch(rb"(\d+\n)?", os.pread(descriptor, 64, 0)):
                    raise UserError(f"{path} would be in the way of the run, and no run has made it: move it away")
                if not shared:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor, enforced
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _close_lock(directory: Path, descriptor: int) -> None:
    try:
        if file_lock.lock(descriptor):  # nobody shares it
            (directory / LOCK).unlink(missing_ok=True)
    except OSError:
        pass  # others read on, or the directory is gone
    os.close(descriptor)


def _versions() -> dict[str, str]:
    """Of what the steps are computed with."""
    found = {"finetune": finetune.__version__, "python": platform.python_version()}
    return found | {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")}


def _holder(directory: Path) -> str:
    try:
        number = (directory / LOCK).read_text().strip()
    except (OSError, UnicodeDecodeError):
        number = ""
    return f" ({number})" if number else ""


def _read_run(directory: Path) -> dict[str, Any] | None:
    path = directory / RUN
    if not os.path.lexists(path):
        return None
    try:
        run = unseal(json.loads(path.read_text(encoding="utf-8")))
        if "format" not in run:
            raise ValueError("another file stands in its place")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or no run has made it ({error}): bring it back from a copy or move it away, or name another "
            "--output"
        ) from error
    if run["format"] != FORMAT:
        raise UserError(f"{path} has format {run['format']}, expected {FORMAT}: use the version that wrote it")
    return run


def _recorded_by_files(directory: Path, config: Config) -> dict[str, Any] | None:
    """What the files of a run say of it that has no run.json: it began before there was one, or lost it."""

    def of_state() -> dict[str, Any] | None:
        states = [state for state in saved_states(directory / "state") if (state / "state.json").exists()]
        try:
            return json.loads((states[-1] / "state.json").read_text()) if states else None
        except (OSError, ValueError) as error:
            raise UserError(f"the saved state {states[-1]} is damaged ({error}): remove it to go on from another") from error

    def of_journal() -> dict[str, Any] | None:
        path = directory / "journal.zo"
        return Journal.read(path).about if path.is_file() else None

    def of_store() -> dict[str, Any] | None:
        path = directory / "store"
        return read_manifest(path)["about"] if (path / "manifest.json").is_file() else None

    kinds = {"state": of_state, "journal.zo": of_journal, "store": of_store}
    own = _files_of(config)[0]
    return next((found for kind in sorted(kinds, key=lambda kind: kind != own) if (found := kinds[kind]())), None)


def _has_files_of_a_run(directory: Path) -> bool:
    """Whether there is a run of an earlier version, which had no run.json."""

    def first_line_has(name: str, key: str) -> bool:
        try:
            with open(directory / name, "rb") as file:
                return key in json.loads(file.readline(1 << 20))
        except (OSError, ValueError, TypeError):
            return False

    return (
        any((state / "state.json").is_file() for state in saved_states(directory / "state"))
        or (directory / "store" / "manifest.json").is_file()
        or first_line_has("journal.zo", "group_steps")
        or first_line_has("metrics.jsonl", "host_peak_bytes")
    )


def _files_of(config: Config) -> tuple[str, ...]:
    return METHODS[config.method].files(config)


def _stands(path: Path) -> bool:
    """Whether there is anything but an empty directory."""
    may_be_empty = path.is_dir() and (path.name in _WRITTEN_INTO or not path.is_symlink())
    return os.path.lexists(path) and not (may_be_empty and not _entries(path))


def _strange(path: Path, inside: bool = True) -> list[Path]:
    """What no run would write of what stands at `path`. inside: whether to look into directories."""
    if path.is_symlink() and path.name not in _WRITTEN_INTO:
        return [path]
    pattern = _CONTENT.get(path.name, "")
    if pattern is None:
        is_own = path.is_file() and (path.name != RUN_FILE or may_be_replaced(path))
        return [] if is_own else [path]
    if not path.is_dir():
        return [path]
    half_written = _HALF_WRITTEN.get(path.name)
    return [
        entry
        for entry in (_entries(path) if inside else ())
        if not re.fullmatch(pattern, entry.name) and not (half_written and half_written.fullmatch(entry.name))
    ]


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _num_bytes(path: Path) -> int:
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size if os.path.lexists(path) else 0
    return sum(_num_bytes(entry) for entry in _entries(path))
