"""Norms of gradients in parts: the bits of PyTorch's norm of the whole."""

from __future__ import annotations

import pytest
import torch

from finetune.offload.update.norms import WIDTHS, NormInParts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(960,) * 7, (1, 2, 3), (961, 0, 37, 5003), (4096, 17, 1), (5, 5, 5, 5, 5), (0,), (120_001, 8)], ids=str
)
@pytest.mark.parametrize("zeros", [(), (1,), (0, 2), (1, 2, 3)], ids=str)
def test_bits_are_those_of_the_whole(sizes, zeros, dtype):
    generator = torch.Generator().manual_seed(sum(sizes))
    parts = [torch.randn(size, generator=generator).mul(3).to(dtype) for size in sizes]
    norm = NormInParts(dtype)
    for index, part in enumerate(parts):
        if index in zeros:
            part.zero_()
            norm.add_zeros(part.numel())
        else:
            norm.add(part)
    expected = torch.linalg.vector_norm(torch.cat(parts))
    assert norm.norm().dtype == dtype and norm.norm().equal(expected)


def test_other_widths_round_otherwise():
    """So the one that fits is that of PyTorch's kernel."""
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    found = set()
    for width in WIDTHS:
        norm = NormInParts(torch.float32, width)
        norm.add(x)
        found.add(float(norm.norm()))
        assert float(norm.norm()) == pytest.approx(float(x.double().norm()), rel=1e-5)
    assert len(found) == len(WIDTHS)


def test_numbers_that_are_not_finite_stay_so():
    norm = NormInParts(torch.bfloat16)
    norm.add(torch.tensor([1.0, float("nan"), 2.0], dtype=torch.bfloat16))
    assert norm.norm().isnan()
