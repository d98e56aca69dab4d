"""How long visits take here: blocks are read, bound and run, forward and backward, as in a step, on numbers without meaning.

A prediction from rates of products alone misses half of a visit on a CPU: decoding, norms, attention, adapters, Python. A few
blocks that really run have all of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from finetune.memory.arena import keep_freed_memory
from finetune.memory.plan import Plan, Slots
from finetune.memory.slots import Slab
from finetune.offload.devices import Device
from finetune.offload.residency.io import IOEngine
from finetune.offload.sizing.dry_run import block_on_meta, first_call
from finetune.offload.sizing.needs import DECODED, HEAD_VARIANTS, VARIANTS
from finetune.offload.step.chunked_attention import ChunkAttention, attending_by
from finetune.offload.step.deferred_logits import DeferredLogits
from finetune.offload.step.deferred_products import Needless
from finetune.offload.step.lanes import run_capturing
from finetune.offload.step.mask_rows import Span
from finetune.offload.step.tiled_loss import TiledCrossEntropy
from finetune.offload.step.weights import Block, HeadChunk
from finetune.offload.weights.layout import BlockLayout
from finetune.offload.weights.parts import ModelParts
from finetune.offload.weights.skeleton import is_placeholder
from finetune.offload.weights.streamed_parts import Room, StreamedParts

WARM_UPS = 2  # one teaches what need not be recomputed; both touch memory for the first time, and load and compile code
REPEATS = 3
ENOUGH_SECONDS = 1.0  # of the head, and twice that of a kind of block: no more repeats then
LONGEST_SECONDS = 5.0  # of a first visit, after which there is a second one
MOST_KINDS = 4  # of blocks that are run; others are as one of these


@dataclass(frozen=True, slots=True)
class PassSeconds:
    """Of one block's visit in one pass: what its first lane takes, for which weights are decoded, and what each other takes."""

    first: float
    other: float

    def of(self, lanes: int) -> float:
        return self.first + (lanes - 1) * self.other

    def longer(self, factor: float) -> PassSeconds:
        """Where lanes take so many times as long, and decoding as long as before."""
        return self.plus((factor - 1) * self.other)

    def plus(self, seconds: float) -> PassSeconds:
        """Where every lane takes so much longer."""
        return PassSeconds(self.first + seconds, self.other + seconds)


@dataclass(frozen=True, slots=True)
class BlockSeconds:
    """Of visits of one block."""

    forward: PassSeconds
    recomputed: PassSeconds  # with a graph, without the products that backward never uses; 0: there is no backward
    backward: PassSeconds  # from the graph on

    def backward_of(self, lanes: int, kept_graph: bool) -> float:
        """Of a visit in backward. kept_graph: whether nothing is recomputed."""
        again = self.recomputed
        decoding = max(0.0, again.first - again.other)
        return self.backward.of(lanes) + (decoding if kept_graph else again.of(lanes))

    def longer(self, factor: float) -> BlockSeconds:
        return BlockSeconds(self.forward.longer(factor), self.recomputed.longer(factor), self.backward.longer(factor))


@dataclass(frozen=True, slots=True)
class Timing:
    """What was found."""

    blocks: tuple[BlockSeconds, ...]  # of each block
    head_row: float  # seconds of a row of hidden states: logits, loss and, where there is a backward, gradient
    weight_seconds: float = 0.0  # of one weight that is updated, or of which variants are made
    counted: bool = False  # from what visits compute and a machine's rates, rather than measured

    def longer(self, factor: float) -> Timing:
        """Where lanes take so many times as long in blocks."""
        return replace(self, blocks=tuple(block.longer(factor) for block in self.blocks))


@dataclass(frozen=True, slots=True)
class Workload:
    """A step whose visits are timed, or counted."""

    parts: ModelParts
    model: nn.Module  # what is called; adapters may wrap that of `parts`
    plan: Plan  # of the run
    inputs: dict[str, Any]  # the model's keyword arguments, of one micro-batch
    train: bool  # whether there is a backward pass
    trained: Sequence[frozenset[str]] | None  # per block, local names of its own weights that get gradients
    lanes: int  # micro-batches
    chunk: int | None = None  # tokens of a text that blocks compute together; None: all

    def names(self, block: int) -> frozenset[str]:
        """Of a block's own weights that get gradients."""
        return self.trained[block] if self.trained else frozenset()


