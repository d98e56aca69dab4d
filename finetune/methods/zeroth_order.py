"""Zeroth-order tuning: forward passes under random perturbations, and a journal of seeds and scalars.

The weights are never written step by step: an update is a few (seed, coefficient) pairs, which
`finetune.offload.perturb.perturbed_weights` applies while blocks are fetched, and the journal of them is the checkpoint.

Estimators, for q perturbations z_i, radius epsilon, losses L (or another of `finetune.objectives`):
  spsa   g_i = (L(theta + epsilon z_i) - L(theta - epsilon z_i)) / (2 epsilon), averaged over i.
         Spall 1992; MeZO (Malladi et al. 2023, algorithms 1 and 2).
  fzoo   g_i = (L(theta + epsilon z_i) - L(theta)) / s, averaged over i, with s the standard deviation of the q perturbed
         losses: one forward pass a perturbation, and steps that are longer where the loss is flat. The learning rate is
         the length of a step, whatever epsilon. FZOO (Dang et al. 2025).
  es     g_i = Z_i, averaged over i, with Z the losses L(theta + epsilon z_i) less their mean, by their standard deviation: one
         forward pass a perturbation. Evolution strategies (Salimans et al. 2017), with the scores of Qiu et al. 2025 (Evolution
         strategies at scale); there, rewards are maximised, sigma is epsilon and alpha the learning rate.
  es_antithetic  g_i = (Z_i+ - Z_i-) / 2, with Z over both signs of all perturbations (mirrored sampling).
Noise: signs (FZOO's), normals (MeZO's) or low_rank, LOZO (Chen et al. 2024): z = U V^T / sqrt(rank), with V kept for
`fold_steps` steps, so that all these steps' updates are one product of that rank. It adds to weights like any other noise,
or to the products of linear layers (`perturb: products`); momentum would need the V of earlier steps and is for the other
kinds.
Updates:
  sgd    theta <- (1 - lr weight_decay) theta - lr / q sum_i g_i z_i
  sign   the same with the sign of each g_i in place of g_i
  clip, clip_quantile: g_i is first clipped to a size. With `parameters: scales` this is QZO (Shang et al. 2025), see
         `finetune.offload.perturb.scales`.
  momentum beta: in place of g_i z_i, the sum over the last `momentum_window` steps of beta^age g_i z_i; past noise is made
         again from its seeds, so no buffer is kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.adapters import peft_files as adapters
from finetune.adapters.registry import ADAPTERS
from finetune.config import Config
from finetune.data.batches import Row
from finetune.memory.errors import UserError
from finetune.memory.needs import Needs
from finetune.methods.base import Method, StepResult
from finetune.methods.journal_weights import JournalWeights, export_journal, journal_path, moves_weights
from finetune.methods.perturbation_needs import fold_needs, most_product_groups, perturbed_sizes, steps_between_folds
from finetune.methods.rounding import check_stochastic_rounding
from finetune.methods.schedule import make_scheduler
from finetune.methods.zeroth_order_options import ZerothOrderOptions
from finetune.needs_of_model import perturbed_adapter_needs
from finetune.objectives.base import Objective
from finetune.objectives.errors import StepNotKept
from finetune.offload.devices import DescribedDevice, Device
from finetune.offload.noise.noise import Group, Noise, Update
from finetune.offload.perturb.folds import folds, newest_fold
from finetune.offload.perturb.journal import Journal, Record
from finetune.offload.perturb.perturbed_weights import PerturbedWeights
from finetune.offload.perturb.products import product_weights
from finetune.offload.perturb.scales import check_scales
from finetune.offload.perturb.variants import Variant
from finetune.offload.sizing.kernel_timing import variant_seconds
from finetune.offload.sizing.needs import Streamed
from finetune.offload.step.weights import Weights
from finetune.offload.streamed_model import StreamedModel
from finetune.offload.update.parts import check_storage
from finetune.offload.weights.parts import ModelParts
from finetune.offload.weights.streamed_parts import Room
from finetune.planned_run import BatchShape, MeasuredBatch
from finetune.runs.exports import Export
from finetune.runs.identity import check_same_run
from finetune.session import Session

CLIP_HISTORY = 100  # projected gradients over which the quantile of clipping is taken
CLIP_MIN_HISTORY = 10


def probe_seed(seed: int, step: int, perturbation: int) -> int:
    """The seed of the noise of perturbation `perturbation` of step `step` (both from 0): a 64-bit hash of the three."""
    digest = hashlib.blake2b(f"{seed}/zo/{step}/{perturbation}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def variants(options: ZerothOrderOptions, seeds: Sequence[int], shared_seed: int = 0) -> list[Variant]:
    """The variants of the weights whose losses `projected_gradients` wants, in this order."""
    epsilon = options.epsilon
    if options.estimator == "fzoo":
        return [Variant(), *(Variant(seed, epsilon, shared_seed) for seed in seeds)]
    if options.estimator == "es":
        return [Variant(seed, epsilon, shared_seed) for seed in seeds]
    return [Variant(seed, sign * epsilon, shared_seed) for seed in seeds for sign in (1, -1)]


def projected_gradients(options: ZerothOrderOptions, losses: np.ndarray) -> np.ndarray:
    """losses: fp32 [variants]. Returns fp32 [perturbations]: the g_i of the module's docstring."""
    losses = losses.astype(np.float64)
    if options.estimator == "fzoo":
        spread = losses[1:].std(ddof=1)
        gradients = (losses[1:] - losses[0]) / spread if spread > 0 else np.zeros(len(losses) - 1)
    elif options.estimator in ("es", "es_antithetic"):
        spread = losses.std()
        scores = (losses - losses.mean()) / spread if spread > 0 else np.zeros(len(losses))
        gradients = scores if options.estimator == "es" else (scores[0::2] - scores[1::2]) / 2
    else:
        gradients = (losses[0::2] - losses[1::2]) / (2 * options.epsilon)
    return gradients.astype(np.float32)


