"""The learning rate, a function of the step alone: Transformers' schedules, set to any step."""

from __future__ import annotations

from typing import Any

import torch

from finetune.config import TrainingOptions


def make_scheduler(options: TrainingOptions, optimizer: torch.optim.Optimizer, num_steps: int, first_step: int) -> Any:
    """`transformers.get_scheduler` for `optimizer`, as after `first_step` steps."""
    from transformers.optimization import get_scheduler

    warmup = options.warmup_steps or int(options.warmup_ratio * num_steps)
    scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer,
        warmup,
        num_steps,
        scheduler_specific_kwargs=dict(options.lr_scheduler_kwargs) or None,
    )
    if first_step:
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": first_step})
        for group, base, rate in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * rate(first_step)
    return scheduler