def time_visits(work: Workload, device: Device) -> Timing:
    """Runs a block of each kind a few times, and a tile of the loss; before the model is opened. Adapters and the random state
    are left as they were. Takes the memory of the fewest slots and of one visit.

    Raises UserError when the model's files cannot be read. What the model's own code raises for such inputs is raised.
    """
    parts, model = work.parts, work.model
    keep_freed_memory()
    with ExitStack() as closing, torch.random.fork_rng(devices=[]):
        streamed = _open(parts, model, device, work.plan, closing)
        index, args, kwargs = first_call(parts, model, work.inputs)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: _like(t, device.torch_device), (args, kwargs))
        keys = [block_kind(block, layout) for block, layout in zip(parts.blocks, parts.layouts, strict=True)]
        wanted = [keys[index], *(key for key in dict.fromkeys(keys) if key != keys[index])][:MOST_KINDS]
        kinds: dict[Any, BlockSeconds] = {}
        for key in wanted:
            block = keys.index(key)
            visits = _Visits(parts.blocks[block], block, streamed, device, work.names(block))
            kinds[key] = visits.time(args, kwargs, work.train, min(work.lanes, 2))
        hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        rows = hidden.numel() // hidden.shape[-1]
        head = 0.0 if parts.head is None else _time_head(parts, model, streamed, device, hidden.dtype, rows, work.train)
        return Timing(tuple(kinds.get(key, kinds[wanted[0]]) for key in keys), head)


def time_chunked_visits(work: Workload, device: Device) -> Timing:
    """As `time_visits`, of visits in chunks of a text: one chunk is run as a text of its own, and the attention of a chunk to
    an earlier one, as if there were no windows."""
    length, chunk = work.inputs["input_ids"].shape[1], work.chunk
    inputs = {name: x[:, :chunk] if isinstance(x, torch.Tensor) and x.ndim > 1 else x for name, x in work.inputs.items()}
    alone = replace(work, inputs=inputs, chunk=None)
    timing = time_visits(alone, device).longer(length / chunk)
    with torch.random.fork_rng(devices=[]):
        forward, backward = _attention_to_another_chunk(alone)
    times = (length / chunk) * (length / chunk - 1) / 2

    def with_attention(block: BlockSeconds) -> BlockSeconds:
        if not work.train:
            return replace(block, forward=block.forward.plus(times * forward))
        more = (forward, forward, backward)
        passes = zip((block.forward, block.recomputed, block.backward), more, strict=True)
        return BlockSeconds(*(one.plus(times * seconds) for one, seconds in passes))

    return replace(timing, blocks=tuple(map(with_attention, timing.blocks)))


def _attention_to_another_chunk(work: Workload) -> tuple[float, float]:
    """Seconds of forward and backward, of a block's queries to so many keys before them. work: with texts of a chunk."""
    query, key, value = (torch.randn(shape).to(work.parts.dtype) for shape in _attention_shapes(work))
    length = query.shape[2]

    def seconds(earlier: int) -> list[float]:
        """Of forward and backward."""
        spans = [Span(i * length, (i + 1) * length) for i in range(earlier + 1)]
        attention, given = ChunkAttention(spans, ""), [x.clone().requires_grad_() for x in (query, key, value)]
        for attention.span in spans:
            attention.put(key, value)
        attention.begin_gradients()
        started = time.perf_counter()
        output = attention.attend(*given, None, None)
        middle = time.perf_counter()
        output.backward(output.detach())
        return [middle - started, time.perf_counter() - middle]

    seconds(1)
    found = [sorted(column)[1] for column in zip(*(_less(seconds(3), seconds(1)) for _ in range(3)), strict=True)]
    return max(0.0, found[0] / 2), max(0.0, found[1] / 2)


