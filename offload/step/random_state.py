"""The state of the random generators that a lane draws from: the CPU's, and the accelerator's where there is one."""

from __future__ import annotations

import torch

RandomState = tuple[torch.Tensor, torch.Tensor | None]


def get_random_state() -> RandomState:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.get_rng_state(), None if accelerator is None else torch.get_device_module(accelerator).get_rng_state()


def set_random_state(state: RandomState) -> None:
    cpu, device = state
    torch.set_rng_state(cpu)
    if device is not None:
        torch.get_device_module(torch.accelerator.current_accelerator()).set_rng_state(device)
