"""The learning rate, a function of the step alone: Transformers' schedules, set to any step."""

from __future__ import annotations

from typing import Any

import torch

from finetune.config.schedule_options import length_problem, warmup_note, warmup_steps
from finetune.config.training_options import TrainingOptions
from finetune.memory.errors import UserError


def check_schedule(options: TrainingOptions, num_steps: int) -> str | None:
    """What should be said about a schedule over `num_steps`. Raises UserError when these are too few for it."""
    warmup = warmup_steps(options.warmup_steps, options.warmup_ratio, num_steps)
    if problem := length_problem(options.lr_scheduler, options.lr_scheduler_kwargs, warmup, num_steps):
        raise UserError(f"training: {problem}")
    return warmup_note(options.lr_scheduler, warmup, num_steps)


def make_scheduler(options: TrainingOptions, optimizer: torch.optim.Optimizer, num_steps: int, first_step: int) -> Any:
    """`transformers.get_scheduler` for `optimizer`, as after `first_step` steps."""
    from transformers.optimization import get_scheduler

    warmup = warmup_steps(options.warmup_steps, options.warmup_ratio, num_steps)
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