def _less(first: list[float], second: list[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _attention_shapes(work: Workload) -> list[torch.Size]:
    """Of query, key and value in the first block."""
    index, args, kwargs = first_call(work.parts, work.model, work.inputs)
    shapes: list[torch.Size] = []

    def note(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any) -> Any:
        shapes.extend(x.shape for x in (query, key, value))
        rows, heads, length, _ = query.shape
        return query.new_empty(rows, length, heads, value.shape[-1]), None

    with block_on_meta(work.parts, index, args, kwargs) as (args, kwargs, views, _), attending_by(note), torch.no_grad():
        work.parts.bindings[index].bind(views)
        work.parts.blocks[index](*args, **kwargs)
    return shapes


def _open(parts: ModelParts, model: nn.Module, device: Device, plan: Plan, closing: ExitStack) -> StreamedParts:
    """With as few slots as there can be, but where weights stay decoded as `plan` has it."""
    small = replace(plan, slots={name: _fewest(name, slots) for name, slots in plan.slots.items()})
    after_io = closing.enter_context(ExitStack())
    io = IOEngine()
    closing.callback(io.close)
    host = computing = Slab(device.allocate_host_slab(small.host_slab_bytes))
    if not device.shares_host_memory:
        memory = device.allocate_slab(small.device_slab_bytes)
        after_io.callback(device.free_slab, memory)
        computing = Slab(memory)
    room = Room(parts, model, small, device, io, host, computing, Path(), (), closing, after_io)
    return StreamedParts(room, parts.layouts, () if parts.head is None else parts.head.layouts[:1])


def _fewest(name: str, slots: Slots) -> Slots:
    if name.startswith(DECODED) or name in (VARIANTS, HEAD_VARIANTS):
        return slots
    return replace(slots, ring=min(slots.ring, slots.pool.busy), kept=0)


class _Visits:
    """Visits of one block, which is read anew for each."""

    def __init__(
        self, block: nn.Module, index: int, streamed: StreamedParts, device: Device, trained: frozenset[str]
    ) -> None:
        self._block, self._key, self._streamed, self._device = block, Block(index), streamed, device
        self._trained = trained
        self._needless = Needless(block)

    def time(self, args: tuple, kwargs: dict[str, Any], train: bool, lanes: int) -> BlockSeconds:
        """The median of some visits after those that warm up; of a large block the second visit. lanes: 1 or 2."""
        started, found = time.perf_counter(), []
        while len(found) < WARM_UPS + REPEATS:
            seconds = time.perf_counter() - started
            if found and seconds > (LONGEST_SECONDS if len(found) == 1 else 2 * ENOUGH_SECONDS):
                break
            found.append(self._visit(args, kwargs, train, lanes))
        found = found[WARM_UPS:] or found[-1:]
        columns = [sorted(column)[len(column) // 2] for column in zip(*found, strict=True)]
        passes = [columns[i : i + lanes] for i in range(0, len(columns), lanes)]
        none = PassSeconds(0.0, 0.0)
        return BlockSeconds(*(PassSeconds(one[0], one[-1]) for one in passes), *(() if train else (none, none)))

    def _visit(self, args: tuple, kwargs: dict[str, Any], train: bool, lanes: int) -> list[float]:
        """Seconds of every lane: forward and, where there is a backward, recomputed, then backward."""
        run = partial(run_capturing, self._block, args, kwargs, ())
        with self._bound(), torch.no_grad():
            seconds = [self._timed(run) for _ in range(lanes)]
        if not train:
            return seconds
        hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        hidden.requires_grad_()
        recomputed, backward = [], []
        with self._bound():
            for _ in range(lanes):
                graph: list[Any] = []
                recomputed.append(self._timed(partial(self._recompute, run, graph)))
                backward.append(self._timed(partial(_run_backward, graph)))
        seconds += recomputed + backward
        hidden.grad = None
        hidden.requires_grad_(False)
        return seconds

    def _recompute(self, run: Callable[[], tuple[Any, Any]], graph: list[Any]) -> None:
        """graph: gets the outputs' edges, each with a gradient."""
        with torch.enable_grad():
            flat = self._needless.recompute(lambda: tree_flatten(run()[0])[0])
        for value in flat:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                grad = torch.ones(value.shape, dtype=value.dtype, device=value.device)
                graph.append((torch.autograd.graph.get_gradient_edge(value), grad))

    def _timed(self, run: Callable[[], Any]) -> float:
        """Without what it waits for experts."""
        waited = self._streamed.stall_seconds
        seconds = _timed(run, self._device)
        return max(0.0, seconds - (self._streamed.stall_seconds - waited))

    @contextlib.contextmanager
    def _bound(self) -> Iterator[None]:
        streamed, key = self._streamed, self._key
        with _on_device(self._block, self._device):
            streamed.begin([key.index])
            streamed.bind(key, streamed.acquire(key), self._trained)
            try:
                yield
            finally:
                streamed.unbind(key)
                streamed.release(key)
                streamed.drop_gradients()
                streamed.blocks.give_up()


def _timed(run: Callable[[], Any], device: Device) -> float:
    device.synchronize(device.record())
    started = time.perf_counter()
    run()
    device.synchronize(device.record())
    return time.perf_counter() - started


def _run_backward(graph: list[tuple[torch.autograd.graph.GradientEdge, torch.Tensor]]) -> None:
    if graph:
        edges, grads = map(list, zip(*graph, strict=True))
        graph.clear()
        torch.autograd.backward(edges, grads)


def _time_head(
    parts: ModelParts, model: nn.Module, streamed: StreamedParts, device: Device, dtype: torch.dtype, rows: int, train: bool
) -> float:
    """Seconds of one row of hidden states."""
    head, module, key, there = parts.head, model.get_output_embeddings(), HeadChunk(0), device.torch_device
    tile = min(rows, head.tile_tokens)
    states = torch.randn(tile, head.module.weight.shape[1], device=there).to(dtype).requires_grad_(train)
    labels = torch.zeros(tile, dtype=torch.int64, device=there)

    def run() -> None:
        loss = TiledCrossEntropy(DeferredLogits(states, head.module.weight.shape[0]), labels, tile, backward=train)
        if len(head.layouts) == 1:
            loss.plain_loss(module.forward)
        else:
            loss.add_chunk(streamed.head_rows)

    with _on_device(module, device):
        streamed.head.begin([0])
        streamed.bind(key, streamed.acquire(key))
        try:
            seconds, started = [], time.perf_counter()
            while len(seconds) <= REPEATS and time.perf_counter() - started < ENOUGH_SECONDS:
                seconds.append(_timed(run, device))
        finally:
            streamed.unbind(key)
            streamed.release(key)
    seconds = sorted(seconds[1:] or seconds)
    return seconds[len(seconds) // 2] * len(head.layouts) / tile


@contextlib.contextmanager
def _on_device(module: nn.Module, device: Device) -> Iterator[None]:
    """Inside, what stays in the module, adapters and buffers, are copies on the device, which take the gradients."""
    def wanted(tensor: torch.Tensor) -> bool:
        return tensor.requires_grad or not isinstance(tensor, nn.Parameter)

    held = []
    for part in module.modules():
        for place in (part._parameters, part._buffers):
            for name, tensor in place.items():
                if tensor is not None and not is_placeholder(tensor) and wanted(tensor):
                    held.append((place, name, tensor))
    for place, name, tensor in held:
        if tensor.is_meta:  # an adapter in a session that only plans
            copy = torch.zeros_like(tensor, device=device.torch_device)
        else:
            copy = tensor.detach().to(device.torch_device, copy=True)
        place[name] = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
    try:
        yield
    finally:
        for place, name, tensor in held:
            place[name] = tensor


def _like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What the block is called with; hidden states are random: routers choose by them."""
    if tensor.is_floating_point() and tensor.dim() >= 2 and not tensor.any():
        return torch.randn(tensor.shape, dtype=torch.float32).to(device, tensor.dtype)
    return tensor.detach().to(device)


def block_kind(block: nn.Module, layout: BlockLayout) -> Any:
    """Blocks of one kind take the same time."""
    return type(block), tuple((name, view.dtype, view.shape) for name, view in layout.views.items())
