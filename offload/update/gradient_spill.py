"""Gradients that wait on disk until they are used: for exact clipping, whose factor is known only when all are there, and for
weights that are used twice in a model, at its two ends."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from finetune.memory.units import round_up
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.pieces import Piece, State


class _Spilled(Piece):
    """The gradients of a unit. places: local name -> offset in the file, shape, dtype. tensors: until they are written."""

    __slots__ = ("places", "tensors")

    def __init__(self, io: IOEngine, unit: str) -> None:
        super().__init__(f"gradients of {unit}", io, State.IN_USE)
        self.places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self.tensors: list[torch.Tensor] = []


class GradientSpill:
    """Tensors by (unit, local name) in one file of `scratch`, which is deleted at `close`. Room is reused every step."""

    def __init__(self, io: IOEngine, scratch: Path) -> None:
        self._io = io
        self._path = scratch / "gradients"
        self._file: int | None = None
        self._pieces: dict[str, _Spilled] = {}
        self._end = 0
        self._writing: _Spilled | None = None
        self._scratch = scratch

    def put(self, unit: str, gradients: Mapping[str, torch.Tensor]) -> None:
        """Starts to write; the tensors are kept until the next call. They must not change. Those that were put before must
        have been taken."""
        if self._file is None:
            self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = self._io.open(self._path, writable=True, create=True)
        self._finish()
        piece = self._pieces.setdefault(unit, _Spilled(self._io, unit))
        piece.expect(State.IN_USE)
        extents = []
        for name, tensor in gradients.items():
            tensor = tensor.contiguous()
            piece.places[name] = (self._end, tuple(tensor.shape), tensor.dtype)
            piece.tensors.append(tensor)
            extents.append((self._file, self._end, tensor.nbytes, tensor.data_ptr()))
            self._end += round_up(tensor.nbytes)
        piece.write(extents)
        self._writing = piece

    def take(self, unit: str) -> dict[str, torch.Tensor]:
        """What was put for `unit`, empty if nothing was; it is gone afterwards."""
        found = self.peek(unit)
        self._pieces.pop(unit, None)
        if not self._pieces:
            self._end = 0
        return found

    def peek(self, unit: str) -> dict[str, torch.Tensor]:
        """What was put for `unit`, empty if nothing was."""
        self._finish()
        piece = self._pieces.get(unit)
        if piece is None:
            return {}
        found = {name: torch.empty(shape, dtype=dtype) for name, (_, shape, dtype) in piece.places.items()}
        piece.fetch(None, [(self._file, piece.places[name][0], x.nbytes, x.data_ptr()) for name, x in found.items()])
        piece.arrive()
        piece.leave()
        return found

    def close(self) -> None:
        """Before the I/O engine closes."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _finish(self) -> None:
        if self._writing is not None:
            self._writing.written()
            self._writing.leave()
            self._writing.tensors.clear()
            self._writing = None
