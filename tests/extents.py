"""What several tests know of stored tensors: a slow reference reader, and stand-ins that have no file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from finetune.offload.weights.formats import PlainTensor


def read_source(source: PlainTensor) -> torch.Tensor:
    """The reference reader: byte by byte where the extents say, nothing twice."""
    target = torch.full((source.num_bytes,), 0xAA, dtype=torch.uint8)
    written = np.zeros(source.num_bytes, np.int8)
    for path, offset, num_bytes, start in source.extents:
        with open(path, "rb") as file:
            file.seek(offset)
            target[start : start + num_bytes] = torch.frombuffer(bytearray(file.read(num_bytes)), dtype=torch.uint8)
            written[start : start + num_bytes] += 1
    assert (written == 1).all()
    return target.view(source.dtype).reshape(source.shape)


def equal_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    first, second = first.contiguous(), second.contiguous()
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and first.flatten().view(torch.uint8).equal(second.flatten().view(torch.uint8))
    )


def plain_weights(values: Mapping[str, torch.Tensor]) -> dict[str, PlainTensor]:
    """How these tensors would be stored, without the files."""
    return {name: PlainTensor(value.dtype, tuple(value.shape), ()) for name, value in values.items()}
