"""The engine: drives the lanes of a step through the streamed blocks, forward and backward.

One visit of a block serves every lane that waits for it: with M micro-batches a step reads the weights twice, not 2M
times. Gradients of a block's parameters are complete when its backward visit ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from finetune.memory.tensor_file import in_file, moved_to_file
from finetune.offload.step.activations import Activations, SavedTensor
from finetune.offload.step.deferred_products import Needless
from finetune.offload.step.kept_graphs import BoundTensors
from finetune.offload.step.lane_storages import LaneStorages
from finetune.offload.step.lanes import BlockCall, Lane, Record, release, requires_grad, run_backward, run_capturing
from finetune.offload.step.mask_rows import with_whole_masks
from finetune.offload.step.sequence_chunks import SequenceChunks
from finetune.offload.step.shared_gradients import SharedGradients
from finetune.offload.step.weights import Block, Weights


@dataclass(slots=True)
class Visit:
    """One block, one pass: the lanes that went through it, in lane order."""

    index: int  # of the block
    records: list[Record]  # what backward needs of each lane
    bound: Sequence[BoundTensors] = ()  # of the block, under each adapter that lanes have; where graphs are kept


class AdaptedModel:
    """What lanes call, and what is kept of its blocks between visits. Several adapters of one base are as many of these; the
    layers of one are in their places at a time, and lanes of different ones go through the same visits.

    put_on: puts these layers in their places, where there are others. It is made, and called, with them there.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], kept_graphs: int = 0,
        put_on: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """kept_graphs: of so many blocks, the last ones, the graph stays from forward to backward."""
        self.model = model
        self.put_on = put_on
        self.needless = [Needless(block) for block in blocks]
        self.shared = SharedGradients(blocks)
        first = len(blocks) - kept_graphs
        self.bound = [BoundTensors(block) if i >= first else None for i, block in enumerate(blocks)]
        self.has_trainable = [any(p.requires_grad for p in block.parameters()) for block in blocks]
        """Per block, whether parameters that stay in it, such as adapters, want gradients."""

    def forward_only(self, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(**kwargs)


class Versions(NamedTuple):
    """Which version of the weights each lane of a training step meets.

    trained: so many lanes, the first ones, have gradients. The others only go forward. models: what each lane calls; empty: all
    the engine's own.
    """

    of_lanes: Sequence[int]
    trained: int
    models: Sequence[AdaptedModel] = ()


class Engine:
    """Runs steps of one model.

    blocks: the modules to be streamed, in module order. Their `forward` is taken over for the engine's life.
    kept_graphs: of so many blocks, the last ones, the graph stays from forward to backward, unless texts are cut.
    progress: called as progress(phase, done, total) after every visit.
    sequence_chunk: tokens of a text that blocks compute together; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        weights: Weights,
        activations: Activations,
        progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
        kept_graphs: int = 0,
        sequence_chunk: int | None = None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.activations = activations
        self.progress = progress
        self._forwards = [block.forward for block in blocks]
        self._chunks = None if sequence_chunk is None else SequenceChunks(sequence_chunk)
        self._own = AdaptedModel(model, blocks, kept_graphs)
        self._keys = [Block(index) for index in range(len(blocks))]
        self.order: list[int] = list(range(len(blocks)))  # visiting order of the last forward
        for index, block in enumerate(blocks):
            block.forward = partial(self._enter, index)

    def close(self) -> None:
        """Gives the model its own forwards back."""
        for forward in self._forwards:
            forward.__self__.__dict__.pop("forward", None)

    def forward(
        self,
        inputs: Sequence[dict[str, Any]],
        variants: Sequence[int] = (),
        around: Sequence[AbstractContextManager] = (),
        storages: LaneStorages | None = None,
        models: Sequence[AdaptedModel] = (),
    ) -> list[Any]:
        """The model's outputs for each of `inputs`, without gradients; blocks are fetched once for all of them.

        variants: which variant of the weights each input meets, in ascending order; empty: there is only one. around: as in
        `Lane`, for each input. storages: as in `train_step`; the outputs are used under its guard. models: as in `Versions`.
        """
        self.weights.begin(self.order + self.order)
        with torch.no_grad():
            lanes = []
            for i, kwargs in enumerate(inputs):
                adapted = models[i] if models else self._own
                run, variant = partial(adapted.model, **kwargs), variants[i] if variants else 0
                lanes.append(Lane(i, run, None, variant, around[i] if around else None, storages, adapted))
            self._run_forward(lanes, None)
        return [lane.output for lane in lanes]

    def train_step(
        self,
        inputs: Sequence[dict[str, Any]],
        seeds: Sequence[int],
        objective: Callable[[list[Any]], torch.Tensor],
        around: Sequence[AbstractContextManager] = (),
        versions: Versions | None = None,
        storages: LaneStorages | None = None,
    ) -> torch.Tensor:
        """One forward and backward over all micro-batches; gradients are left in `.grad` of the trainable parameters.

        inputs: keyword arguments of the model's forward, one dict a micro-batch (lane).
        seeds: the lanes' random seeds.
        objective: takes the lanes' model outputs, runs backward from the loss through what follows the last block, and
            returns the loss, fp32 [].
        around: as in `Lane`, for each input.
        versions: where lanes meet several versions of the weights; None: all meet the only one, with gradients.
        storages: where lanes are on disk while they wait; None: they stay in memory.
        """
        self.weights.begin(self.order + self.order[::-1] + self.order)
        visits: list[Visit] = []
        lanes = []
        for i, (kwargs, seed) in enumerate(zip(inputs, seeds, strict=True)):
            adapted = versions.models[i] if versions is not None and versions.models else self._own
            run = adapted.model if versions is None or i < versions.trained else adapted.forward_only
            variant = 0 if versions is None else versions.of_lanes[i]
            lanes.append(Lane(i, partial(run, **kwargs), seed, variant, around[i] if around else None, storages, adapted))
        with ExitStack() as stack:
            for adapted in {id(lane.adapted): lane.adapted for lane in lanes}.values():
                stack.enter_context(adapted.shared.step())
            with torch.enable_grad():
                self._run_forward(lanes, visits)
                outputs = [lane.output for lane in lanes]
                for lane in lanes:
                    lane.output = None
                with nullcontext() if storages is None else storages.guarded():
                    loss = objective(outputs)
            del outputs
            self._run_backward(visits)
        return loss

    def _enter(self, index: int, *args: Any, **kwargs: Any) -> Any:
        return Lane.current().park(BlockCall(index, args, kwargs, torch.is_grad_enabled()))

    def _run_forward(self, lanes: list[Lane], visits: list[Visit] | None) -> None:
        order: list[int] = []
        for lane in lanes:
            self._enter_lane(lane)
            if lane.storages is not None:
                lane.storages.begin_lane(lane.index)
            self._resume(lane)
        while waiting := [lane for lane in lanes if lane.call is not None]:
            index = min(lane.call.index for lane in waiting)
            lanes_here = [lane for lane in waiting if lane.call.index == index]
            visit = Visit(index, [], _bound_of(lanes_here, index) if visits is not None else ())
            self.weights.acquire(self._keys[index])
            for bound in visit.bound:
                bound.begin_forward()
            for lane in lanes_here:
                self._enter_lane(lane)
                self._resume(lane, self._forward_visit(lane, visit, visits is not None))
            self.weights.release(self._keys[index])
            for bound in visit.bound:
                bound.end_forward()
            order.append(index)
            if visit.records and visits is not None:
                visits.append(visit)
            self.progress("forward", len(order), len(self.order))
        self.order = order or self.order

    def _enter_lane(self, lane: Lane) -> None:
        """What runs next runs as this lane has it."""
        lane.adapted.put_on()
        self.weights.enter(lane.variant)

    def _resume(self, lane: Lane, value: Any = None) -> None:
        if self._chunks is None:
            lane.resume(value)
            return
        with self._chunks.masks, in_file():
            lane.resume(value)

    def _forward_visit(self, lane: Lane, visit: Visit, recording: bool) -> Any:
        call, lane.call = lane.call, None
        with nullcontext() if lane.storages is None else lane.storages.visit(lane.index, (call.args, call.kwargs)):
            output, record = self._run_visit(lane, call, visit, recording)
        if lane.storages is not None:
            lane.storages.note(output, lane.index)
        return output if record is None else lane.anchored(output, record)

    def _run_visit(self, lane: Lane, call: BlockCall, visit: Visit, recording: bool) -> tuple[Any, Record | None]:
        lane.enter_random_state()
        record, is_cut = None, self._chunks is not None and self._chunks.cuts(call.args, call.kwargs)
        if self._chunks is not None and not is_cut:
            call.args, call.kwargs = with_whole_masks((call.args, call.kwargs))
        if recording and call.grad_enabled and self._wants_gradients(lane, call):
            record = lane.record(call, self.activations)
            visit.records.append(record)
        block_forward, bound = self._forwards[call.index], lane.adapted.bound[call.index]
        forward = partial(run_capturing, block_forward, keys=call.captured)
        if is_cut:
            if record is not None:
                record.chunks = self._chunks
            output = self._chunks.forward(block_forward.__self__, forward, call.args, call.kwargs, record is not None)
        elif record is not None and bound is not None:
            args, kwargs = call.args, call.kwargs
            if lane.storages is not None:  # the graph keeps its inputs, which the lane's storages do not
                args, kwargs = tree_map_only(torch.Tensor, _copied, (args, kwargs))
            output, record.graph = bound.run(forward, args, kwargs)
        else:
            with torch.no_grad():
                output = forward(call.args, call.kwargs)
        if self._chunks is not None and not is_cut:
            output = tree_map_only(torch.Tensor, moved_to_file, output)
        lane.leave_random_state()
        return output, record

    def _wants_gradients(self, lane: Lane, call: BlockCall) -> bool:
        index = call.index
        return lane.adapted.has_trainable[index] or self.weights.trains(self._keys[index]) or requires_grad(call)

    def _run_backward(self, visits: list[Visit]) -> None:
        total = len(visits)
        self.activations.begin_backward(
            leaf
            for visit in reversed(visits)
            for record in visit.records
            for leaf in record.leaves
            if isinstance(leaf, SavedTensor)
        )
        while visits:
            visit = visits.pop()
            if any(record.output_grads for record in visit.records):
                self.weights.acquire(self._keys[visit.index])
                for record in visit.records:
                    if record.output_grads:
                        self._enter_lane(record.lane)
                        record.lane.adapted.shared.lane = record.lane.index
                        run_backward(record, self._forwards[visit.index], record.lane.adapted.needless[visit.index])
                for bound in visit.bound:
                    bound.end_backward()
                self.weights.release(self._keys[visit.index])
            for record in visit.records:
                release(record)
            self.progress("backward", total - len(visits), total)


def _bound_of(lanes: Sequence[Lane], index: int) -> Sequence[BoundTensors]:
    """Of block `index`, under each adapter of the lanes, where graphs are kept."""
    found = {id(lane.adapted): lane.adapted.bound[index] for lane in lanes}
    return [bound for bound in found.values() if bound is not None]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
