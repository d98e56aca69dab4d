"""The working store: the home of everything that training changes. It is the checkpoint.

    store/data           pieces of weights with their optimizer state, wherever there was room
    store/manifest.json  which step this is, where each piece's newest bytes are, and their checksums
    store/lock           held by the process that has the store open

[Note: commit]
Bytes that the manifest on disk refers to are never written over: a piece's new version goes to free room of the data file. At
the end of a step, in this order:
    1. all writes of the step are waited for,
    2. data is flushed (fdatasync): the new versions are durable,
    3. the new manifest is written under another name and flushed,
    4. it is renamed over the old one: the step counts now,
    5. the directory is flushed: it counts after a power cut too; only then is the room of the old versions given away.
Cut anywhere before 4 is durable, the old manifest is found, and everything that it names is as it was: 5 of the step before
has ended before any of this step's writes could touch freed room. Cut after it, the new one is found, and 2 and 3 came first.
Held by tests that replay every prefix of the recorded operations, with what was not flushed lost in part.

With one version (`versions=1`) pieces are written in place, which halves the disk space. A process that dies in a step then
leaves a mixture of two steps: the manifest says so from before the first such write (`writing`), and such a store is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes
from finetune.offload.files import lock as file_lock
from finetune.offload.files.replaced import replace_file
from finetune.offload.residency.io import IOEngine
from finetune.offload.update.extent_allocator import ExtentAllocator
from finetune.offload.update.units import Piece

FORMAT = 1
GROWTH_BYTES = 256 << 20  # the data file grows by at most so much at a time

Key = tuple[str, int]
"""(name of the unit, index of the piece; -1 is state that belongs to no piece, see `finetune.offload.update.stream.FACTORS`)"""


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Where a piece is in the data file, and what it is. Sums: see `kernels.checksum`."""

    offset: int
    """Of the weights, with the remainders of fp32 masters right behind."""
    weights_bytes: int  # of the weights alone
    master_bytes: int  # of their masters
    state_offset: int
    """Of the optimizer state, apart from the others, so that its room can be given to another piece."""
    state_bytes: int
    """0: no state is kept."""
    weights_sum: int  # checksum of the weights
    master_sum: int  # of the masters
    state_sum: int  # of the state
    updates: int
    """How often the state has been updated, for bias correction."""

    @property
    def kept_bytes(self) -> int:
        """Of weights and masters, which stay when state is dropped."""
        return self.weights_bytes + self.master_bytes

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(offset, bytes) in the data file."""
        return [(self.offset, self.kept_bytes), (self.state_offset, self.state_bytes)]


def stored_pieces(manifest: Mapping[str, Any]) -> dict[Key, StoredPiece]:
    """Those of a manifest."""
    return {(unit, index): StoredPiece(*values) for unit, index, *values in manifest["pieces"]}


class WorkingStore:
    """Keeps the book of a store; the bytes are moved by whoever trains, through `io` and `file`.

    about: what the run is, JSON values: kept with a new store, returned as it was for an old one.
    Raises UserError when another process has it open, when it is damaged, or when the disk is full.
    """

    def __init__(
        self, directory: Path, io: IOEngine, about: dict[str, Any], *, resume: bool = False, versions: int = 2
    ) -> None:
        self.directory = directory
        self.path = directory / "data"
        self._manifest = directory / "manifest.json"
        self._io = io
        self._versions = versions
        self.about = about
        self.step = 0
        self.notes: dict[str, Any] = {}
        self.pieces: dict[Key, StoredPiece] = {}
        self._released: list[tuple[int, int]] = []  # freed once the step is committed
        self._marked = False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot open the working store {directory}: {error.strerror}") from error
        self._lock = lock_store(directory)
        try:
            self._open(resume)
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, resume: bool) -> None:
        if self._manifest.exists():
            if resume:
                self._take(read_manifest(self.directory))
            else:
                check_unused(self.directory)
        self._allocator = ExtentAllocator(place for piece in self.pieces.values() for place in piece.ranges if place[1])
        self.file = self._io.open(self.path, writable=True, create=True)
        self._size = os.stat(self.path).st_size
        if self._size < self._allocator.end:
            raise UserError(
                f"{self.path} has {self._size} bytes, its manifest needs {self._allocator.end}: it is truncated. Restore it "
                "from a copy, or begin again with another --output"
            )

    def _take(self, content: dict[str, Any]) -> None:
        if content["writing"]:
            raise UserError(
                f"{self.directory} keeps one version of the weights, and a process died while it wrote step "
                f"{content['step'] + 1}: they are a mixture of two steps. Begin again; with optimizer.versions 2 this cannot "
                "happen"
            )
        self.about, self.step, self.notes = content["about"], content["step"], content["notes"]
        self.pieces = stored_pieces(content)

    def place(self, key: Key, kept_bytes: int, state_bytes: int) -> tuple[int, int]:
        """Where the next version of a piece goes in the data file: what is kept, and the state. Raises UserError when the
        disk is full."""
        old = self.pieces.get(key)
        if self._versions == 1:
            if not self._marked:
                self._publish(self.step, self.notes, writing=True)
                self._marked = True
            if old is not None and (old.kept_bytes, old.state_bytes) == (kept_bytes, state_bytes):
                return old.offset, old.state_offset
        offset = self._allocator.allocate(kept_bytes) if kept_bytes else 0
        state_offset = self._allocator.allocate(state_bytes) if state_bytes else 0
        if self._allocator.end > self._size:
            self._grow()
        return offset, state_offset

    def _grow(self) -> None:
        """Reserves what was placed, and where there is room for it some more, for fewer and longer extents."""
        need = self._allocator.end
        for end in (max(need, self._size + min(GROWTH_BYTES, self._size)), need):
            try:
                with open(self.path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), self._size, end - self._size)
            except OSError as error:
                if error.errno == errno.ENOSPC and end > need:
                    os.truncate(self.path, self._size)  # what was reserved before the disk was full
                    continue
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise self._refusal(f"grow {self.path} to {format_bytes(end)}", error) from error
            self._size = end
            return

    def put(self, key: Key, piece: StoredPiece) -> None:
        """`piece` is the newest version, from the next commit on for good."""
        old = self.pieces.get(key)
        if old is not None:
            kept = [place for place in piece.ranges if place[1]]
            self._released += [place for place in old.ranges if place not in kept]
        self.pieces[key] = piece

    def drop_state(self, key: Key) -> None:
        """The piece's state is not needed any more; its weights stay."""
        old = self.pieces.get(key)
        if old is not None and old.state_bytes:
            self._released.append((old.state_offset, old.state_bytes))
            self.pieces[key] = replace(old, state_offset=0, state_bytes=0, state_sum=0, updates=0)

    def commit(self, step: int, notes: dict[str, Any]) -> None:
        """Step `step` counts. All writes must have been waited for. notes: JSON values, given back at resume."""
        self._io.sync(self.file)
        self._publish(step, notes, writing=False)
        self._marked = False
        self.step, self.notes = step, notes
        for offset, num_bytes in self._released:
            self._allocator.free(offset, num_bytes)
        self._released.clear()

    @property
    def how_to_go_on(self) -> str:
        """For messages about a step that failed: what is left, and what to do once its cause is mended."""
        if self._marked:
            return (
                f"The store keeps one version and step {self.step + 1} has overwritten a part of it: begin again with another "
                "--output"
            )
        return f"Step {self.step} is the last committed one, and it is intact: go on with --resume"

    def close(self) -> None:
        """What was not committed is lost. The I/O engine closes the data file."""
        os.close(self._lock)

    def _publish(self, step: int, notes: dict[str, Any], writing: bool) -> None:
        pieces = [(*key, *astuple(piece)) for key, piece in self.pieces.items()]
        body = json.dumps(
            {"format": FORMAT, "step": step, "writing": writing, "about": self.about, "notes": notes, "pieces": pieces},
            separators=(",", ":"),
        )
        try:
            replace_file(self._manifest, f"{_digest(body)}\n{body}\n".encode())
        except OSError as error:
            raise self._refusal(f"write {self._manifest}", error) from error

    def _refusal(self, what: str, error: OSError) -> UserError:
        return UserError(
            f"cannot {what}: {error.strerror}. Make room, or mend it. {self.how_to_go_on}"
        )


