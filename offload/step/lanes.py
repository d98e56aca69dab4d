"""Lanes: the model's own forward, once per micro-batch, parked at every block.

A lane is a greenlet that runs `model(**inputs)`. When the model calls a wrapped block the lane parks and the engine
decides when, and under which weights, the block runs. See "Lanes" in docs/architecture.md.

[Note: anchors]
A block runs without a graph, so its outputs have no history. They are handed to the outer model as outputs of an
`Anchor` node: the outer graph (residuals, norms, losses between blocks) ends there, and backward through it leaves the
gradient in the visit's record. The graph keeps the node, never the tensor, so block outputs can be dropped or moved
to disk as soon as the model is done with them.

[Note: captured outputs]
Transformers collects some outputs by hooks on modules, into the lists of a context variable that the model's forward sets: the
logits of routers, of which the model makes a loss afterwards. A block runs outside of its lane's context, so it is given lists
of its own, and what they hold then is treated as outputs of the block: anchored, appended to the lane's lists, and found again
by its recomputation, through which the gradient of that loss goes on.

What a lane runs in (`around`) may collect more: it has `collected`, lists by key. Hooks in blocks find those keys too, and what
they append ends up in these lists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent, greenlet
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from finetune.memory.tensor_file import in_file, moved_to_file
from finetune.offload.step.activations import Activations, SavedTensor
from finetune.offload.step.deferred_products import Needless
from finetune.offload.step.kept_graphs import KeptGraph
from finetune.offload.step.lane_storages import LaneStorages, StoredTensor
from finetune.offload.step.random_state import RandomState, get_random_state, set_random_state
from finetune.offload.step.sequence_chunks import SequenceChunks

if TYPE_CHECKING:
    from finetune.offload.step.engine import AdaptedModel


@dataclass(slots=True)
class BlockCall:
    """A call of block `index` that a lane waits for."""

    index: int
    args: tuple  # of its forward
    kwargs: dict[str, Any]  # of its forward
    grad_enabled: bool  # in the lane, where it was called
    captured: tuple[str, ...] = ()
    """What hooks of Transformers are to collect inside of the block. See [Note: captured outputs]."""


@dataclass(slots=True)
class Record:
    """What backward needs of one lane's visit to a block: its inputs, its random state, and the gradients as they arrive."""

    lane: Lane
    spec: TreeSpec  # how arguments are put together of `leaves`
    leaves: list[Any]  # SavedTensor or StoredTensor where the argument was a tensor, otherwise the argument itself
    gradient_edges: list[GradientEdge | None]  # per leaf: where its gradient goes in the outer graph
    random_state: RandomState  # when the block began
    captured: tuple[str, ...] = ()  # what hooks collect, as in `BlockCall`
    output_grads: dict[int, torch.Tensor | StoredTensor] = field(default_factory=dict)  # number of the output -> its gradient
    graph: KeptGraph | None = None  # None: backward recomputes it
    chunks: SequenceChunks | None = None  # None: it ran whole

    def add_gradient(self, position: int, grad: torch.Tensor) -> None:
        """Of the output with this number, added to what has come before."""
        if position in self.output_grads:
            grad = self.take_gradient(position) + grad
        storages = self.lane.storages
        if storages is not None:
            grad = storages.set_aside(grad)
            for wanted in (*self.leaves, grad):
                if isinstance(wanted, StoredTensor):
                    wanted.expect()
        self.output_grads[position] = grad

    def take_gradient(self, position: int) -> torch.Tensor:
        grad = self.output_grads.pop(position)
        if isinstance(grad, StoredTensor):
            stored, grad = grad, grad.restore()
            stored.release()
        return grad


class Anchor(torch.autograd.Function):
    """See [Note: anchors]."""

    @staticmethod
    def forward(ctx, token: torch.Tensor, data: torch.Tensor, record: Record, position: int) -> torch.Tensor:
        ctx.record, ctx.position = record, position
        # A tensor on the same storage but not a view for autograd: the model may write into it in place.
        return data.new_empty(0).set_(data.untyped_storage(), data.storage_offset(), data.shape, data.stride())

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        ctx.record.add_gradient(ctx.position, grad)
        return None, None, None, None


