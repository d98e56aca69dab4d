"""Experts that are trained, one matrix at a time: their gradients meet their state at the end of their block's visit.

[Note: experts without tokens]
In a resident loop a stack of experts has one gradient, which is 0 where an expert had no tokens: moments decay, momentum and
weight decay move its weights all the same, and the count for bias correction is the stack's. So it is here. Where there is
neither state nor decay, nothing can change: such an expert is neither read nor written. It had no gradient yet, so it has no
state, and it begins with the stack's count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch

from finetune.memory.errors import UserError
from finetune.offload.update.expert_units import TrainedStack
from finetune.offload.update.gradient_spill import GradientSpill
from finetune.offload.update.norms import NormInParts
from finetune.offload.update.optimizer import Optimizer
from finetune.offload.update.parts import TrainedParts
from finetune.offload.update.step import Step
from finetune.offload.update.store import WorkingStore
from finetune.offload.update.stream import Later, Request, StateStream
from finetune.offload.weights.streamed_experts import StreamedExperts

Gradients = Iterator[tuple[int, torch.Tensor | None]]
"""(expert, gradient as its matrix is stored, in host memory; None: it is 0) of all experts, in ascending order."""


class TrainedExperts:
    """Of a model whose own weights are trained; see [Note: gradients of stacks] in `finetune.offload.weights.experts`.

    image: where a matrix is updated, in host memory; None: in its slot.
    """

    def __init__(
        self, trained: TrainedParts, near: StreamedExperts, store: WorkingStore, stream: StateStream,
        optimizer: Optimizer, spill: GradientSpill, image: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self._trained = trained
        self._near = near
        self._store = store
        self._stream = stream
        self._optimizer = optimizer
        self._spill = spill
        self._image = image
        self._spilled: dict[int, set[int]] = {}
        """By number of the stack, experts whose gradients wait."""

    def begin(self, step: Step) -> None:
        """What the step trains leaves what its gradients are made of."""
        for stack in self._trained.stacks:
            stack.matrices.trained = step.request(self._trained.blocks[stack.block]) is not None

    def end(self) -> None:
        """Of a step, also of one that has failed."""
        self._spilled.clear()
        for stack in self._trained.stacks:
            stack.matrices.trained = False
            stack.matrices.waiting.clear()

    def later(self, block: int) -> list[Later]:
        """What stands for the updates of a block's experts until its visit ends."""
        return [self._later(block)] if self._trained.of_block(block) else []

    def take(self, block: int, step: Step) -> None:
        """Gradients of a block whose visit ends. Raises UserError when they are not complete, for the model uses it again."""
        stacks = [stack for stack in self._trained.of_block(block) if stack.matrices.waiting]
        if not stacks:
            return
        check_visits(block, step, self._trained.blocks[block].name)
        gradients = [self._counted(stack, _sums(stack), step) for stack in stacks]
        if step.measures_norm:
            for of_stack in gradients:
                for _ in of_stack:
                    pass
        elif step.exact:
            for stack, of_stack in zip(stacks, gradients, strict=True):
                self._put(stack, of_stack)
        else:
            chosen = [{expert for lane in stack.matrices.waiting for expert in lane.rows} for stack in stacks]
            self._update(block, stacks, chosen, gradients, step, step.update.grad_scale)
        for stack in stacks:
            stack.matrices.waiting.clear()

    def update_spilled(self, block: int, step: Step, scale: float) -> None:
        stacks = [stack for stack in self._trained.of_block(block) if stack.matrices.number in self._spilled]
        if stacks:
            chosen = [self._spilled.pop(stack.matrices.number) for stack in stacks]
            gradients = [self._put_back(*pair) for pair in zip(stacks, chosen, strict=True)]
            self._update(block, stacks, chosen, gradients, step, scale)

    def _put(self, stack: TrainedStack, gradients: Gradients) -> None:
        spilled = self._spilled[stack.matrices.number] = set()
        for expert, gradient in gradients:
            if gradient is not None:
                self._spill.put(stack.name(expert), {"": gradient})
                spilled.add(expert)

    def _put_back(self, stack: TrainedStack, spilled: set[int]) -> Gradients:
        for expert in range(stack.experts):
            yield expert, self._spill.take(stack.name(expert))[""] if expert in spilled else None

    def _counted(self, stack: TrainedStack, gradients: Gradients, step: Step) -> Gradients:
        """The same, on their way into the norm."""
        norm = NormInParts(stack.dtype)
        for expert, gradient in gradients:
            if gradient is None:
                norm.add_zeros(prod(stack.shape))
            else:
                norm.add(gradient)
            yield expert, gradient
        step.norms.setdefault(stack.fqn, []).append(norm.norm())

    def _update(
        self, block: int, stacks: Sequence[TrainedStack], chosen: Sequence[set[int]], gradients: Sequence[Gradients],
        step: Step, scale: float,
    ) -> None:  # fmt: skip
        """chosen: of each stack, the experts that have gradients."""
        name, update = self._trained.blocks[block].name, step.update
        requests = [self._requests(*pair, step) for pair in zip(stacks, chosen, strict=True)]
        self._stream.now(self._later(block), [one for of_stack in requests for one in of_stack.values()])
        self._near.fetch([(stack.matrices.number, wanted) for stack, wanted in zip(stacks, requests, strict=True)])
        for stack, of_stack, wanted in zip(stacks, gradients, requests, strict=True):
            zeros: torch.Tensor | None = None
            for expert, gradient in of_stack:
                if expert not in wanted:
                    continue
                if gradient is None:
                    gradient = zeros = torch.zeros(stack.shape, dtype=stack.dtype) if zeros is None else zeros
                with self._in_its_slot(stack, expert) as image:
                    sums = self._optimizer.update(
                        wanted[expert], image, {"": gradient}, update.learning_rate, scale, update.step
                    )
                step.add_sums(name, sums)

    def _requests(self, stack: TrainedStack, chosen: set[int], step: Step) -> dict[int, Request]:
        """By expert, ascending; see [Note: experts without tokens]."""
        request = step.request(self._trained.blocks[stack.block])
        updates, stated, pieces = 0, set(), len(stack.largest.pieces)
        for expert in range(stack.experts):
            for index in range(pieces):
                stored = self._store.pieces.get((stack.name(expert), index))
                if stored is not None and stored.state_bytes:
                    stated.add(expert)
                    updates = max(updates, stored.updates)
        decays = request.rule.weight_decay and stack.fqn not in request.undecayed
        wanted = range(stack.experts) if decays or step.update.sums_of_all else sorted(chosen | stated)
        return {
            expert: Request(stack.unit(expert), frozenset([""]), request.rule, request.scale, request.undecayed, updates)
            for expert in wanted
        }

    @contextmanager
    def _in_its_slot(self, stack: TrainedStack, expert: int) -> Iterator[torch.Tensor]:
        """An expert's image in host memory; what is there in the end is the expert from now on."""
        tier, number = self._near.place(stack.matrices.number, expert)
        tier.acquire(number)
        if self._image is None:
            yield tier.slot(number)
        else:
            yield tier.image(number, self._image)
            tier.replace(number, self._image)
        tier.release(number)

    def _later(self, block: int) -> Later:
        return Later(f"{self._trained.blocks[block].name}.")


def check_visits(block: int, step: Step, name: str) -> None:
    """Raises UserError when a model runs a block, called `name`, several times in a pass: no visit has all of its gradients."""
    if (count := step.engine.order.count(block)) > 1:
        raise UserError(
            f"the model runs {name} {count} times in a pass: its own weights can't be trained out of core. Train an "
            "adapter (--method lora)"
        )


def _sums(stack: TrainedStack) -> Gradients:
    """Over the lanes that wait, in their order, as gradients accumulate."""
    lanes = stack.matrices.waiting
    for expert in range(stack.experts):
        total, missing = None, False
        for lane in lanes:
            part = lane.of(expert)
            if part is None:
                missing = True
            else:
                total = part if total is None else total.add_(part)
        if total is not None and missing:
            total.add_(0.0)  # as the lane's zeros would: -0 becomes 0
        yield expert, None if total is None else total.cpu()
