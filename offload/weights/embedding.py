"""Embedding rows on demand: of a [vocabulary, hidden] table only the rows that the batch names are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finetune.memory.errors import UserError
from finetune.offload.weights.formats import PlainTensor, StoredWeight
from finetune.offload.weights.layout import row_ranges


class RowsOnDemand:
    """Takes over the forward of one `nn.Embedding` (or a subclass that scales its output).

    The module's own forward runs on a compact table of the wanted rows with the ids renumbered, so what a subclass does
    around the look-up stays as it is. `read` brings rows for a whole step at once; a forward that names others reads
    them itself.
    """

    def __init__(self, module: nn.Embedding, source: StoredWeight, dtype: torch.dtype, io: Any, device: torch.device) -> None:
        self._module = module
        self._forward = module.forward
        self._source = source
        self._dtype = dtype
        self._io = io
        self.device = device
        self._files: dict[Any, int] = {}
        self.ids = torch.empty(0, dtype=torch.int64)  # sorted ids whose rows are in memory
        self.rows = torch.empty(0)  # as stored, in the order of `ids`
        self.table = torch.empty(0)  # what the forward looks up: `rows` in the dtype that computes, or a variant of them
        self._placeholder = module._parameters["weight"]
        self.trained = False  # whether a gradient of the rows is wanted
        self.parameter: nn.Parameter | None = None  # over `table`, for all forwards between two reads
        self._earlier: list[tuple[torch.Tensor, nn.Parameter]] = []  # (ids, parameter), after more were asked for
        self.padding_idx = module.padding_idx  # of the whole table; it matters for gradients only
        self.after_read: Callable[[], None] = lambda: None
        self.stall_seconds = 0.0
        module.forward = self

    def serves(self, module: nn.Module) -> bool:
        """Whether `module` is this table, or an adapter around it."""
        return any(part is self._module for part in module.modules())

    def move_to(self, source: StoredWeight) -> None:
        """From now on rows are read from another place; those in memory are given up."""
        for file in self._files.values():
            self._io.close_file(file)
        self._files = {}
        self._source = source
        self.ids, self.rows, self.table = torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)
        self.parameter = None

    def take_gradient(self) -> torch.Tensor | None:
        """Of the rows `ids`, [rows, hidden]; zero for the padding row, as the module itself would have it."""
        current = [] if self.parameter is None else [(self.ids, self.parameter)]
        found = [(ids, parameter) for ids, parameter in [*self._earlier, *current] if parameter.grad is not None]
        self._earlier = []
        if not found:
            return None
        ids, parameter = found[0]
        grad, parameter.grad = parameter.grad, None
        if len(found) > 1 or len(ids) < len(self.ids):
            grad = torch.zeros_like(self.table).index_add_(0, self._place(ids), grad)
        for ids, parameter in found[1:]:
            grad.index_add_(0, self._place(ids), parameter.grad)
            parameter.grad = None
        if self.padding_idx is not None:
            grad[self.ids == self.padding_idx] = 0
        return grad

    def read(self, ids: torch.Tensor) -> None:
        """Brings the rows of `ids` (int64, any shape); rows read before are given up, with their gradients."""
        self._earlier = []
        self._read(ids)

    def _read(self, ids: torch.Tensor) -> None:
        ids = torch.unique(ids.cpu())
        if ids.numel() and (ids[0] < 0 or ids[-1] >= self._source.shape[0]):
            raise UserError(
                f"token id {int(ids[-1] if ids[-1] >= self._source.shape[0] else ids[0])} is outside the embedding table "
                f"of {self._source.shape[0]} rows: is the tokenizer that of this model?"
            )
        if ids.numel() == self.ids.numel() and bool((ids == self.ids).all()):
            return
        wanted = self._source.rows(row_ranges(ids, self._source.shape[0]))
        rows = wanted.load(self._read_tensor)
        self.ids, self.rows, self.table = ids, rows, wanted.decode(rows, self._dtype).to(self.device)
        self.parameter = None
        self.after_read()

    def _read_tensor(self, stored: PlainTensor) -> torch.Tensor:
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        reads = []
        for path, offset, num_bytes, target_offset in stored.extents:
            if path not in self._files:
                self._files[path] = self._io.open(path)
            reads.append((self._files[path], offset, num_bytes, tensor.data_ptr() + target_offset))
        if reads:
            self.stall_seconds += self._io.wait(self._io.submit_reads(reads))
        return tensor

    def _read_more(self, ids: torch.Tensor) -> None:
        """In mid-step: where a gradient is wanted, that of the rows which earlier forwards looked up is kept."""
        if not self.trained:
            self._read(ids)
            return
        if self.parameter is not None:
            self._earlier.append((self.ids, self.parameter))
        self._read(torch.cat([self.ids, ids.cpu().reshape(-1)]))

    def _place(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.ids, ids).to(self.device)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.cpu().reshape(-1)
        place = torch.searchsorted(self.ids, flat).clamp_(max=max(self.ids.numel() - 1, 0))
        if not self.ids.numel() or not bool((self.ids[place] == flat).all()):
            self._read_more(ids)
            place = torch.searchsorted(self.ids, flat)
        if self.parameter is None or self.parameter.data_ptr() != self.table.data_ptr():
            self.parameter = nn.Parameter(self.table, requires_grad=self.trained)
        self._module._parameters["weight"] = self.parameter
        self._module.padding_idx = None  # need not be a row of the compact table; adapters around the module look at it
        try:
            return self._forward(place.view(ids.shape).to(ids.device))
        finally:
            self._module._parameters["weight"] = self._placeholder
            self._module.padding_idx = self.padding_idx
