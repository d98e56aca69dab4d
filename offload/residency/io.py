"""Asynchronous disk I/O between files and raw memory: the Python face of the native engine."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from finetune_native import io as _native

from finetune.memory.errors import UserError
from finetune.memory.units import MIB, PAGE_BYTES

FaultPlan = _native.FaultPlan
QUEUE_DEPTH = 32  # requests under way at most
REQUEST_BYTES = 4 * MIB  # of one request at most

Extent = tuple[int, int, int, int]
"""(file_id, file_offset, num_bytes, address): one contiguous range of a file and its place in memory, all in bytes."""


class Transfer(NamedTuple):
    """A ticket that has finished. Times are those of `time.perf_counter`."""

    is_write: bool
    num_bytes: int
    submitted: float
    started: float  # its first request went to the kernel
    finished: float


class IOFailure(UserError):
    """A transfer that could not be completed. Bytes are counted from `offset`; `errno` 0 means that the file ended."""

    def __init__(self, path: str, offset: int, wanted: int, got: int, code: int) -> None:
        self.path = path
        self.offset = offset
        self.wanted = wanted
        self.got = got
        self.errno = code
        where = f"{path}: {wanted} bytes at offset {offset} wanted, {got} transferred"
        if code == 0:
            super().__init__(f"{where}: the file ends there. It is truncated or still being written; fetch it again")
        else:
            super().__init__(f"{where}: {os.strerror(code)} (errno {code})")


BACKENDS = ("auto", "io_uring", "threads")


class IOEngine:
    """Reads and writes many extents of many files at once, past the page cache where the file system can.

    Any offset, length and address is right; fast is a file offset and an address that are equal modulo `PAGE_BYTES`, for then
    whole pages move between disk and memory without a copy. Tickets are served in the order in which they were
    submitted, with up to `queue_depth` requests of up to `request_bytes` in flight; `staging_bytes` bounds the memory
    for what is not aligned. The caller keeps the memory of a ticket valid, and does not touch it, until `wait` returned
    or raised, or `close` returned: nothing is written to it after that. All methods may be called from any thread.

    `backend`: "io_uring", "threads" (a pool that calls pread and pwrite), or "auto": io_uring where the kernel permits.
    Results are the same. Raises UserError when io_uring is demanded and cannot be had. `inject` is for tests.

    Attributes: `backend` is what is used, `backend_reason` why it is not io_uring ("" if it is).
    """

    def __init__(
        self,
        backend: str = "auto",
        queue_depth: int = QUEUE_DEPTH,
        request_bytes: int = REQUEST_BYTES,
        staging_bytes: int = 16 << 20,
        inject: FaultPlan | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is one of {', '.join(BACKENDS)}; got {backend!r}")
        if not 1 <= queue_depth <= 1024:
            raise ValueError(f"queue_depth is 1 to 1024; got {queue_depth}")
        if not PAGE_BYTES <= request_bytes <= 1 << 30:
            raise ValueError(f"request_bytes is {PAGE_BYTES} to 1 GiB; got {request_bytes}")
        native = _native.Engine(backend, queue_depth, request_bytes, staging_bytes, inject or FaultPlan())
        if not native.usable:
            raise UserError(f"io_uring cannot be used: {native.reason}. Choose the backend auto or threads")
        self._native = native
        self.backend: str = native.backend
        self.backend_reason: str = native.reason
        self._finalizer = weakref.finalize(self, native.close)

    def __enter__(self) -> IOEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def notes(self) -> list[str]:
        """What is not as fast as it could be, and why: files without O_DIRECT, buffers that could not be registered."""
        return self._native.notes

    @property
    def read_bytes(self) -> int:
        """Bytes that the kernel delivered, the rounding to whole pages included."""
        return self._native.read_bytes

    @property
    def write_bytes(self) -> int:
        """Bytes that the kernel accepted."""
        return self._native.write_bytes

    @property
    def busy_seconds(self) -> float:
        """Time during which at least one request was in flight."""
        return self._native.busy_seconds

    def open(self, path: str | os.PathLike[str], writable: bool = False, create: bool = False) -> int:
        """Open a regular file and return its id. A created file is private (0600). Raises UserError naming the path."""
        name = os.fsdecode(path)
        file_id, code = self._native.open(os.path.abspath(name), writable or create, create)
        if code != 0:
            purpose = "writing" if writable or create else "reading"
            raise UserError(f"cannot open {name} for {purpose}: {_describe(code)}")
        return file_id

    def close_file(self, file_id: int) -> None:
        """Close a file, after waiting for the tickets that use it."""
        self._native.close_file(file_id)

    def sync(self, file_id: int) -> None:
        """Make the writes of all tickets that were waited for durable (fdatasync). Raises IOFailure."""
        code = self._native.sync(file_id)
        if code != 0:
            raise IOFailure(self._native.path(file_id), 0, 0, 0, code)

    def register_buffer(self, address: int, num_bytes: int) -> None:
        """Tell the kernel of memory that many tickets will use: it pins the pages once and not at every request.

        Only a hint: where it is refused (RLIMIT_MEMLOCK), `notes` says so and everything works. The memory must stay
        mapped until `close`. Pinned pages are copied when the process forks: give the range MADV_DONTFORK if it may.
        """
        self._native.register_buffer(address, num_bytes)

    def submit_reads(self, extents: Sequence[Extent]) -> int:
        """Start to fill memory from files. Returns a ticket. Raises ValueError for an unknown file id."""
        return self._native.submit(False, extents)

    def submit_writes(self, extents: Sequence[Extent]) -> int:
        """Start to write memory to files opened as writable. Extents in flight must not overlap in a file."""
        return self._native.submit(True, extents)

    def done(self, ticket: int) -> bool:
        """Whether `wait` would return or raise at once."""
        return self._native.done(ticket)

    def wait(self, ticket: int) -> float:
        """Wait until every extent of the ticket is transferred; returns the seconds spent waiting.

        Raises IOFailure for the first error, once nothing of the ticket is in flight any more. Ctrl-C interrupts the
        wait, not the transfer. Waiting again for the same ticket gives the same answer at once.
        """
        seconds = self._native.wait(ticket)
        failure = self._native.failure(ticket)
        if failure is not None:
            raise IOFailure(*failure)
        return seconds

    def keep_log(self, keep: bool) -> None:
        """Whether tickets are logged from now on. What is logged is dropped."""
        self._native.keep_log(keep)

    def take_log(self) -> list[Transfer]:
        """The tickets that have finished since the last call."""
        return [Transfer(*transfer) for transfer in self._native.take_log()]

    def close(self) -> None:
        """Stop: what is in flight drains, what has not started fails with ECANCELED, files are closed. Idempotent."""
        self._finalizer()


def _describe(code: int) -> str:
    remedies = {
        errno.ENOENT: "there is no such file; check the path",
        errno.EISDIR: "it is a directory, a file is expected",
        errno.EINVAL: "it is not a regular file",
        errno.EACCES: "permission denied; check the owner and mode of the file and of its directories",
        errno.EMFILE: "too many open files; raise the limit (`ulimit -n`)",
    }
    return remedies.get(code, os.strerror(code))
