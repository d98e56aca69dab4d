"""A model that runs by streaming: the parts of `ModelParts` with slots, I/O and engine under them.

Ownership: the streamed model allocates the slabs and the I/O engine and frees them in `close`. Adapters are the model's own
parameters and belong to the caller.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from memory.plan import Plan
from memory.slots import Slab, SlotPool
from offload.devices import Device
from offload.residency.io import QUEUE_DEPTH, REQUEST_BYTES, IOEngine
from offload.residency.tiers import DeviceTier, HostTier, Tier
from offload.sizing.needs import (
    ACTIVATIONS,
    DEVICE_BLOCKS,
    DEVICE_HEAD,
    HOST_BLOCKS,
    HOST_HEAD,
    STAGING_BYTES,
)
from offload.step.activations import Activations, SpillingActivations
from offload.step.engine import Engine, Weights
from offload.step.head import HeadChunk, TiledHead
from offload.step.own_loss import LossItems, own_loss, shares
from offload.weights.embedding import RowsOnDemand
from offload.weights.formats import PlainTensor, Stored
from offload.weights.parts import EdgeTensor, HeadPart, ModelParts
from offload.weights.skeleton import input_table


@dataclass(frozen=True, slots=True)
class Traffic:
    """What has gone over the disk, and how long the step waited for it, since the model was opened."""

    read_bytes: int
    write_bytes: int
    stall_seconds: float


class StepLosses(NamedTuple):
    """losses: fp32 [variants]. num_items: that one of them is a mean of (samples, where is_sum says that it is a sum).
    outputs: the model's own, of all lanes."""

    losses: torch.Tensor
    num_items: int
    is_sum: bool
    outputs: list[Any]


