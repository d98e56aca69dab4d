"""Where the parameters of adapters live."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn


def copy_to(device: torch.device, parameters: Sequence[nn.Parameter]) -> None:
    """Gives the parameters memory on `device`; those that share memory (tied adapters) go on sharing it."""
    copies: dict[int, torch.Tensor] = {}
    sharing = Counter(p.untyped_storage().data_ptr() for p in parameters)
    for parameter in parameters:
        storage = parameter.untyped_storage()
        if sharing[storage.data_ptr()] == 1:
            parameter.data = parameter.data.to(device, copy=True)
            continue
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).to(device, copy=True)
        copy = copies[storage.data_ptr()].untyped_storage()
        data = torch.empty(0, dtype=parameter.dtype, device=device)
        parameter.data = data.set_(copy, parameter.storage_offset(), parameter.shape, parameter.stride())
