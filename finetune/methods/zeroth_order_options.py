"""Section `zo`: formulas and sources are in `finetune.methods.zeroth_order`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune.adapters.registry import ADAPTERS
from finetune.objectives.registry import check_objective, find_objective
from finetune.options import Conflict, Count, CountOrZero, Number, Positive, Section, Share

QZO_CLIP = 100.0
PRODUCT_RANK = 32  # of all pending groups together: a few percent of a product, and of the weights' memory


class ZerothOrderOptions(Section):
    """Zeroth-order tuning."""

    parameters: Literal["all", "scales", *ADAPTERS] = "all"
    """What is tuned: all weights of the model, the scales of packed weights (QZO), a LoRA adapter, that of `adapter.type`, or a
    prefix of keys and values before those of every layer."""
    prefix_tokens: Count = 5
    """Positions of a prefix. It starts as the keys and values of random tokens."""
    objective: Annotated[Any, BeforeValidator(check_objective)] = "loss"
    """What is minimised: loss; classification (among the data's few completions, as MeZO trains); accuracy, exact_match or f1
    of the completion, as errors. Or a reward to maximise: FILE.py:FUNCTION, MODULE:FUNCTION, in Python a function; it is
    called as `finetune.objectives.rewards.Reward` says."""
    max_new_tokens: Count = 32
    """For f1 and rewards: most tokens that are decoded, greedily. Each is a pass over the weights."""
    estimator: Literal["spsa", "fzoo", "es", "es_antithetic"] = "spsa"
    """How losses become coefficients of the noise. spsa: a pair of losses for each noise. fzoo: one loss each, and one without
    noise. es: one loss each, less their mean and by their spread (evolution strategies); es_antithetic: the same with pairs."""
    noise: Literal["rademacher", "gaussian", "low_rank"] = "rademacher"
    """Random signs cost less than half of normals, and a sixth where updates are pending. MeZO uses normals, LOZO low_rank."""
    rank: CountOrZero = 0
    """Of low_rank noise. 0: 4."""
    perturb: Literal["weights", "products"] = "weights"
    """products: low-rank noise is added to what linear layers compute, x W^T + (x V) U^T, and W stays as it is. Faster, in
    less memory, and rounded differently; see `finetune.offload.perturb.products`."""
    epsilon: Positive = 1e-3
    """How far the weights are moved along the noise."""
    perturbations: Count = 1
    """Noises a step. One read of the weights serves all."""
    update: Literal["sgd", "sign"] = "sgd"
    """sign: only the signs of the coefficients count."""
    momentum: Share = 0.0
    """What is left of an update one step later."""
    momentum_window: Count = 10
    """Steps that momentum looks back on."""
    clip_quantile: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Coefficients are clipped to this quantile of the last hundred."""
    clip: Positive | None = None
    """Coefficients are clipped to this size. None: 100 with scales, as in QZO's code; otherwise they are not."""
    fold_steps: Count | None = None
    """Steps whose sum is rounded into the weights at once. None: as many as have 32 noises together (8 with gaussian), with
    those that momentum looks back on; 50 with low_rank, which keeps one V for so long."""
    rounding: Literal["exact", "nearest", "stochastic"] = "exact"
    """How a sum is added to 16-bit weights. exact: fp32 weights are kept on disk. MeZO: nearest with fold_steps 1."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.estimator != "spsa" and self.perturbations < 2:
            yield Conflict(
                ("estimator", "perturbations"),
                f"expected perturbations of at least 2 for {self.estimator}, which takes their spread, found "
                f"{self.perturbations}",
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
        if self.parameters == "scales" and (self.noise == "low_rank" or self.rounding != "exact"):
            yield Conflict(
                ("parameters", "noise", "rounding"),
                "expected noise rademacher or gaussian and rounding exact with parameters scales, which are fp32 and no "
                f"matrices, found {self.noise} and {self.rounding}",
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
                f"expected dataset.packing off with zo.objective {self.objective}, which is computed row by row, found it on",
            )
        if self.parameters in ADAPTERS and (why := ADAPTERS[self.parameters].one_text):
            yield Conflict(
                ("method", "zo.parameters", "dataset.packing"),
                f"expected dataset.packing off with zo.parameters {self.parameters}, {why}, found it on",
            )

    @property
    def most_coefficient(self) -> float | None:
        """Size that coefficients are clipped to."""
        return QZO_CLIP if self.clip is None and self.parameters == "scales" else self.clip

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
        one_sided = {"fzoo": self.perturbations + 1, "es": self.perturbations}
        return one_sided.get(self.estimator, 2 * self.perturbations)
