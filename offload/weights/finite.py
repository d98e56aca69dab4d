"""Which stored tensor holds a number that is not finite: read in pieces, in little memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.weights.formats.plain import TORCH_DTYPES

PIECE_BYTES = 4 * 2**20  # a multiple of every element's size
_DTYPES = ("F16", "BF16", "F32", "F64")


def first_not_finite(entries: Iterable[TensorEntry]) -> TensorEntry | None:
    """The first of `entries` with an infinity or NaN in it; None: there is none. Tensors of fewer than 16 bits and of integers
    are passed over."""
    buffer = bytearray(PIECE_BYTES)
    for entry in entries:
        if entry.dtype not in _DTYPES:
            continue
        dtype = TORCH_DTYPES[entry.dtype]
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            left = entry.num_bytes
            while left:
                count = file.readinto(memoryview(buffer)[: min(left, PIECE_BYTES)])
                if not count:
                    break
                piece = torch.frombuffer(buffer, dtype=dtype, count=count // dtype.itemsize)
                if not bool(piece.isfinite().all()):
                    return entry
                left -= count
    return None