class Lane:
    """One micro-batch on its way through the model. `call` is the block it waits for, None once `output` is there.

    variant: which one of the weights it meets, where a step has several. around: entered while the model's own code
    runs, not while blocks do. storages: where it is on disk while it waits; None: it stays in memory. adapted: what it calls.
    """

    def __init__(
        self,
        index: int,
        run: Callable[[], Any],
        seed: int | None,
        variant: int = 0,
        around: AbstractContextManager | None = None,
        storages: LaneStorages | None = None,
        adapted: AdaptedModel | None = None,
    ) -> None:
        self.adapted = adapted
        self.index = index
        self.variant = variant
        self.storages = storages
        self.call: BlockCall | None = None
        self.output: Any = None
        self._greenlet = greenlet(run)
        self._greenlet.lane = self
        self._seed = seed
        self._around = contextlib.nullcontext() if around is None else around
        self._random_state: RandomState | None = None
        self._saved: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._token = torch.empty(0, requires_grad=True)

    @staticmethod
    def current() -> Lane:
        lane = getattr(getcurrent(), "lane", None)
        if lane is None:
            raise RuntimeError("a streamed block was called outside the engine; use Trainer, evaluate or generate")
        return lane

    def park(self, call: BlockCall) -> Any:
        """Called inside the lane by a wrapped block; returns the block's output once the engine has computed it."""
        more = getattr(self._around, "collected", {})
        call.captured = (*collected_keys(), *more)
        output, captured = self._greenlet.parent.switch(call)
        torch.set_grad_enabled(call.grad_enabled)
        for key, values in captured.items():
            (more if key in more else _collector().get())[key].extend(values)
        return output

    def resume(self, value: Any = None) -> None:
        """Called by the engine: runs the lane to its next block or to its end. Restores the caller's grad mode."""
        grad_enabled = torch.is_grad_enabled()
        self.enter_random_state()
        try:
            with contextlib.nullcontext() if self.storages is None else self.storages.running(self.index), self._around:
                result = self._greenlet.switch() if self._random_state is None else self._greenlet.switch(value)
        finally:
            torch.set_grad_enabled(grad_enabled)
        self.leave_random_state()
        if self._greenlet.dead:
            self.call, self.output = None, result
            self._greenlet = None  # a cycle through greenlet.lane would keep this lane until the next collection
        else:
            self.call = result
        if self.storages is not None:
            self.storages.put_away(self.index, () if self.call is None else (self.call.args, self.call.kwargs))

    def enter_random_state(self) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state)
        elif self._seed is not None:
            torch.manual_seed(self._seed)

    def leave_random_state(self) -> None:
        self._random_state = get_random_state()

    def record(self, call: BlockCall, activations: Activations) -> Record:
        """Keeps the inputs of `call` for its recomputation; a tensor given to several blocks is kept once."""
        flat, spec = tree_flatten((call.args, call.kwargs))
        leaves, edges = [], []
        for value in flat:
            edge = None
            if isinstance(value, torch.Tensor):
                if value.requires_grad:
                    edge = get_gradient_edge(value)
                stored = None if self.storages is None else self.storages.stored(value)
                value = self._save(value, activations) if stored is None else stored
            leaves.append(value)
            edges.append(edge)
        return Record(self, spec, leaves, edges, get_random_state(), call.captured)

    def _save(self, tensor: torch.Tensor, activations: Activations) -> SavedTensor:
        saved = self._saved.get(tensor)
        if saved is None:
            saved = activations.save(tensor)
            self._saved[tensor] = saved
        saved.users += 1
        return saved

    def anchored(self, output: Any, record: Record) -> Any:
        """`output` with every floating-point tensor in it anchored to `record`."""
        flat, spec = tree_flatten(output)
        with torch.enable_grad():
            flat = [
                Anchor.apply(self._token, value, record, i) if _is_differentiable(value) else value
                for i, value in enumerate(flat)
            ]
        return tree_unflatten(flat, spec)


def run_backward(record: Record, forward: Callable[..., Any], needless: Needless) -> None:
    """Runs the recorded visit again with a graph, unless that was kept, then its backward, and sends the input gradients on.

    Parameter gradients accumulate in `.grad`; input gradients go through the outer graph to the anchors of earlier
    visits. The record's inputs are released.
    """
    inputs = (_run_whole if record.chunks is None else _run_chunks)(record, forward, needless)
    onward: list[tuple[GradientEdge, torch.Tensor]] = []
    for value, edge in zip(inputs, record.gradient_edges, strict=True):
        if edge is not None and value.grad is not None:
            onward.append((edge, value.grad if record.chunks is not None else moved_to_file(value.grad)))
            value.grad = None
    del inputs
    release(record)
    if onward:
        # Parts of the outer graph may be shared by several blocks (rotary tables, vision features): keep it; it dies
        # with the records that refer to it.
        with in_file():
            torch.autograd.backward([e for e, _ in onward], [g for _, g in onward], retain_graph=True)


