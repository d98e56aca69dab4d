"""Section `training`: steps, batches, learning rate, what is saved and measured when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune.config.evaluation_options import EvaluationOptions, StepsOrEpoch
from finetune.config.schedule_options import SCHEDULES, argument_problems, length_problem, rate_problem, warmup_steps
from finetune.methods.registry import METHODS
from finetune.objectives.registry import PREFERENCES
from finetune.options import Conflict, Count, CountOrZero, NonNegative, Positive, Share, Switch, show


def _check_micro_batch_size(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():  # from a command line
        value = int(value)
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"expected a number of rows, 1 or more, or auto, found {show(value)}")
    return value


def _check_report_to(value: Any) -> Any:
    """One word stands for a list of it, none for an empty one, as in Transformers."""
    if isinstance(value, str):
        return [] if value == "none" else [value]
    return value


REPORTERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""Transformers' word for where metrics go -> the package that this needs."""


class TrainingOptions(EvaluationOptions):
    """One step is one optimizer update over `batch_size` rows, in micro-batches of at most `micro_batch_size` rows."""

    objective: Literal["loss", *PREFERENCES] = "loss"
    """What methods with gradients minimise: the loss of the model's own forward, or that of preferences between answers, see
    `preference`. For method zo there is `zo.objective`."""
    max_steps: Count | None = None
    """Stops after this many steps. None: after `epochs`."""
    epochs: Positive = 1.0
    """Passes over the data."""
    batch_size: Count = 8
    """Rows a step."""
    micro_batch_size: Annotated[int | Literal["auto"], BeforeValidator(_check_micro_batch_size)] = 1
    """Rows that compute together. It decides how much memory activations need, and in which order numbers are summed. auto: as
    many as make a step fast in the memory that there is, see `finetune.micro_batch_choice`."""
    learning_rate: NonNegative | None = None
    """At its highest. None: what suits the method, see `Config.learning_rate`."""
    lr_scheduler: Literal[*SCHEDULES] = "linear"
    """A name of `transformers.SchedulerType`. Schedules that need an evaluation in every step are left out."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """`scheduler_specific_kwargs` of `transformers.get_scheduler`, such as `min_lr`; see `finetune.config.schedule_options`."""
    warmup_steps: CountOrZero = 0
    """Steps in which the learning rate rises from 0."""
    warmup_ratio: Share = 0.0
    """The same as a share of all steps, rounded up. Give one of the two."""
    weight_decay: NonNegative = 0.0
    """Decoupled, as in AdamW."""
    decay_norms_and_biases: Switch = False
    """Whether norms and biases decay too; Transformers' Trainer leaves them alone. Method zo decays all weights: its journal
    has one factor a step. Runs that began before this key existed have decayed all."""
    adam_beta1: Share = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: Share = 0.999
    """AdamW's decay rate of the second moment."""
    adam_epsilon: Positive = 1e-8
    """AdamW's term in the denominator."""
    max_grad_norm: NonNegative | None = 1.0
    """The norm to which all gradients together are clipped. 0 or None: they are not clipped."""
    router_loss: Literal["config", "without", "micro_batch", "global_batch"] = "config"
    """The loss by which a mixture of experts keeps its routers balanced, beside that of the tokens. config: if config.json has
    `output_router_logits`; micro_batch: the model's own, over each micro-batch; global_batch: over all rows of a step together
    (Qiu et al. 2025)."""
    router_loss_coefficient: NonNegative | None = None
    """What it counts. None: `router_aux_loss_coef` of config.json."""
    label_smoothing_factor: Share = 0.0
    """Share of each label that is spread over the vocabulary, in training; evaluations measure the cross entropy alone. As
    `label_smoothing` of PyTorch's cross entropy."""
    z_loss: NonNegative = 0.0
    """What the mean of log(sum(exp(logits)))^2 counts in the loss, so that logits stay small; PaLM's is 1e-4."""
    loss_average: Literal["token", "sequence"] = "token"
    """What the loss of a step is a mean of. token: of all trained tokens of the step, however it is cut into micro-batches.
    sequence: of texts, each of which is the mean of its tokens."""
    neftune_noise_alpha: Positive | None = None
    """NEFTune (Jain et al. 2023): in training, embeddings get uniform noise of at most alpha / sqrt(length x width). None: no
    noise."""
    seed: Annotated[CountOrZero, Field(lt=1 << 64)] = 42
    """Of the order of the data, dropout, adapters' first values, noise and the choice of blocks."""
    save_steps: StepsOrEpoch = 50
    """Saves the state, from which `resume` continues, every so many steps; epoch: at the end of each pass over the data. Ctrl-C
    saves it too."""
    save_total_limit: Count | None = None
    """So many states are kept, the newest ones. None: two, so that there is another where the newest is damaged."""
    report_to: Annotated[list[Literal[*REPORTERS]], BeforeValidator(_check_report_to)] = []
    """Where metrics go besides `metrics.jsonl`, through Transformers' own callbacks; none: nowhere else. What else they need is
    in variables of the environment, such as WANDB_PROJECT."""

    @property
    def least_micro_batch_size(self) -> int:
        """Where it is auto: the smallest that can be chosen."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def kept_states(self) -> int:
        return self.save_total_limit or 2

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.warmup_steps and self.warmup_ratio:
            yield Conflict(
                ("warmup_steps", "warmup_ratio"),
                f"expected warmup_steps or warmup_ratio, found both ({self.warmup_steps} and {self.warmup_ratio})",
            )
        schedule, arguments = self.lr_scheduler, self.lr_scheduler_kwargs
        problems = list(argument_problems(schedule, arguments))
        for problem in problems:
            yield Conflict(("lr_scheduler", "lr_scheduler_kwargs"), problem)
        if self.max_steps and not problems:
            warmup = warmup_steps(self.warmup_steps, self.warmup_ratio, self.max_steps)
            if problem := length_problem(schedule, arguments, warmup, self.max_steps):
                yield Conflict(
                    ("max_steps", "lr_scheduler", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"), problem
                )

        if self.router_loss == "without" and self.router_loss_coefficient is not None:
            yield Conflict(
                ("router_loss", "router_loss_coefficient"),
                f"expected no router_loss_coefficient with router_loss without, found {self.router_loss_coefficient:g}",
            )

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        yield from super().conflicts_with(config)
        if self.save_total_limit is not None and "state" not in METHODS[config.method].files(config):
            yield Conflict(
                ("training.save_total_limit", "method"),
                "training.save_total_limit: expected only with methods that save states, found method "
                f"{config.method}, of which every step is durable",
            )
        yield from self._form_conflicts(config)
        left = ("config", "without") if config.objective in tuple(PREFERENCES) else ("config",)
        if config.objective != "loss" and (self.router_loss not in left or self.router_loss_coefficient is not None):
            keys = ("training.router_loss", "training.router_loss_coefficient", "zo.objective", "training.objective")
            yield Conflict(keys, "expected only with objective loss, found another objective")
        schedule, arguments = self.lr_scheduler, self.lr_scheduler_kwargs
        if not any(argument_problems(schedule, arguments)):
            if problem := rate_problem(schedule, arguments, config.learning_rate):
                keys = ("lr_scheduler", "lr_scheduler_kwargs", "learning_rate")
                yield Conflict(("method", *(f"training.{key}" for key in keys)), problem)

    def _form_conflicts(self, config: Any) -> Iterator[Conflict]:
        has_gradients = METHODS[config.method].has_gradients
        for key in ("label_smoothing_factor", "z_loss", "loss_average", "neftune_noise_alpha"):
            if getattr(self, key) == type(self).model_fields[key].default:
                continue
            if config.objective != "loss":
                keys = (f"training.{key}", "zo.objective", "training.objective")
                yield Conflict(keys, f"training.{key}: expected only with objective loss, found another objective")
            elif key == "neftune_noise_alpha" and not has_gradients:
                yield Conflict(
                    ("training.neftune_noise_alpha", "method"),
                    f"training.neftune_noise_alpha: expected a method with gradients, found {config.method}, which compares "
                    "losses of the same inputs",
                )
