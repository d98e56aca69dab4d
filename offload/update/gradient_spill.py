"""Gradients that wait on disk until they are used: for exact clipping, whose factor is known only when all are there, and for
weights that are used twice in a model, at its two ends."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from memory.slots import PAGE_BYTES, round_up
from offload.residency.io import IOEngine


class GradientSpill:
    """Tensors by (unit, local name) in one file of `scratch`, which is deleted at `close`. Room is reused every step."""

    def __init__(self, io: IOEngine, scratch: Path) -> None:
        self._io = io
        self._path = scratch / "gradients"
        self._file: int | None = None
        self._places: dict[str, dict[str, tuple[int, tuple[int, ...], torch.dtype]]] = {}
        self._end = 0
        self._writing: tuple[int, list[torch.Tensor]] | None = None
        self._scratch = scratch

    def put(self, unit: str, gradients: Mapping[str, torch.Tensor]) -> None:
        """Starts to write; the tensors are kept until the next call. They must not change."""
        if self._file is None:
            self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = self._io.open(self._path, writable=True, create=True)
        self._finish()
        extents, places, kept = [], {}, []
        for name, tensor in gradients.items():
            tensor = tensor.contiguous()
            places[name] = (self._end, tuple(tensor.shape), tensor.dtype)
            extents.append((self._file, self._end, tensor.nbytes, tensor.data_ptr()))
            kept.append(tensor)
            self._end += round_up(tensor.nbytes, PAGE_BYTES)
        self._places[unit] = places
        self._writing = (self._io.submit_writes(extents), kept)

    def take(self, unit: str) -> dict[str, torch.Tensor]:
        """What was put for `unit`, empty if nothing was; it is gone afterwards."""
        found = self.peek(unit)
        self._places.pop(unit, None)
        if not self._places:
            self._end = 0
        return found

    def peek(self, unit: str) -> dict[str, torch.Tensor]:
        """What was put for `unit`, empty if nothing was."""
        self._finish()
        found, extents = {}, []
        for name, (offset, shape, dtype) in self._places.get(unit, {}).items():
            found[name] = torch.empty(shape, dtype=dtype)
            extents.append((self._file, offset, found[name].nbytes, found[name].data_ptr()))
        if extents:
            self._io.wait(self._io.submit_reads(extents))
        return found

    def close(self) -> None:
        """Before the I/O engine closes."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _finish(self) -> None:
        if self._writing is not None:
            ticket, _ = self._writing
            self._io.wait(ticket)
            self._writing = None
