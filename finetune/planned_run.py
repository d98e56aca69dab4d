"""What a run is planned for, its largest micro-batch, and the plan with what it says to a user before the first step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from finetune.methods.weight_demand import StoreSize
from memory.plan import Demand, Plan
from memory.simulator import StepTime, simulate_step
from memory.units import format_bytes
from offload.sizing.calibration import Rates
from offload.sizing.dry_run import VisitSize
from offload.weights.parts import ModelParts, describe_blocks

LONE_MASK_PAIRS = 1 << 18
"""Two rows of 362 tokens, 8 of 181: longer ones need not be computed together."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The largest micro-batch as the model's keyword arguments, and how many a step has.

    train: whether gradients and optimizer state exist. kept_bytes: what a step holds beside, such as key-value caches.
    packed: whether a row of text holds several. samples: of rows of tensors, whose labels are in `inputs` too; None: text.
    """

    inputs: dict[str, torch.Tensor]
    micro_batches: int
    train: bool
    kept_bytes: int = 0
    packed: bool = False
    samples: int | None = None

    @classmethod
    def of_text(
        cls, micro_batch_size: int, sequence_length: int, micro_batches: int, train: bool, packed: bool = False
    ) -> BatchShape:
        ids = torch.zeros(micro_batch_size, sequence_length, dtype=torch.int64)
        return cls({"input_ids": ids, "use_cache": False}, micro_batches, train, packed=packed)

    def keeping(self, kept_bytes: int) -> BatchShape:
        return replace(self, kept_bytes=kept_bytes)

    @property
    def mask_pairs(self) -> int:
        """Of a text micro-batch: pairs of positions, times rows, that attention masks are planned for. A text that is alone
        needs none: then short ones can be padded together, up to `LONE_MASK_PAIRS`."""
        count, length = self.inputs["input_ids"].shape
        return count * length**2 if count > 1 else min(length**2, LONE_MASK_PAIRS)

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch, of input or labels; samples, where it has none."""
        names = ("input_ids", "decoder_input_ids", "labels")
        tokens = [t.numel() for name, t in self.inputs.items() if name in names and t.ndim == 2 and not t.is_floating_point()]
        return max([self.samples or 0, *tokens])


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A plan with what it was made from; `describe` is what `finetune plan` prints."""

    plan: Plan
    demand: Demand
    visit: VisitSize
    parts: ModelParts
    shape: BatchShape
    device_kind: str
    trainable: tuple[nn.Parameter, ...]
    folded_bytes: int  # of the moved weights that are written while the run goes on
    store: StoreSize | None  # where the model's own weights are trained
    variants: int  # versions of the weights that a step computes; `shape` counts each micro-batch as often
    budget_words: str = ""  # where the host budget comes from, if not from the user

    def describe(self) -> str:
        plan, parts = self.plan, self.parts
        passes = 2 if self.shape.train else 1
        read_bytes = passes * sum(size for i, size in enumerate(self.demand.block_bytes) if i not in plan.host_resident)
        if plan.head_slots < self.demand.head_chunks:
            read_bytes += self.demand.head_chunks * self.demand.head_chunk_bytes
        lines = [
            f"{parts.directory.name}: {describe_blocks(parts.blocks)}, "
            f"{format_bytes(parts.checkpoint.num_bytes)} of weights, computed in {str(parts.dtype).removeprefix('torch.')} "
            f"on {self.device_kind}",
            f"a step: {self.shape.micro_batches // self.variants} micro-batches of at most "
            + " x ".join(map(str, next(iter(self.shape.inputs.values())).shape))
            + (f", each under {self.variants} versions of the weights" if self.variants > 1 else ""),
            f"blocks: {len(plan.host_resident)} of {len(parts.blocks)} resident, lookahead {plan.host_lookahead}; block inputs "
            + ("on disk" if plan.activation_slots else "in memory")
            + f"; disk read a step at most {format_bytes(read_bytes)}",
        ]
        if self.store is not None:
            lines.append(
                f"working store: at most {format_bytes(self.store.num_bytes)} on disk; a step reads "
                f"{format_bytes(self._store_read_bytes)} of it and writes {format_bytes(self.store.write_bytes)}"
            )
        lines.append(
            f"host memory: {format_bytes(plan.host_peak_bytes)} predicted, {format_bytes(plan.host_budget_bytes)} allowed"
            + self.budget_words
        )
        lines += [f"  {format_bytes(size):>10}  {name}" for name, size in plan.host_parts.items()]
        if plan.device_budget_bytes is not None:
            lines.append(
                f"device memory: {format_bytes(plan.device_peak_bytes)} predicted, "
                f"{format_bytes(plan.device_budget_bytes)} allowed"
            )
            lines += [f"  {format_bytes(size):>10}  {name}" for name, size in plan.device_parts.items()]
        return "\n".join(lines)

    @property
    def _store_read_bytes(self) -> int:
        """In a step, of masters and state: less what stays in memory."""
        return int(self.store.read_bytes * (1 - self.plan.kept_pieces / max(1, self.store.pieces)))

    def predict_step(self, rates: Rates) -> StepTime:
        """Seconds of a full step at these rates; the streamer's own schedule decides what overlaps. With an accelerator the
        slower of disk and link counts, as if the other took no time. What kernels take to launch is not in it."""
        rows, store = self.shape.micro_batches, self.store
        blocks = len(self.parts.blocks)
        forward = self.visit.flops * rows / rates.flops_per_second
        head = self.parts.head
        # A forward, and the gradient of the hidden states; of a trained head once more and that of its own.
        passes = 1 if not self.shape.train else 4 if store is not None and store.ends else 2
        head_flops = 2 * passes * prod(head.module.weight.shape) * rows * self.shape.rows if head is not None else 0
        # Recomputation without its last products, the product with the weights again, and for those that are trained their
        # gradient.
        backward = (1.8 + (store.trained_share if store is not None else 0)) * forward

        def through(bytes_per_second: float, resident: frozenset[int], lookahead: int) -> StepTime:
            return simulate_step(
                blocks,
                self.demand.block_bytes,
                [forward] * blocks,
                [backward] * blocks if self.shape.train else None,
                head_flops / rates.flops_per_second,
                bytes_per_second,
                resident,
                lookahead,
            )

        plan = self.plan
        step = through(rates.read_bytes_per_second, plan.host_resident, plan.host_lookahead)
        if plan.device_budget_bytes is not None:
            link = through(rates.copy_bytes_per_second, plan.device_resident, plan.device_lookahead)
            step = max(step, replace(link, read_bytes=step.read_bytes), key=lambda time: time.seconds)
        if store is None:
            return step
        read_bytes = step.read_bytes + self._store_read_bytes
        disk_seconds = (read_bytes + store.write_bytes) / rates.read_bytes_per_second
        seconds = max(step.seconds, disk_seconds)
        return StepTime(seconds, step.stall_seconds + seconds - step.seconds, read_bytes)
