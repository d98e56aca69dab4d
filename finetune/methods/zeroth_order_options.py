"""Section `zo`: formulas and sources are in `finetune.methods.zeroth_order`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune.adapters.registry import ADAPTERS
from finetune.objectives.registry import check_objective, find_objective
from finetune.options import Conflict, Count, CountOrZero, Number, Positive, Section, Share

PRODUCT_RANK = 32  # of all pending groups together: a few percent of a product, and of the weights' memory


class ZerothOrderOptions(Section):
    """Zeroth-order tuning."""

    parameters: Literal["all", *ADAPTERS] = "all"
    """What is perturbed: all weights of the model, a LoRA adapter, or keys and values that stand before every layer's own."""
    prefix_tokens: Count = 5
    """Positions that a prefix has; it begins as random tokens' keys and values."""
    objective: Annotated[Any, BeforeValidator(check_objective)] = "loss"
    """What is made small: loss; classification (of the data's few completions, as MeZO trains), accuracy, exact_match or f1
    of the completion; FILE.py:FUNCTION or MODULE:FUNCTION, a reward to make large (in Python, a function), which is called
    as `finetune.objectives.rewards.Reward` says."""
    max_new_tokens: Count = 32
    """What f1 and rewards are of: at most so many tokens, decoded greedily; each is a pass over the weights."""
    estimator: Literal["spsa", "fzoo"] = "spsa"
    noise: Literal["rademacher", "gaussian", "low_rank"] = "rademacher"
    """Signs cost less than half of normals, pending ones a sixth. MeZO uses normals, LOZO low_rank."""
    rank: CountOrZero = 0
    """Of low_rank noise; 0: 4 there."""
    perturb: Literal["weights", "products"] = "weights"
    """products: noise of low rank is added to what linear layers multiply, x W^T + (x V) U^T, and W stays as it is: faster, in
    less memory, with other rounding; see `offload.perturb.products`."""
    epsilon: Positive = 1e-3
    perturbations: Count = 1
    """Per step; all are computed from one fetch of the weights."""
    update: Literal["sgd", "sign"] = "sgd"
    momentum: Share = 0.0
    momentum_window: Count = 10
    """Steps that momentum looks back on."""
    clip_quantile: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Projected gradients are clipped to this quantile of the last hundred."""
    fold_steps: Count | None = None
    """Steps that are summed before they are rounded into the weights; None: as many as have 32 noises (rademacher; 8 gaussian)
    together, those that momentum looks back on among them; 50 with low_rank, which keeps one V so long."""
    rounding: Literal["exact", "nearest", "stochastic"] = "exact"
    """How a sum goes into weights stored in 16 bits: exact keeps fp32 weights on disk. MeZO: nearest with fold_steps 1."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.estimator == "fzoo" and self.perturbations < 2:
            yield Conflict(
                ("estimator", "perturbations"),
                f"expected perturbations of at least 2 for fzoo, which takes their spread, found {self.perturbations}",
            )
        if self.rank and self.noise != "low_rank":
            yield Conflict(
                ("rank", "noise"), f"expected a rank with low_rank noise only, found {self.rank} with {self.noise}"
            )
        if self.noise == "low_rank" and self.momentum:
            yield Conflict(
                ("noise", "momentum"),
                f"expected no momentum with low_rank noise, whose V changes every fold_steps steps, found {self.momentum}",
            )
        if self.noise == "low_rank" and self.rounding == "stochastic":
            yield Conflict(
                ("noise", "rounding"), "expected rounding exact or nearest with low_rank noise, found stochastic"
            )
        if self.perturb == "products" and (self.noise != "low_rank" or self.parameters != "all"):
            yield Conflict(
                ("perturb", "noise", "parameters"),
                f"expected noise low_rank and parameters all with perturb products, found {self.noise} and {self.parameters}",
            )

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        if config.method != "zo" or not config.dataset.packing:
            return
        if not find_objective(self.objective).packs:
            yield Conflict(
                ("method", "zo.objective", "dataset.packing"),
                f"expected dataset.packing off with zo.objective {self.objective}, which is asked row by row, found it on",
            )
        if self.parameters in ADAPTERS and (why := ADAPTERS[self.parameters].one_text):
            yield Conflict(
                ("method", "zo.parameters", "dataset.packing"),
                f"expected dataset.packing off with zo.parameters {self.parameters}, {why}, found it on",
            )

    @property
    def group_steps(self) -> int:
        if self.fold_steps is not None or self.noise == "low_rank":
            return self.fold_steps or 50
        noises = self.perturbations * (self.momentum_window if self.momentum else 1)
        return max(1, {"rademacher": 32, "gaussian": 8}[self.noise] // noises)

    @property
    def product_groups(self) -> int:
        """Groups whose factors products can meet beside the weights; 0: none, weights are perturbed."""
        return max(1, PRODUCT_RANK // self.noise_rank) if self.perturb == "products" else 0

    @property
    def steps_between_folds(self) -> int:
        """After so many steps what is pending is folded into weights on disk."""
        return self.group_steps * max(1, self.product_groups)

    @property
    def noise_rank(self) -> int:
        return (self.rank or 4) if self.noise == "low_rank" else 0

    @property
    def variants(self) -> int:
        """Versions of the weights that a step computes."""
        return self.perturbations + 1 if self.estimator == "fzoo" else 2 * self.perturbations
