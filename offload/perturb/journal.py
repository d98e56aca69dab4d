"""The journal of a zeroth-order run: what each step added to the weights, as seeds and scalars. It is the checkpoint.

A file of one header line (JSON with a checksum) and one record a step: some 40 bytes for one perturbation, so 20,000 steps are
under 1 MB.
A record is on disk (fdatasync) before its step counts; a record that a killed process left half written is cut off.

[Note: groups]
A single update at the learning rates of zeroth-order tuning is smaller than the last bit of most bf16 weights and would be
lost if it were rounded in at once. Updates are therefore summed in fp32 over `group_steps` steps, and the sum is added to
fp32 weights once:  theta <- scale * theta + sum_j coefficient_j z(seed_j).  Groups begin at multiples of `group_steps`, so
how often weights are folded to disk, or whether at all, changes no bit. A step's weight decay scales what came before it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.memory.errors import UserError
from finetune.offload.files import lock as file_lock
from finetune.offload.files.sealed import SEAL, seal, unseal
from finetune.offload.noise.noise import Group, Noise, Update

_FIXED = struct.Struct("<IdfHH")  # step, scale, learning rate, number of updates, number of scalars
_UPDATE = struct.Struct("<Qf")
_SCALAR = struct.Struct("<f")
_CHECK = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Record:
    """Step `step` (from 0): weights times `scale`, plus the updates. `scalars`: what the estimator wants to remember."""

    step: int
    learning_rate: float  # of the step, as the schedule gave it
    updates: tuple[Update, ...]
    scale: float = 1.0
    scalars: tuple[float, ...] = ()

    def pack(self) -> bytes:
        body = _FIXED.pack(self.step, self.scale, self.learning_rate, len(self.updates), len(self.scalars))
        body += b"".join(_UPDATE.pack(*update) for update in self.updates)
        body += b"".join(map(_SCALAR.pack, self.scalars))
        return body + _CHECK.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes, start: int) -> tuple[Record, int] | None:
        """The record at byte `start` and where it ends; None when there is no whole one."""
        if len(data) - start < _FIXED.size:
            return None
        step, scale, learning_rate, num_updates, num_scalars = _FIXED.unpack_from(data, start)
        at = start + _FIXED.size
        end = at + num_updates * _UPDATE.size + num_scalars * _SCALAR.size
        if len(data) < end + _CHECK.size or _CHECK.unpack_from(data, end)[0] != zlib.crc32(data[start:end]):
            return None
        updates = tuple(Update(*_UPDATE.unpack_from(data, at + i * _UPDATE.size)) for i in range(num_updates))
        at += num_updates * _UPDATE.size
        scalars = tuple(_SCALAR.unpack_from(data, at + i * _SCALAR.size)[0] for i in range(num_scalars))
        return cls(step, learning_rate, updates, scale, scalars), end + _CHECK.size


class Journal:
    """Appends records, gives pending groups. Holds all records in memory: 20,000 steps are a few MB.

    about: JSON values in the header. Those that say how records are to be applied: "noise" and "rank" (of
    `finetune.offload.noise.noise.Noise`), "group_steps", "rounding" (of whole groups) and "seed". torn_bytes: what stood behind
    the last whole record when the file was read.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], records: list[Record]) -> None:
        self.path = path
        self.about = dict(about)
        self.records = records
        self.torn_bytes = 0
        self._file = -1

    @classmethod
    def create(cls, path: Path, about: Mapping[str, Any]) -> Journal:
        """A new journal, which appears once its header is whole. Raises UserError when it cannot be written, or there is one
        at `path`."""
        journal = cls(path, about, [])
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            journal._lock(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            journal._append(json.dumps(seal(journal.about)).encode() + b"\n")
            temporary.rename(path)
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
        except OSError as error:
            journal.close()
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write the journal {path}: {error.strerror}") from error
        return journal

    @classmethod
    def read(cls, path: Path) -> Journal:
        """The journal at `path`, for reading. Raises UserError when there is none or it is damaged before its end."""
        return cls._open(path)[0]

    @classmethod
    def resume(cls, path: Path) -> Journal:
        """The journal at `path`, to be appended to; a half-written last record is cut off."""
        journal, end = cls._open(path)
        try:
            journal._lock(path, os.O_RDWR)
            os.ftruncate(journal._file, end)
            os.lseek(journal._file, end, os.SEEK_SET)
        except OSError as error:
            raise UserError(f"cannot write the journal {path}: {error.strerror}") from error
        return journal

    @classmethod
    def _open(cls, path: Path) -> tuple[Journal, int]:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the journal {path}: {error.strerror}") from error
        end = data.find(b"\n") + 1
        try:
            about = json.loads(data[:end])
            if not isinstance(about, dict) or not about.keys() >= {"noise", "rank", "group_steps", "rounding", "seed"}:
                raise ValueError("not the header of a journal")
            if SEAL in about:  # those of runs that began before there were checksums have none
                about = unseal(about)
        except ValueError as error:
            raise UserError(
                f"{path} is not the journal of a zeroth-order run, or its header is damaged ({error}): bring it back "
                "from a copy"
            ) from error
        records: list[Record] = []
        while (found := Record.unpack(data, end)) is not None:
            record, end = found
            if record.step != len(records):
                raise UserError(
                    f"{path} is damaged: expected the record of step {len(records) + 1}, found that of {record.step + 1}. "
                    "Bring the file back from a copy; it was not changed"
                )
            records.append(record)
        # A process that is killed leaves half a record at the end, never one with whole records behind it.
        if _has_record(data, end, len(records)):
            raise UserError(
                f"{path} is damaged: the record of step {len(records) + 1} does not match its checksum, there are whole ones "
                "behind it. Bring the file back from a copy; it was not changed"
            )
        journal = cls(path, about, records)
        journal.torn_bytes = len(data) - end
        return journal, end

    @property
    def steps(self) -> int:
        """Steps that count."""
        return len(self.records)

    def digest(self, num_steps: int) -> str:
        """Of what this run is and of its first `num_steps` steps, in hexadecimal."""
        digest = hashlib.blake2b(json.dumps(self.about, sort_keys=True).encode(), digest_size=16)
        for record in self.records[:num_steps]:
            digest.update(record.pack())
        return digest.hexdigest()

    @property
    def noise(self) -> Noise:
        return Noise(self.about["noise"], self.about["rank"])

    def append(self, record: Record) -> None:
        """Makes the step count: the record is on disk when this returns. Raises UserError: disk full."""
        if record.step != len(self.records):
            raise ValueError(f"the record of step {record.step} after {len(self.records)} steps")
        data = record.pack()
        try:
            self._append(data)
        except OSError as error:
            raise UserError(
                f"cannot write step {record.step + 1} to the journal {self.path}: {error.strerror}. The steps before are safe; "
                "make room and go on with --resume"
            ) from error
        self.records.append(Record.unpack(data, 0)[0])  # in the precision that a resumed run will see

    def groups(self, first_step: int, last_step: int | None = None) -> tuple[Group, ...]:
        """What steps [first_step, last_step) add, see [Note: groups]. `first_step` must begin a group.

        Only whole groups are rounded, where the run rounds at all.
        """
        last_step = self.steps if last_step is None else last_step
        size = self.about["group_steps"]
        if first_step % size:
            raise ValueError(f"step {first_step} does not begin a group of {size} steps")
        groups = []
        for start in range(first_step, last_step, size):
            group = combine(self.records[start : min(start + size, last_step)])
            group = group._replace(shared_seed=self.shared_seed(start))
            if start + size <= last_step and self.about["rounding"] != "exact":
                group = group._replace(rounding=self.about["rounding"], rounding_seed=self._rounding_seed(start))
            groups.append(group)
        return tuple(groups)

    def shared_seed(self, step: int) -> int:
        """Of the columns of low-rank noise, at step `step`: one for all steps of a group."""
        return self._seed("shared", step - step % self.about["group_steps"])

    def _rounding_seed(self, step: int) -> int:
        return self._seed("rounding", step)

    def _seed(self, purpose: str, step: int) -> int:
        digest = hashlib.blake2b(f"{self.about['seed']}/{purpose}/{step}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self, path: Path, flags: int) -> None:
        """Opens the file at `path`, which is or will be the journal; the lock ends with the descriptor, also when the process
        is killed."""
        self._file = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            file_lock.lock(self._file)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"{self.path} is in use by another process: wait for it, or name another --output"
            ) from None

    def _append(self, data: bytes) -> None:
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, start)  # no half record before a later one
            os.lseek(self._file, start, os.SEEK_SET)
            raise


def _has_record(data: bytes, start: int, first_step: int) -> bool:
    """Whether a whole record of step `first_step` or later stands anywhere behind byte `start`."""
    last_step = first_step + (len(data) - start) // _FIXED.size
    for at in range(start + 1, len(data) - _FIXED.size):
        (step,) = _CHECK.unpack_from(data, at)
        if first_step <= step <= last_step and Record.unpack(data, at) is not None:
            return True
    return False


def combine(records: Sequence[Record]) -> Group:
    """Steps as one group: a seed stands once, with the sum of its coefficients; later decay scales earlier updates."""
    coefficients: dict[int, float] = {}
    scale = 1.0
    for record in records:
        scale *= record.scale
        if record.scale != 1.0:
            coefficients = {seed: c * record.scale for seed, c in coefficients.items()}
        for seed, coefficient in record.updates:
            coefficients[seed] = coefficients.get(seed, 0.0) + coefficient
    return Group(scale, tuple(Update(seed, c) for seed, c in coefficients.items()))