def clipped(gradients: np.ndarray, history: Sequence[float], quantile: float | None) -> np.ndarray:
    """`gradients` no larger than the quantile of the sizes in `history`; as they are while there is little history."""
    if quantile is None or len(history) < CLIP_MIN_HISTORY:
        return gradients
    limit = np.float32(np.quantile(np.abs(history), quantile))
    return gradients.clip(-limit, limit)


def _check_finite(what: str, step: int, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise StepNotKept(
            f"{what} of step {step + 1} is not finite ({', '.join(f'{x:g}' for x in values[:4])}): lower "
            "training.learning_rate or zo.epsilon; the journal ends with the last good step"
        )


class ZerothOrder(Method):
    """The journal is what it keeps, beside folded weights or an adapter that can be made again from it."""

    frozen = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.variants = config.zo.variants
        self.journal: Journal | None = None

    def cut_options(self) -> dict[str, Any]:
        return {"streams_experts": self.kind is not None or self.config.zo.parameters != "scales"}

    def prepare(self, session: Session) -> None:
        _check_kernels(session.device)
        if session.adapter.needs_first_visit:
            raise UserError(
                "lora.use_dora cannot be combined with method zo, nor can rows and modules that are trained beside the adapter "
                "(lora.extra): leave it out, or use method lora"
            )
        if self.kind is None:
            _check_storage(session.parts, self.config.zo)
            if self.config.zo.rounding == "stochastic":
                parameters = session.parts.parameters
                check_stochastic_rounding(session.parts, parameters, "zo.rounding stochastic", "nearest")

    def needs(self, session: Session, batch: MeasuredBatch, streamed: Streamed) -> tuple[Needs, Streamed]:
        parts, zo = session.parts, self.config.zo
        if self.kind is not None:
            keeps_initial = ADAPTERS[self.kind].kept_initial
            needs = perturbed_adapter_needs(session, self.variants, keeps_initial)
            return needs, streamed
        perturbed = perturbed_sizes(parts, zo, self.num_steps)
        needs = perturbed.needs + fold_needs(parts, zo, self.num_steps)
        return needs, streamed.holding(perturbed.block_bytes, perturbed.chunk_bytes, perturbed.expert_bytes)

    def uses_of_weights(self, parts: ModelParts, shape: BatchShape) -> int:
        zo = self.config.zo
        if zo.parameters == "scales":
            return shape.micro_batches // self.variants  # each has its own
        # Products share a matrix among all variants; others are made in the dtype that computes.
        return shape.micro_batches if self.kind is not None or zo.product_groups else 0

    def weight_seconds(self, session: Session, device: Device) -> float:
        """With as many updates pending as there are on average."""
        zo = self.config.zo
        if self.kind is not None or zo.product_groups or zo.parameters == "scales":
            return 0.0
        steps = min(zo.steps_between_folds, self.num_steps or zo.steps_between_folds) // 2
        updates = tuple(Update(seed, 1e-3) for seed in range(steps * zo.perturbations))
        seeds = range(self.variants if zo.estimator == "fzoo" else zo.perturbations)
        if isinstance(device, DescribedDevice):
            rate = device.rates.noise_elements_per_second.get(zo.noise)
            return (len(updates) + 1) * len(seeds) / rate if rate else 0.0
        stored = next(iter(session.parts.layouts[0].views.values())).dtype
        return variant_seconds(
            Noise(zo.noise, zo.noise_rank), [Group(1.0, updates)] if updates else [], seeds, self.variants // len(seeds),
            stored, session.parts.dtype,
        )  # fmt: skip

    def open_weights(self, session: Session) -> Callable[[Room], Weights]:
        zo = self.config.zo
        named = ((name, p) for name, p in session.model.named_parameters() if p.requires_grad)
        return partial(
            PerturbedWeights,
            noise=Noise(zo.noise, zo.noise_rank),
            adapters=None if self.kind is None else dict(named),
            product_groups=most_product_groups(session.parts, zo, self.num_steps),
            scales=zo.parameters == "scales",
        )

    @property
    def schedule_notes(self) -> list[str]:
        training = self.config.training
        if self.kind is None and training.weight_decay and not training.decay_norms_and_biases:
            return ["method zo has weight decay for norms and biases too"]
        return []

    def begin(self, session: Session, objective: Objective) -> list[str]:
        config, options = self.config, self.config.zo
        self._objective = objective
        self._adapter = session.adapter
        self._model: StreamedModel = session.streamed
        self._weights: PerturbedWeights = self._model.weights
        self._folds = config.output / "weights"
        self._steps_between_folds = steps_between_folds(session.parts, options)
        self._folded = 0  # steps that the weights on disk, or the adapters in memory, hold
        about = self.about | {
            "noise": options.noise,
            "rank": options.noise_rank,
            "group_steps": options.group_steps,
            "rounding": options.rounding,
            "seed": config.training.seed,
        }
        path = journal_path(config.output)
        goes_on = config.resume and path.exists()
        keeps_initial = self.kind is not None and ADAPTERS[self.kind].kept_initial
        if not goes_on and keeps_initial:
            self._adapter.begin(self._model, config.training.seed)
            about["initial_adapter"] = self._adapter.digest()
        self.journal = Journal.resume(path) if goes_on else Journal.create(path, about)
        # What is beside the journal becomes this run's, which has the journal's lock.
        check_same_run(path, self.journal.about, about)
        notes: list[str] = []
        if keeps_initial:
            self._take_initial(about, goes_on, notes)
        self._find_folded(notes)
        self.first_step = self.journal.steps
        # Schedules are written for optimizers: this one holds the learning rate and nothing else.
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
        self.scheduler = make_scheduler(config.training, self.optimizer, self.num_steps, self.first_step)
        self._catch_up()
        return notes

    def _take_initial(self, about: dict[str, Any], goes_on: bool, notes: list[str]) -> None:
        """Sets the adapter to what the run began with: where it is lost, made again."""
        adapter, seed, initial = self._adapter, self.config.training.seed, self.config.output / "initial-adapter"
        digest = self.journal.about.get("initial_adapter", "")
        if not (self.journal.steps and adapter.read(initial, digest)):
            if goes_on:
                adapter.begin(self._model, seed)
            if adapter.digest() != digest:
                raise UserError(
                    f"{initial} is not the prefix that this run began with, and the seed gives another one on this "
                    "machine: bring it back from a copy, or start again without --resume"
                )
            if self.journal.steps:
                notes.append(f"note: {initial} was damaged or lost; it is made again from the seed")
            adapters.save(adapter.model, initial, about)
        self._weights.take_adapters()

    def step(self, step: int, groups: Sequence[Sequence[Row]]) -> StepResult:
        options, training = self.config.zo, self.config.training
        if self._steps_between_folds and step % self._steps_between_folds == 0 and step > self._folded:
            self._fold(step)
        seeds = [probe_seed(training.seed, step, i) for i in range(options.perturbations)]
        versions = variants(options, seeds, self.journal.shared_seed(step))
        losses, tokens = self._objective.values(self._model, groups, versions)
        _check_finite("the loss", step, losses)
        gradients = projected_gradients(options, losses)
        kept = clipped(gradients, self._history(), options.clip_quantile)
        if (most := options.most_coefficient) is not None:
            kept = kept.clip(-most, most)
        if options.update == "sign":
            kept = np.sign(kept)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        _check_finite("the update", step, np.float32(learning_rate) * kept)
        self.journal.append(
            Record(
                step, learning_rate, self._updates(step, learning_rate, seeds, kept),
                1.0 - learning_rate * training.weight_decay, tuple(float(g) for g in kept),
            )
        )  # fmt: skip
        self._catch_up()
        self.optimizer.step()
        self.scheduler.step()
        norm = float(np.sqrt(np.mean(np.square(gradients, dtype=np.float64))))
        return StepResult(float(np.mean(losses, dtype=np.float64)), tokens, learning_rate, norm)

    def save(self, step: int) -> None:
        """Every step is durable already."""

    def rescue(self, step: int) -> str:
        return f"{self.journal.path} holds the {self.journal.steps} steps that were done: go on with --resume"

    def write_adapter(self, directory: Path, step: int) -> None:
        self._weights.settle_adapters()
        adapters.save(self._adapter.model, directory, self.about | {"step": step})

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    @classmethod
    def tuned_weights(cls, config: Config, run: Path) -> JournalWeights | None:
        path = journal_path(run)
        return JournalWeights(config, run) if path.is_file() and moves_weights(Journal.read(path)) else None

    @classmethod
    def export(cls, job: Export) -> int | None:
        return export_journal(job) if journal_path(job.config.output).is_file() else None

    def _updates(
        self, step: int, learning_rate: float, seeds: Sequence[int], gradients: Sequence[float]
    ) -> tuple[Update, ...]:
        """What this step adds, the newest noise first."""
        rate = -learning_rate / len(seeds)
        found = [Update(seed, rate * float(g)) for seed, g in zip(seeds, gradients, strict=True)]
        beta = self.config.zo.momentum
        for age in range(1, min(self.config.zo.momentum_window, step + 1) if beta else 0):
            past = self.journal.records[step - age]
            for i, g in enumerate(past.scalars):
                found.append(Update(probe_seed(self.config.training.seed, step - age, i), rate * beta**age * g))
        return tuple(found)

    def _history(self) -> list[float]:
        records = self.journal.records[-CLIP_HISTORY:]
        return [abs(g) for record in records for g in record.scalars][-CLIP_HISTORY:]

    def _catch_up(self) -> None:
        """Has the model apply what the folded weights lack."""
        self._weights.perturbation.pending = self.journal.groups(self._folded)

    def _fold(self, step: int) -> None:
        if self.kind is not None:
            self._weights.fold_adapters()
        else:
            directory = self._folds / f"step-{step:08d}"
            self._weights.fold(directory, self.journal.digest(step), partial(self._model.engine.progress, "fold"))
            for old in folds(self._folds):
                if old != directory:
                    shutil.rmtree(old, ignore_errors=True)
        self._folded = step

    def _find_folded(self, notes: list[str]) -> None:
        """Goes on from the newest folded weights that are whole, or folds into fresh adapters what whole groups have added."""
        whole = self.journal.steps - self.journal.steps % self.config.zo.group_steps
        if self.kind is not None:
            self._weights.perturbation.pending = self.journal.groups(0, whole)
            self._weights.fold_adapters()
            self._folded = whole
            return
        if self._steps_between_folds is None:
            return
        found = newest_fold(self._folds, self.journal, whole, self._model.io.backend, notes.append)
        if found is not None:
            self._folded, checkpoint = found
            self._weights.move_to(checkpoint)
        due = max(0, self.journal.steps - 1) // self._steps_between_folds * self._steps_between_folds
        if self._folded < due:  # it was lost
            self._weights.perturbation.pending = self.journal.groups(self._folded, due)
            self._fold(due)


def _check_storage(parts: ModelParts, options: ZerothOrderOptions) -> None:
    """Raises UserError for weights that can't be perturbed, or not rounded, as they are stored."""
    if options.parameters == "scales":
        check_scales(parts)
        return
    packed = {name for name in parts.parameters if not parts.sources[name].can_be_updated}
    in_products = packed & product_weights(parts) if options.perturb == "products" else set()
    instead = "train an adapter (--method lora, or zo.parameters lora)"
    if options.perturb == "weights" and packed <= product_weights(parts):
        instead += ", tune scales (zo.parameters scales), or add noise in products (zo.perturb products, zo.noise low_rank)"
    check_storage(parts.sources, parts.parameters - in_products, instead)
    if packed and options.rounding != "exact":
        raise UserError(
            f"zo.rounding: expected exact with weights that are packed ({min(packed)}), whose updates are never rounded into "
            f"them, found {options.rounding}"
        )


def _check_kernels(device: Device) -> None:
    kernels = device.traits.kernels
    if kernels is None:
        raise UserError(f"method zo has no kernels for {device.kind}: use --device cpu")
    if kernels == "triton" and importlib.util.find_spec("triton") is None:
        raise UserError(f"method zo needs Triton on {device.kind}, which is not installed: pip install triton")