class StreamedModel:
    """Opens a planned model: allocates everything that the plan names, reads the edges, takes over the forwards.

    model: what to call, where adapters wrap `parts.model`. scratch: directory for spilled activations.
    progress: progress(phase, done, total) after every block visit.
    """

    def __init__(
        self,
        parts: ModelParts,
        plan: Plan,
        device: Device,
        scratch: Path,
        *,
        model: nn.Module | None = None,
        io_backend: str = "auto",
        queue_depth: int | None = None,
        progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    ) -> None:
        self.parts = parts
        self.model = parts.model if model is None else model
        self.device = device
        self.io = IOEngine(io_backend, queue_depth or QUEUE_DEPTH, REQUEST_BYTES, STAGING_BYTES)
        try:
            self._open(plan, scratch, progress)
        except BaseException:
            self.io.close()
            raise

    def _open(self, plan: Plan, scratch: Path, progress: Callable[[str, int, int], None]) -> None:
        parts, device = self.parts, self.device
        host = self._host_slab = self._computing_slab = Slab(device.allocate_host_slab(plan.host_slab_bytes))
        self.io.register_buffer(host.buffer.data_ptr(), host.buffer.numel())
        block_pool = plan.slots[HOST_BLOCKS].carve_from(host)
        head_pool = plan.slots[HOST_HEAD].carve_from(host) if plan.count(HOST_HEAD) else None
        if plan.count(ACTIVATIONS):
            pool = plan.slots[ACTIVATIONS].carve_from(host)
            self.activations: Activations = SpillingActivations(self.io, pool, 0, device.torch_device, scratch)
        else:
            self.activations = Activations()

        host_tier = self._make_block_tier(block_pool, plan)
        head_tier: Tier | None = self._make_head_tier(head_pool, plan)
        self.tier: Tier = host_tier
        if not device.shares_host_memory:
            slab = self._computing_slab = Slab(device.allocate_slab(plan.device_slab_bytes))
            slots = plan.slots[DEVICE_BLOCKS]
            self.tier = DeviceTier(host_tier, device, slots.carve_from(slab), slots.resident, slots.lookahead)
            if head_tier is not None:
                slots = plan.slots[DEVICE_HEAD]
                resident = all_if(slots.count, len(head_tier.layouts))
                head_tier = DeviceTier(head_tier, device, slots.carve_from(slab), resident, slots.lookahead)
        self.head_tier = head_tier

        self._load_edges(parts.edges)
        self.embeddings = [
            RowsOnDemand(module, source, parts.dtype, self.io, device.torch_device)
            for _, module, source in parts.embeddings
        ]
        self.head: TiledHead | None = None
        if parts.head is not None:
            module = self.model.get_output_embeddings()  # the head itself, or the adapter that wraps it
            self._chunks = self._make_chunks(plan)
            self.head = TiledHead(module, self._chunks, len(parts.head.layouts), parts.head.tile_tokens)
        self._weights = self._make_weights(plan)
        self.engine = Engine(self.model, parts.blocks, self._weights, self.activations, progress)

    def train_step(
        self,
        inputs: Sequence[dict[str, Any]],
        labels: Sequence[torch.Tensor | None],
        seeds: Sequence[int],
    ) -> torch.Tensor:
        """Forward and backward of one step; the loss, fp32 []. Gradients are left in `.grad`.

        inputs: keyword arguments of the model's forward per micro-batch. labels: what it takes as `labels`; None where the
        loss is of other arguments.
        The loss is that of the model's own forward, of all rows of the step together: each micro-batch's counts as its share
        of the labelled tokens (or of what else the loss is a mean of).
        """
        self._prepare(inputs)
        inputs = _labelled(inputs, labels)
        if self.head is not None:
            head = self.head
            return self.engine.train_step(inputs, seeds, lambda outputs: head.loss_and_backward(self._losses_of(outputs)))
        items = [LossItems() for _ in inputs]

        def backward(outputs: list[Any]) -> torch.Tensor:
            total = torch.zeros((), dtype=torch.float32)
            for own, share in zip(self._losses_of(outputs), shares(items, inputs)[0], strict=True):
                loss = own * share
                loss.backward()
                total = total + loss.detach().float().cpu()
            return total

        return self.engine.train_step(inputs, seeds, backward, items)

    def step_losses(
        self, inputs: Sequence[dict[str, Any]], labels: Sequence[torch.Tensor | None], variants: int = 1
    ) -> StepLosses:
        """The loss as in `train_step`, without gradients, under every variant of the weights; each block is fetched once."""
        self._prepare(inputs)
        inputs = _labelled(inputs, labels)
        lanes = [variant for variant in range(variants) for _ in inputs]
        if self.head is not None:
            outputs = self.engine.forward(inputs * variants, lanes)
            losses = self._losses_of(outputs)
            num_items = sum(loss.num_items for loss in losses[: len(inputs)])
            return StepLosses(self.head.losses(losses, variants), num_items, False, outputs)
        items = [LossItems() for _ in lanes]
        outputs = self.engine.forward(inputs * variants, lanes, items)
        parts, num_items = shares(items[: len(inputs)], inputs)
        own = [loss * share for loss, share in zip(self._losses_of(outputs), parts * variants, strict=True)]
        each = torch.stack([loss.float().cpu() for loss in own]).view(variants, len(inputs))
        return StepLosses(each.sum(dim=1), num_items, items[0].is_sum, outputs)

    def _losses_of(self, outputs: Sequence[Any]) -> list[Any]:
        return [own_loss(self.parts.model, output) for output in outputs]

    def forward(self, inputs: Sequence[dict[str, Any]], variants: Sequence[int] = ()) -> list[Any]:
        """Model outputs without gradients; `logits` are deferred where the head is tiled. variants as in the engine."""
        self._prepare(inputs)
        return self.engine.forward(inputs, variants)

    def last_logits(self, outputs: Sequence[Any], variants: Sequence[int] = ()) -> list[torch.Tensor]:
        """Logits of the last position of each output of `forward`, fp32 [B, V]."""
        if self.head is None:
            return [output.logits[:, -1].float() for output in outputs]
        return self.head.last_logits([output.logits for output in outputs], variants)

    @property
    def notes(self) -> list[str]:
        """What the user should know about how the disk is read."""
        notes = list(self.io.notes)
        if self.io.backend_reason:
            notes.append(f"disk I/O through {self.io.backend}: {self.io.backend_reason}")
        return notes

    def traffic(self) -> Traffic:
        stall = self.tier.stall_seconds + self.activations.stall_seconds
        stall += sum(embedding.stall_seconds for embedding in self.embeddings)
        if isinstance(self.tier, DeviceTier):
            stall += self.tier.host_stall_seconds
        if self.head_tier is not None:
            stall += self.head_tier.stall_seconds
            if isinstance(self.head_tier, DeviceTier):
                stall += self.head_tier.host_stall_seconds
        return Traffic(self.io.read_bytes, self.io.write_bytes, stall)

    def visit_modules(self, visit: Callable[[Iterable[nn.Module]], None]) -> None:
        """Calls `visit(modules)` with all modules, a part of them at a time, while their weights are bound: what is resident,
        the head, where it is of one chunk, and every block."""
        streamed = set()
        for block in self.parts.blocks:
            streamed.update(block.modules())
        head = None if self.head is None else self.model.get_output_embeddings()
        if head is not None:
            streamed.update(head.modules())
        visit(module for module in self.model.modules() if module not in streamed)
        if head is not None and len(self.parts.head.layouts) == 1:
            self.head_tier.begin(range(1))
            self._chunks.acquire(0)
            visit(head.modules())
            self._chunks.release(0)
        self._weights.begin(range(len(self.parts.blocks)))
        for index, block in enumerate(self.parts.blocks):
            self._weights.acquire(index)
            visit(block.modules())
            self._weights.release(index)

    def close(self) -> None:
        """Waits for all I/O, frees the slots; every part is closed even if one fails. The model keeps its adapters."""
        with contextlib.ExitStack() as parts:
            parts.callback(self.io.close)
            if self.head_tier is not None:
                parts.callback(self.head_tier.close)
            parts.callback(self.tier.close)
            parts.callback(self.activations.close)
            parts.callback(self.engine.close)

    def _prepare(self, inputs: Sequence[dict[str, Any]]) -> None:
        if self.parts.head is not None:
            self.head_tier.begin(range(len(self.parts.head.layouts)))
        ids = [kwargs["input_ids"].reshape(-1) for kwargs in inputs if "input_ids" in kwargs]
        input_embedding = input_table(self.model) if ids else None
        for embedding in self.embeddings:
            if input_embedding is not None and embedding.serves(input_embedding):
                embedding.read(torch.cat(ids))

    def _make_block_tier(self, pool: SlotPool, plan: Plan) -> HostTier:
        slots = plan.slots[HOST_BLOCKS]
        return HostTier(self.parts.layouts, self.io, pool, slots.resident, slots.lookahead)

    def _make_head_tier(self, pool: SlotPool | None, plan: Plan) -> HostTier | None:
        if self.parts.head is None:
            return None
        layouts, slots = self.parts.head.layouts, plan.slots[HOST_HEAD]
        return HostTier(layouts, self.io, pool, all_if(slots.count, len(layouts)), slots.lookahead)

    def _make_weights(self, plan: Plan) -> Weights:
        return BlockWeights(self.parts, self.tier)

    def _make_chunks(self, plan: Plan) -> Any:
        return Chunks(self.parts.head, self.head_tier, self.parts.dtype)

    def _load_edges(self, edges: Sequence[EdgeTensor]) -> None:
        files: dict[Path, int] = {}
        for edge in edges:
            self._take_edge(edge, edge.source.load(lambda tensor: self._read_tensor(tensor, files)))
        for file in files.values():
            self.io.close_file(file)

    def _read_tensor(self, stored: PlainTensor, files: dict[Path, int]) -> torch.Tensor:
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        reads = []
        for extent in stored.extents:
            if extent.path not in files:
                files[extent.path] = self.io.open(extent.path)
            reads.append((files[extent.path], extent.file_offset, extent.num_bytes, tensor.data_ptr() + extent.target_offset))
        if reads:
            self.io.wait(self.io.submit_reads(reads))
        return tensor

    def _take_edge(self, edge: EdgeTensor, stored: Stored) -> None:
        edge.install(edge.source.decode(stored, edge.dtype).to(self.device.torch_device))


