"""Block inputs kept for backward: in host memory as they are, or on disk when memory is short.

[Note: spilling]
Inputs are used again in reverse order, so the oldest ones wait longest. Up to `host_bytes` stay in memory; beyond that the
oldest are copied into a page-aligned slot and written to one scratch file, asynchronously; in backward they are read back
one visit ahead. The file has no name: it is unlinked as soon as it is open, so nothing is left behind by a crash.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch

from finetune.memory.errors import UserError
from finetune.memory.slots import Lease, SlotPool
from finetune.memory.units import round_up
from finetune.offload.residency.io import IOEngine, IOFailure
from finetune.offload.residency.pieces import Piece, State

SPILL_MIN_BYTES = 65536  # smaller tensors (masks, positions, rotary tables) are not worth a disk request


class SavedTensor:
    """One tensor kept for backward; `users` counts the visits that still need it."""

    __slots__ = ("users", "_owner", "_tensor", "_meta", "_spilled")

    def __init__(self, owner: Activations, tensor: torch.Tensor) -> None:
        self.users = 0
        self._owner = owner
        self._tensor: torch.Tensor | None = tensor
        self._meta = (tensor.dtype, tensor.shape, tensor.nbytes)
        self._spilled: _Spilled | None = None  # None: it has not left memory

    @property
    def num_bytes(self) -> int:
        return self._meta[2]

    def restore(self) -> torch.Tensor:
        """The tensor's values; valid until the last user's `release`."""
        if self._tensor is None:
            self._owner._restore(self)
        return self._tensor

    def release(self) -> None:
        self.users -= 1
        if self.users == 0:
            self._owner._free(self)
        elif self.users < 0:
            raise RuntimeError("a saved tensor was released more often than it was used")


class _Spilled(Piece):
    """A saved tensor's bytes in the scratch file, and in a slot while they are on their way or in use."""

    __slots__ = ("num_bytes", "offset")

    def __init__(self, io: IOEngine, lease: Lease, num_bytes: int, offset: int) -> None:
        super().__init__(f"block input at {offset} of the scratch file", io, State.IN_USE, lease)
        self.num_bytes = num_bytes
        self.offset = offset


class Activations:
    """Keeps saved tensors in host memory only (`Activations()`), or spills to disk (`SpillingActivations`)."""

    stall_seconds = 0.0

    def save(self, tensor: torch.Tensor) -> SavedTensor:
        return SavedTensor(self, tensor.detach())

    def begin_backward(self, order: Iterable[SavedTensor]) -> None:
        """Tells in which order saved tensors will be restored, so that what is on disk comes back in time."""

    def _restore(self, saved: SavedTensor) -> None:
        raise RuntimeError("a saved tensor was used after its last release")

    def _free(self, saved: SavedTensor) -> None:
        saved._tensor = None

    def close(self) -> None:
        """Frees what the step left behind."""


class SpillingActivations(Activations):
    """Spills to disk; see [Note: spilling].

    pool: page-aligned slots, each at least as large as the largest block input.
    host_bytes: how much may wait in memory. device: where restored tensors go.
    directory: where the scratch file is made (it must have room for all block inputs of a step).
    """

    def __init__(self, io: IOEngine, pool: SlotPool, host_bytes: int, device: torch.device, directory: Path) -> None:
        self._io = io
        self._pool = pool
        self._host_bytes = host_bytes
        self._device = device
        self._held: deque[SavedTensor] = deque()  # in memory as they came, oldest first
        self._held_bytes = 0
        self._written: deque[_Spilled] = deque()  # oldest first; some may have been taken back or freed since
        self._to_read: deque[SavedTensor] = deque()
        self._free_offsets: dict[int, list[int]] = {}
        self._end = 0
        self.stall_seconds = 0.0
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make {directory}, for block inputs on disk: {error.strerror}. Mend it, or name another --output"
            ) from error
        path = directory / f"activations-{os.getpid()}.scratch"
        self._file = io.open(path, writable=True, create=True)
        path.unlink()

    def save(self, tensor: torch.Tensor) -> SavedTensor:
        saved = SavedTensor(self, tensor.detach())
        if (
            tensor.requires_grad
            and tensor.is_contiguous()
            and SPILL_MIN_BYTES <= tensor.nbytes <= self._pool.slot_bytes
        ):
            self._held.append(saved)
            self._held_bytes += saved.num_bytes
            while self._held_bytes > self._host_bytes:
                self._spill(self._held.popleft())
        return saved

    def begin_backward(self, order: Iterable[SavedTensor]) -> None:
        self._to_read = deque(saved for saved in order if saved._tensor is None)
        self._read_ahead()

    def close(self) -> None:
        while self._written:
            with contextlib.suppress(IOFailure):  # nobody will read it
                self._finish(self._written.popleft())
        self._io.close_file(self._file)

    def _spill(self, saved: SavedTensor) -> None:
        self._held_bytes -= saved.num_bytes
        lease = self._lease()
        lease.buffer[: saved.num_bytes].copy_(saved._tensor.reshape(-1).view(torch.uint8))
        saved._tensor = None
        room = round_up(saved.num_bytes)
        offsets = self._free_offsets.setdefault(room, [])
        if offsets:
            offset = offsets.pop()
        else:
            offset, self._end = self._end, self._end + room
        piece = saved._spilled = _Spilled(self._io, lease, saved.num_bytes, offset)
        piece.write([(self._file, offset, saved.num_bytes, lease.address)])
        self._written.append(piece)

    def _lease(self) -> Lease:
        while self._written and self._pool.free_count == 0:
            self._finish(self._written.popleft())
        return self._pool.lease()

    def _finish(self, piece: _Spilled) -> None:
        if piece.state is State.WRITING:
            self.stall_seconds += piece.written()
            piece.leave()

    def _read_ahead(self) -> None:
        while self._to_read:
            while self._written and self._written[0].settled:
                self._finish(self._written.popleft())
            piece = self._to_read[0]._spilled
            if piece is not None and piece.state in (State.AWAY, State.WRITING):
                if self._pool.free_count == 0 and piece.state is State.AWAY:
                    return
                self._start_read(piece)
            self._to_read.popleft()  # else it is freed, or on its way already

    def _start_read(self, piece: _Spilled) -> None:
        if piece.state is State.WRITING:
            piece.written()  # forwarding: the bytes are still in the slot they were written from
        else:
            lease = self._lease()
            piece.fetch(lease, [(self._file, piece.offset, piece.num_bytes, lease.address)])

    def _restore(self, saved: SavedTensor) -> None:
        piece, (dtype, shape, num_bytes) = saved._spilled, saved._meta
        if piece is None:
            super()._restore(saved)
        if piece.state in (State.AWAY, State.WRITING):
            self._start_read(piece)
        if piece.state is State.FETCHING:
            self.stall_seconds += piece.arrive()
        piece.acquire()
        # On the CPU a view of the slot; on an accelerator a copy, which the stream orders before its use.
        saved._tensor = piece.buffer[:num_bytes].view(dtype).view(shape).to(self._device)

    def _free(self, saved: SavedTensor) -> None:
        super()._free(saved)
        piece, saved._spilled = saved._spilled, None
        if piece is not None:
            piece.settle()
            if piece.state is State.IN_USE:
                piece.release()
            if piece.state is State.READY:
                piece.leave()
            self._free_offsets[round_up(piece.num_bytes)].append(piece.offset)
            self._read_ahead()
        elif saved in self._held:
            self._held.remove(saved)
            self._held_bytes -= saved.num_bytes
