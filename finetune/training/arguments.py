"""Transformers' `TrainingArguments` as values of a configuration, for `Trainer(args=...)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from finetune.config.other_names import with_own_names
from finetune.memory.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

_TAKEN = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "save_total_limit",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "label_smoothing_factor", "neftune_noise_alpha",
    "per_device_train_batch_size", "gradient_accumulation_steps", "report_to",
)  # fmt: skip
"""Whose values, defaults too, are the run's."""
_READ = ("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio",
         "eval_strategy", "eval_steps", "save_strategy", "save_steps", "output_dir")  # fmt: skip
_OF_NO_MATTER = (
    "logging_", "log_", "disable_tqdm", "do_", "dataloader_", "remove_unused_columns", "push_to_hub", "hub_", "run_name",
    "project", "trackio_", "per_device_eval_batch_size", "gradient_checkpointing", "use_cpu", "prediction_loss_only",
    "skip_memory_metrics", "save_only_model", "restore_callback_states", "resume_from_checkpoint", "include_", "eval_do_concat",
    "label_names", "eval_accumulation_steps", "overwrite_output_dir", "torch_empty_cache_steps", "local_rank", "jit_mode_eval",
)  # fmt: skip
"""How names begin that change no number here."""


def values_of(args: TrainingArguments) -> dict[str, Any]:
    """Values of `finetune.Config`. Raises UserError for arguments that would ask for something else than what runs here."""
    default = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu)
    names = [field.name for field in fields(args) if field.init and not field.name.startswith("_")]
    changed = [name for name in names if getattr(args, name) != getattr(default, name)]
    left = [name for name in changed if name not in (*_TAKEN, *_READ) and not name.startswith(_OF_NO_MATTER)]
    if left:
        found = ", ".join(f"{name}={getattr(args, name)!r:.40}" for name in left)
        raise UserError(
            f"args: expected arguments that have a meaning here, found {found}: leave them out, and set what they are for by "
            "the keys of `finetune config`"
        )
    training = {name: getattr(args, name) for name in _TAKEN}
    if args.max_steps > 0:
        training["max_steps"] = args.max_steps
    else:
        training["num_train_epochs"] = args.num_train_epochs
    training["lr_scheduler_type"] = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    training["lr_scheduler_kwargs"] = dict(args.lr_scheduler_kwargs or {})
    warmup = args.warmup_steps or getattr(args, "warmup_ratio", None) or 0
    training |= {"warmup_ratio": warmup} if 0 < warmup < 1 else {"warmup_steps": int(warmup)}
    for name in ("eval", "save"):
        training |= _when(name, getattr(args, f"{name}_strategy"), getattr(args, f"{name}_steps"))
    return with_own_names({"output": args.output_dir, "training": training})[0]


def _when(name: str, strategy: Any, steps: float | None) -> Mapping[str, Any]:
    """What Transformers leaves out at "no" is an evaluation; states are saved in any case, here at the usual steps."""
    word = getattr(strategy, "value", strategy)
    if word == "steps":
        if steps is None or steps != int(steps):
            raise UserError(f"args: expected {name}_steps to be a number of steps, found {steps}, a share of them")
        return {f"{name}_steps": int(steps)}
    if word not in ("no", "epoch"):
        raise UserError(f"args: expected {name}_strategy no, steps or epoch, found {word}: set load_best_model_at_end")
    return {f"{name}_steps": "epoch"} if word == "epoch" else {}