def _run_whole(record: Record, forward: Callable[..., Any], needless: Needless) -> list[Any]:
    """The visit's arguments, flattened, with their gradients."""
    graph, record.graph = record.graph, None
    if graph is None:
        graph = _recompute(record, forward, needless)
    grads = {i: record.take_gradient(i) for i in sorted(record.output_grads)}
    pairs = [(graph.outputs[i], grad) for i, grad in grads.items() if i in graph.outputs]
    del grads
    inputs = graph.inputs
    del graph
    if pairs:
        edges, grads = map(list, zip(*pairs, strict=True))
        del pairs
        torch.autograd.backward(edges, grads)
    return inputs


def _run_chunks(record: Record, forward: Callable[..., Any], needless: Needless) -> list[Any]:
    """As `_run_whole`."""
    inputs = _restored(record)
    call = tree_unflatten(inputs, record.spec)
    grads = {i: record.take_gradient(i) for i in sorted(record.output_grads)}
    set_random_state(record.random_state)
    storages = record.lane.storages
    with contextlib.nullcontext() if storages is None else storages.for_visit(inputs):
        run = partial(run_capturing, forward, keys=record.captured)
        record.chunks.backward(forward.__self__, run, call, grads, needless.recompute)
    return inputs


def _restored(record: Record) -> list[Any]:
    """The visit's arguments, flattened."""
    inputs: list[Any] = []
    for leaf, edge in zip(record.leaves, record.gradient_edges, strict=True):
        if isinstance(leaf, SavedTensor | StoredTensor):
            leaf = leaf.restore().detach().requires_grad_(edge is not None)
        inputs.append(leaf)
    return inputs


def _recompute(record: Record, forward: Callable[..., Any], needless: Needless) -> KeptGraph:
    inputs = _restored(record)
    args, kwargs = tree_unflatten(inputs, record.spec)
    storages = record.lane.storages
    with torch.enable_grad(), contextlib.nullcontext() if storages is None else storages.for_visit(inputs):
        flat = needless.recompute(partial(_run, record, forward, args, kwargs))
    # Edges, not outputs: nothing but their gradients is wanted of these any more.
    wanted = (i for i in record.output_grads if flat[i].requires_grad)
    return KeptGraph(inputs, {i: get_gradient_edge(flat[i]) for i in wanted})


def _run(record: Record, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The visit's outputs, flattened."""
    set_random_state(record.random_state)
    return tree_flatten(run_capturing(forward, args, kwargs, record.captured))[0]


def run_capturing(
    forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], keys: tuple[str, ...]
) -> tuple[Any, dict[str, list[Any]]]:
    """The block's output, and what hooks inside of it collect under `keys`. See [Note: captured outputs]."""
    captured: dict[str, list[Any]] = {key: [] for key in keys}
    token = _collector().set(captured)
    try:
        return forward(*args, **kwargs), captured
    finally:
        _collector().reset(token)


def collected_keys() -> tuple[str, ...]:
    """What hooks of Transformers collect now, for the forward that runs."""
    return tuple(key for key, values in (_collector().get() or {}).items() if isinstance(values, list))


def _collector() -> Any:
    from transformers.utils import output_capturing

    return output_capturing._active_collector


def release(record: Record) -> None:
    """Gives up the record's graph and inputs; the last user of a saved tensor frees it."""
    record.graph = None
    for leaf in record.leaves:
        if isinstance(leaf, SavedTensor | StoredTensor):
            leaf.release()
    record.leaves, record.gradient_edges = [], []


def requires_grad(call: BlockCall) -> bool:
    """Whether gradients are wanted of what a block is called with, keys and values in a cache too."""
    flat, _ = tree_flatten((call.args, call.kwargs))
    cached = (value for leaf in flat for layer in getattr(leaf, "layers", ()) for value in vars(layer).values())
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in (*flat, *cached))


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
