"""The norm of a gradient that comes in parts, with the bits that PyTorch has for the whole of it; see `csrc/norm.h`."""

from __future__ import annotations

import torch

from finetune.offload.update.kernels import add_squares, sum_of_squares

WIDTHS = 8, 4, 16
"""Lanes of PyTorch's vectors, the likeliest first: of AVX2, for which this kernel of it is built on x86; of ARM; of AVX-512."""


class NormInParts:
    """As `torch.linalg.vector_norm` of the parts behind one another, contiguous, on a CPU.

    dtype: of all parts, fp32 or bf16. width: one of `WIDTHS`.
    """

    def __init__(self, dtype: torch.dtype, width: int | None = None) -> None:
        self._dtype = dtype
        self._lanes = torch.zeros(WIDTH if width is None else width)
        self._vector = self._lanes.nbytes // dtype.itemsize
        self._rest = torch.empty(0, dtype=dtype)
        """Elements that fill no vector yet."""

    def add(self, part: torch.Tensor) -> None:
        """Contiguous."""
        part = part.detach().view(-1)
        if self._rest.numel():
            part = torch.cat([self._rest, part])
        whole = part.numel() - part.numel() % self._vector
        add_squares(self._lanes, part[:whole])
        self._rest = part[whole:].clone()

    def add_zeros(self, count: int) -> None:
        """A part of so many zeros."""
        if self._rest.numel():
            fill = min(count, self._vector - self._rest.numel())
            self.add(torch.zeros(fill, dtype=self._dtype))
            count -= fill
        if rest := count % self._vector:  # whole vectors of zeros add nothing
            self._rest = torch.zeros(rest, dtype=self._dtype)

    def norm(self) -> torch.Tensor:
        """[] in the dtype of the parts."""
        return torch.tensor(sum_of_squares(self._lanes, self._rest)).sqrt().to(self._dtype)


def _width_of_torch() -> int:
    values = [torch.linspace(-1e3, 1.7, size) ** 3 for size in (801, 4090, 20003)]

    def fits(width: int) -> bool:
        for x in values:
            norm = NormInParts(torch.float32, width)
            norm.add(x)
            if not norm.norm().equal(torch.linalg.vector_norm(x)):
                return False
        return True

    return next(filter(fits, WIDTHS), WIDTHS[0])


WIDTH: int = _width_of_torch()
"""Of this process's PyTorch."""