def lock_store(directory: Path) -> int:
    """A descriptor that holds the store in `directory` until it is closed. Raises UserError when another process does."""
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"cannot open the working store {directory}: {error.strerror}") from error
    try:
        file_lock.lock(lock)
    except BlockingIOError:
        os.close(lock)
        raise UserError(
            f"the working store {directory} is open in another process: wait for it, or name another --output"
        ) from None
    return lock


def check_unused(directory: Path) -> None:
    """Raises UserError when the store in `directory` has committed steps, which a new run would lose."""
    if step := read_manifest(directory)["step"]:
        raise UserError(
            f"{directory} holds a run of {step} steps: go on with --resume, or name another --output (or delete the directory, "
            "if the run is not wanted)"
        )


def damaged(data: Path, name: str, piece: Piece | None, what: str) -> UserError:
    """piece: None for the factors."""
    where = f", bytes {piece.start} to {piece.start + piece.num_bytes} of the unit," if piece else ""
    return UserError(
        f"{data}: the {what} of {name}{where} are not what was written (checksum): the disk or memory is faulty. "
        "Nothing was trained on them. Restore the store from a "
        "copy, or begin again with another --output"
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """The committed manifest of the store in `directory`. Raises UserError when it is missing, damaged or of a newer format."""
    path = directory / "manifest.json"
    try:
        digest, _, body = path.read_text().partition("\n")
        body = body.removesuffix("\n")
    except FileNotFoundError:
        raise UserError(f"{directory} is no working store: it has no manifest.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if digest != _digest(body):
        raise UserError(f"{path} is damaged: its checksum does not fit. Restore it from a copy, or begin again")
    content = json.loads(body)
    if content["format"] != FORMAT:
        raise UserError(f"{path} has format {content['format']}, expected {FORMAT}: use the version that wrote it")
    return content


def _digest(body: str) -> str:
    return hashlib.blake2b(body.encode(), digest_size=16).hexdigest()
