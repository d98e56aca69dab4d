"""A GGUF file that is written in a stream: its header first, then tensors in any order, a few rows at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune.memory.errors import UserError
from finetune.offload.residency.io import IOEngine
from finetune.offload.rewrite.gguf_contents import NewGgufTensor
from finetune.offload.rewrite.writer import Progress

if TYPE_CHECKING:
    from gguf import GGUFWriter

CHUNK_BYTES = 4 << 20
"""Of numbers in fp32, which are quantised at once."""
QUANTIZING_BYTES = 12 * CHUNK_BYTES
"""Host memory that this takes."""


class GgufFile:
    """tensors: in the order of their offsets. Bits are those of `gguf.quantize` of the numbers in fp32."""

    def __init__(
        self, io: IOEngine, writer: GGUFWriter, tensors: Sequence[NewGgufTensor], path: Path, progress: Progress
    ) -> None:
        """Writes the header, and makes the file as long as it will be. writer: with all metadata. Raises OSError."""
        from gguf import GGMLQuantizationType

        for tensor in tensors:
            # Given as numbers the shape is taken as it is: only the bytes of quantised ones would be counted back.
            kind = GGMLQuantizationType[tensor.block_type]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=kind)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        self._io, self._progress = io, progress
        self._total = sum(tensor.padded_bytes for tensor in tensors)
        self._start = -(-path.stat().st_size // 32) * 32
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, self._start + self._total)
        self._target = io.open(path, writable=True)
        self._written = 0

    def put(self, tensor: NewGgufTensor, first_row: int, numbers: Tensor) -> None:
        """Writes rows of a tensor, and waits. numbers: [rows, columns], or a vector, of any floating-point dtype.

        Raises UserError for numbers that are not finite, or not in F16.
        """
        rows = numbers.reshape(-1, tensor.shape[-1])
        step = max(1, CHUNK_BYTES // (4 * rows.shape[1]))
        for start in range(0, len(rows), step):
            data = self._quantize(tensor, rows[start : start + step])
            at = self._start + tensor.offset + (first_row + start) * tensor.row_bytes
            self._io.wait(self._io.submit_writes([(self._target, at, data.nbytes, data.data_ptr())]))
            self._written += data.nbytes
            self._progress(self._written, self._total)

    def finish(self) -> None:
        """Makes the file durable."""
        self._io.sync(self._target)
        self._io.close_file(self._target)

    def _quantize(self, tensor: NewGgufTensor, rows: Tensor) -> Tensor:
        from gguf import GGMLQuantizationType, quantize

        if not bool(rows.isfinite().all()):
            raise UserError(f"the values of {tensor.name} are not all finite: the model or the adapter seems to be broken")
        with np.errstate(over="ignore"):  # looked for below
            data = quantize(rows.float().numpy(), GGMLQuantizationType[tensor.block_type])
        if tensor.block_type == "F16" and not np.isfinite(data).all():
            raise UserError(f"{tensor.name} has numbers that F16 can't hold: write it with --gguf bf16")
        return torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