class BlockWeights:
    """The engine's view of the blocks' tier: acquire binds, release unbinds. There is one variant of the weights."""

    def __init__(self, parts: ModelParts, tier: Tier) -> None:
        self._parts = parts
        self._tier = tier

    def begin(self, order: Sequence[int]) -> None:
        self._tier.begin(order)

    def enter(self, variant: int) -> None:
        """Nothing to change."""

    def acquire(self, index: int) -> None:
        self._tier.acquire(index)
        self._parts.bindings[index].bind(self._tier.views(index))

    def release(self, index: int) -> None:
        self._parts.bindings[index].unbind()
        self._tier.release(index)


class Chunks:
    """The tiled head's view of its tier; a head of one chunk is bound to its module, others are converted here.
    There is one variant of the weights, and it is not trained."""

    trained = False

    def __init__(self, head: HeadPart, tier: Tier, dtype: torch.dtype) -> None:
        self._head = head
        self._tier = tier
        self._dtype = dtype
        self._chunk: HeadChunk | None = None

    def acquire(self, index: int) -> None:
        self._tier.acquire(index)
        views = self._tier.views(index)
        if len(self._head.layouts) == 1:
            self._head.binding.bind(views)
            self._chunk = HeadChunk(0, self._head.module.weight, self._head.module.bias)
        else:
            layout = self._head.layouts[index]
            bias = layout.decode(views, "bias", self._dtype) if "bias" in layout.weights else None
            self._chunk = HeadChunk(self._head.starts[index], layout.decode(views, "weight", self._dtype), bias)

    def enter(self, variant: int) -> HeadChunk:
        return self._chunk

    def release(self, index: int) -> None:
        if len(self._head.layouts) == 1:
            self._head.binding.unbind()
        self._chunk = None
        self._tier.release(index)


def all_if(slots: int, count: int) -> frozenset[int]:
    """All blocks where there is a slot for each of them."""
    return frozenset(range(count)) if slots == count else frozenset()


def _labelled(
    inputs: Sequence[dict[str, Any]], labels: Sequence[torch.Tensor | None]
) -> list[dict[str, Any]]:
    return [kwargs if y is None else {**kwargs, "labels": y} for kwargs, y in zip(inputs, labels, strict=True)]
