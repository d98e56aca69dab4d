"""How much one block visit allocates, found by running it on the meta device: shapes move, numbers do not.

The same code that will run for real (the model's block, its adapters, the wrapped linear layers) runs under a counter of
live storage bytes. What kernels allocate inside themselves is not seen; the planner's factor covers it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune.memory.errors import UserError
from finetune.offload.sizing.meta_operations import LiveBytes, MetaAttention
from finetune.offload.step.deferred_logits import DeferredLogits, DeferredLoss
from finetune.offload.step.lanes import collected_keys, run_capturing
from finetune.offload.step.own_loss import loss_in
from finetune.offload.weights.formats.plain import dense_bytes
from finetune.offload.weights.parts import ModelParts
from finetune.offload.weights.skeleton import is_placeholder

LONG_NUMBERS = 1 << 24  # of hidden states of a text that is not made whole while it is measured
MOST_PASSES = 100
"""In which a block must have been called: in training, LayerDrop leaves them out at random, sometimes all of a pass."""


@dataclass(frozen=True, slots=True)
class VisitSize:
    """What one block visit takes, by one micro-batch."""

    peak_bytes: int  # live at most: its recomputed graph, gradients and temporaries
    flops: int  # of one forward
    boundary_bytes: int = 0  # of the block's input
    graph_bytes: int = 0  # that its graph keeps for backward beside its input
    graph_blocks: int = 0  # for so many blocks, the last ones, `graph_bytes` is known, and there are gradients to compute
    near_bytes: int = 0  # of `peak_bytes`, where texts are cut: what cannot lie in a file, see `finetune.memory.tensor_file`
    waiting_bytes: int = 0  # of what gradients of experts are made of, when the visit's other micro-batches are done


def measure_visit(
    parts: ModelParts,
    model: nn.Module,
    inputs: dict[str, Any],
    train: bool,
    trained: Sequence[frozenset[str]] | None = None,
) -> VisitSize:
    """Largest memory of one block visit when `model` (adapters included) is called with `inputs`.

    trained: per block, local names of its own weights that get gradients.

    The model runs up to its first block on placeholders, which gives the block's real arguments; the largest block of that
    kind then runs on meta. Blocks whose shapes depend on numbers (routed experts) cannot: they get an upper estimate.
    """
    first, args, kwargs = first_call(parts, model, inputs)
    size, _ = _measure_call(parts, first, args, kwargs, train, trained)
    return _with_graphs(parts, model, trained, {type(parts.blocks[first])} if size.graph_bytes else set(), size)


def _measure_call(
    parts: ModelParts,
    first: int,
    args: tuple,
    kwargs: dict[str, Any],
    train: bool,
    trained: Sequence[frozenset[str]] | None,
) -> tuple[VisitSize, Any]:
    """Of the kind of block `first`, called so: the most that any block of it takes, products of the one with most weights; and
    what its output is, None where it can't run on meta."""
    names = trained or [frozenset()] * len(parts.blocks)
    unlike = unlike_blocks(parts, first, names)
    hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    output = None
    try:
        found = [_run_on_meta(parts, i, args, kwargs, train, names[i]) for i in unlike]
        (size, output), sizes = found[0], [size for size, _ in found]
        most = {name: max(getattr(size, name) for size in sizes) for name in ("peak_bytes", "graph_bytes")}
        size = replace(size, **most)
    except (NotImplementedError, RuntimeError, TypeError):
        size = _estimate(parts, unlike[0], hidden)
    return replace(size, boundary_bytes=hidden.nbytes), output


def unlike_blocks(parts: ModelParts, first: int, trained: Sequence[frozenset[str]]) -> list[int]:
    """One of each outline among the blocks of the class of block `first`; the one with most weights comes first."""
    same = [i for i, block in enumerate(parts.blocks) if type(block) is type(parts.blocks[first])]
    same.sort(key=lambda i: -parts.layouts[i].num_bytes)
    unlike = {_outline_of(parts.blocks[i], trained[i]): i for i in reversed(same)}
    return sorted(unlike.values(), key=same.index)


def _outline_of(block: nn.Module, trained: frozenset[str]) -> tuple:
    """What blocks have in common of which one can be measured for all."""
    return trained, *((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())


def _with_graphs(
    parts: ModelParts,
    model: nn.Module,
    trained: Sequence[frozenset[str]] | None,
    known: Collection[type],
    size: VisitSize,
) -> VisitSize:
    """`size` with how many graphs can be kept. known: classes of blocks whose graphs it holds for."""
    blocks = parts.blocks
    own = [any(p.requires_grad for p in block.parameters()) or bool(trained and trained[i]) for i, block in enumerate(blocks)]
    inside = {p for block in blocks for p in block.parameters()}
    if any(p.requires_grad and p not in inside for p in model.parameters()):
        own[0] = True
    lowest = next((i for i, has_gradients in enumerate(own) if has_gradients), len(blocks))
    above_unknown = max((i + 1 for i, block in enumerate(blocks) if type(block) not in known), default=0)
    return replace(size, graph_blocks=len(blocks) - max(lowest, above_unknown))


@dataclass(frozen=True, slots=True)
class Walk:
    """What a walk over a model's blocks found."""

    size: VisitSize  # the largest of every kind of block that was reached
    loss: DeferredLoss | torch.Tensor | None  # the model's own; None where the walk ended before


def walk(
    parts: ModelParts,
    model: nn.Module,
    inputs: dict[str, Any],
    train: bool,
    trained: Sequence[frozenset[str]] | None = None,
) -> Walk:
    """`measure_visit` for models of several kinds of blocks, and what the model's own loss asks of its logits.

    inputs: with labels. The model runs on placeholders from its first block to its last and to its loss: blocks on meta, one of
    each kind and shape, what is between them as it is. It ends where a block can't run there, and where logits would be whole.

    Raises UserError for a loss that can't be tiled, and for inputs that the model's forward refuses.
    """
    found: dict[Any, tuple[VisitSize, Any]] = {}

    def visit(index: int, *args: Any, **kwargs: Any) -> Any:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        key = type(parts.blocks[index]), str(shapes)
        if key not in found:
            with _forwards(parts, own_forwards):  # and outside of what hooks collect for this pass
                found[key], _ = run_capturing(_measure_call, (parts, index, args, kwargs, train, trained), {}, ())
        output = found[key][1]
        if output is None or set(collected_keys()) - {"hidden_states"}:  # what hooks collect inside of a block would be missing
            raise _Captured
        return tree_map_only(_Outline, lambda one: torch.zeros(one.shape, dtype=one.dtype), output)

    head = model.get_output_embeddings()
    own = None if head is None else head.__dict__.get("forward")
    if head is not None:
        tiled = parts.head is not None
        head.forward = partial(DeferredLogits, vocab_size=head.weight.shape[0]) if tiled else _capture
    loss, own_forwards = None, [block.__dict__.get("forward") for block in parts.blocks]
    try:
        with _instead_of_blocks(parts, visit), torch.no_grad(), contextlib.suppress(_Captured):
            loss = loss_in(parts.model, model(**inputs))
    except (IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if not found:  # nothing but the inputs has gone in yet
            raise UserError(f"{type(parts.model).__name__} can't take such rows ({', '.join(inputs)}): {error}") from error
    finally:
        if own is not None:
            head.forward = own
        elif head is not None:
            del head.forward
    sizes = [size for size, _ in found.values()]
    names = ("peak_bytes", "flops", "boundary_bytes", "graph_bytes", "waiting_bytes")
    most = VisitSize(**{name: max(getattr(size, name) for size in sizes) for name in names})
    unknown = {kind for (kind, _), (size, _) in found.items() if not size.graph_bytes}
    return Walk(_with_graphs(parts, model, trained, {kind for kind, _ in found} - unknown, most), loss)


def run_first_block(parts: ModelParts, model: nn.Module, inputs: dict[str, Any]) -> None:
    """The way of `measure_visit`, without measuring. Raises what the model raises."""
    _run_on_meta(parts, *first_call(parts, model, inputs), False, frozenset())


class MaskSize(NamedTuple):
    """Bytes of what one micro-batch holds that grows with the square of its length: attention masks. kept: while it is on
    its way through the model. made: more than that while they are made."""

    kept_bytes: int
    made_bytes: int


def measure_masks(parts: ModelParts, model: nn.Module, rows: int, length: int, packed: bool) -> MaskSize:
    """Of `rows` rows of `length` tokens, padded where there are several; packed: with several texts in a row.

    Short texts are measured: live(l) = a + b l + c l^2, so live(3 l) - 2 live(2 l) + live(l) = 2 c l^2.
    """
    unit = min(64, length // 3)
    if unit < 2:
        return MaskSize(0, 0)
    config, sizes = parts.model.config.get_text_config(), []
    windows = {key: getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")}
    windows = {key: window for key, window in windows.items() if window}
    for key, window in windows.items():
        if length > window:  # what attends within a window has a mask once a text is longer
            setattr(config, key, unit - 1)
    for short in (unit, 2 * unit, 3 * unit):
        inputs: dict[str, Any] = {"input_ids": torch.zeros(rows, short, dtype=torch.int64), "use_cache": False}
        if packed:
            inputs["position_ids"] = (torch.arange(short) % (short - 1)).expand(rows, short)
        elif rows > 1:
            inputs["attention_mask"] = torch.ones(rows, short, dtype=torch.int64)
            inputs["attention_mask"][0, -1] = 0
        counter = LiveBytes()
        with counter:
            first_call(parts, model, inputs, lambda counter=counter: sizes.append((counter.live_bytes, counter.peak_bytes)))
    for key, window in windows.items():
        setattr(config, key, window)
    kept, peak = (max(0, c - 2 * b + a) * length**2 // (2 * unit**2) for a, b, c in zip(*sizes, strict=True))
    return MaskSize(kept, max(0, peak - kept))


class _Captured(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Outline:
    """What is kept of a tensor."""

    shape: torch.Size  # its sizes
    dtype: torch.dtype  # as computed


def first_call(
    parts: ModelParts, model: nn.Module, inputs: dict[str, Any], there: Callable[[], None] = lambda: None
) -> tuple[int, tuple, dict[str, Any]]:
    """The first block that is called, and with what. there: called at that moment."""
    calls: list[tuple[int, tuple, dict[str, Any]]] = []

    def capture(index: int, *args: Any, **kwargs: Any):
        calls.append((index, args, kwargs))
        there()
        raise _Captured

    for _ in range(MOST_PASSES):
        with _instead_of_blocks(parts, capture), torch.no_grad(), _EmbeddingShapes(), contextlib.suppress(_Captured):
            model(**inputs)
        if calls:
            return calls[0]
    raise UserError(f"{type(parts.model).__name__} has run none of its blocks in {MOST_PASSES} passes: it can't be streamed")


def _capture(*args: Any, **kwargs: Any):
    raise _Captured


@contextlib.contextmanager
def _instead_of_blocks(parts: ModelParts, visit: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of block i is `visit(i, ...)`."""
    with _forwards(parts, [partial(visit, index) for index in range(len(parts.blocks))]):
        yield


@contextlib.contextmanager
def _forwards(parts: ModelParts, forwards: Sequence[Callable[..., Any] | None]) -> Iterator[None]:
    """Inside, the blocks have these forwards; None: their class's own."""
    before = [block.__dict__.pop("forward", None) for block in parts.blocks]
    try:
        for block, forward in zip(parts.blocks, forwards, strict=True):
            if forward is not None:
                block.forward = forward
        yield
    finally:
        for block, forward in zip(parts.blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _run_on_meta(
    parts: ModelParts, index: int, args: tuple, kwargs: dict[str, Any], train: bool, trained: frozenset[str]
) -> tuple[VisitSize, Any]:
    with counted_on_meta(parts, index, args, kwargs, trained) as (counter, args, kwargs):
        with torch.no_grad():
            outline = tree_map_only(torch.Tensor, lambda t: _Outline(t.shape, t.dtype), parts.blocks[index](*args, **kwargs))
        flops = counter.flops
        if train:
            run_backward(parts.blocks[index], args, kwargs)
        waiting_bytes = sum(lane.num_bytes for matrices in parts.experts for lane in matrices.waiting)
    graph_bytes = _graph_on_meta(parts, index, args, kwargs, trained) if train else 0
    return VisitSize(counter.peak_bytes, flops, graph_bytes=graph_bytes, waiting_bytes=waiting_bytes), outline


def _graph_on_meta(
    parts: ModelParts, index: int, args: tuple, kwargs: dict[str, Any], trained: frozenset[str]
) -> int:
    """Bytes that the graph of a forward holds when nothing else does; its input is not counted."""
    with counted_on_meta(parts, index, args, kwargs, trained) as (counter, args, kwargs):
        before = counter.live_bytes
        next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)).requires_grad_()
        outputs = [leaf for leaf in tree_leaves(parts.blocks[index](*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        edges = [get_gradient_edge(output) for output in outputs if output.requires_grad]
        del outputs
        num_bytes = counter.live_bytes - before
        del edges
    return num_bytes


@contextlib.contextmanager
def counted_on_meta(
    parts: ModelParts, index: int, args: tuple, kwargs: dict[str, Any], trained: frozenset[str]
) -> Iterator[tuple[LiveBytes, tuple, dict[str, Any]]]:
    """Inside, block `index` has weights on meta. Gives what counts, and the arguments on meta."""
    counter = LiveBytes()
    with block_on_meta(parts, index, args, kwargs) as (args, kwargs, views, adapters):
        for tensor in tree_leaves((args, kwargs, views, adapters)):
            counter.ignore(tensor)
        with counter, MetaAttention():
            parts.bindings[index].bind(views, trained)
            yield counter, args, kwargs


class MetaCall(NamedTuple):
    """How a block is called on meta."""

    args: tuple
    kwargs: dict[str, Any]
    views: dict[str, torch.Tensor]  # stored tensors, for the block's binding
    adapters: list[nn.Parameter]


@contextlib.contextmanager
def block_on_meta(parts: ModelParts, index: int, args: tuple, kwargs: dict[str, Any]) -> Iterator[MetaCall]:
    """Inside, a block's adapters and buffers are on meta, and so is what is yielded; what is bound is unbound in the end."""
    views = {
        name: torch.empty(view.shape, dtype=view.dtype, device="meta")
        for name, view in parts.layouts[index].views.items()
    }
    args, kwargs = tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs))
    for layer in (layer for leaf in tree_leaves((args, kwargs)) for layer in getattr(leaf, "layers", ())):
        _empty_cache_layer(layer)
    with on_meta(parts.blocks[index]) as adapters:
        try:
            yield MetaCall(args, kwargs, views, adapters)
        finally:
            parts.bindings[index].unbind()
            for matrices in parts.experts:
                matrices.waiting.clear()


@contextlib.contextmanager
def on_meta(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Inside, the block's adapters, which are yielded, and its buffers are meta tensors."""
    places = [(module._parameters, _is_adapters) for module in block.modules()]
    places += [(module._buffers, lambda b: b is not None) for module in block.modules()]
    held = [(place, name, tensor) for place, wanted in places for name, tensor in place.items() if wanted(tensor)]
    # Layers may move what they keep beside parameters and buffers to where they compute.
    moved = [(place, name, value) for module in block.modules() for place in _kept(module) for name, value in place.items()]
    adapters: list[nn.Parameter] = []
    try:
        for place, name, tensor in held:
            place[name] = torch.empty_like(tensor, device="meta")
            if isinstance(tensor, nn.Parameter):
                place[name] = nn.Parameter(place[name], requires_grad=tensor.requires_grad)
                adapters.append(place[name])
        yield adapters
    finally:
        for place, name, tensor in (*held, *moved):
            place[name] = tensor


def _kept(module: nn.Module) -> list[dict[str, Any]]:
    """Mappings of tensors that are neither parameters nor buffers of a module."""
    found = (value for name, value in vars(module).items() if type(value) is dict and name not in ("_parameters", "_buffers"))
    return [value for value in found if any(isinstance(tensor, torch.Tensor) for tensor in value.values())]


def _is_adapters(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter of a block that is not bound is an adapter's: those of the base are placeholders."""
    return parameter is not None and (
        parameter.requires_grad or type(parameter) is nn.Parameter and not is_placeholder(parameter)
    )


def run_backward(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Recomputes a block with a graph and runs that backward, on meta."""
    next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)).requires_grad_()
    output = block(*args, **kwargs)
    tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors])


def _empty_cache_layer(layer: Any) -> None:
    """What a layer of a key-value cache holds becomes meta tensors."""
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(layer, name, torch.empty_like(value, device="meta"))


def _estimate(parts: ModelParts, index: int, hidden: torch.Tensor) -> VisitSize:
    """Every matrix's output kept three times over (value, gradient, activation), and what stands decoded at once."""
    rows = hidden.numel() // hidden.shape[-1]
    matrices = [weight for weight in parts.layouts[index].weights.values() if len(weight.shape) >= 2]
    outputs = sum(weight.shape[-2] for weight in matrices)
    decoded = [dense_bytes(weight.shape, parts.dtype) for weight in matrices if not weight.is_stored_as(parts.dtype)]
    decoded_bytes = max(2 * max(decoded, default=0), parts.bindings[index].decoded_bytes)
    bases = (module._modules.get("base_layer") for module in parts.blocks[index].modules())
    # Adapters may make other weights out of those that they are around: the change in fp32, the sum, and what that is made of.
    decoded_bytes += sum(12 * base.weight.numel() for base in bases if isinstance(base, nn.Linear))
    flops = 2 * rows * sum(prod(weight.shape) for weight in matrices)
    stacks = [one for one in parts.experts if one.stack.block == index and one.trained]
    waiting = sum(sum(one.stack.weight.shape[1:]) * one.stack.experts_per_token for one in stacks)
    waiting_bytes = rows * waiting * hidden.element_size()
    peak_bytes = 3 * rows * outputs * hidden.element_size() + 8 * hidden.nbytes + decoded_bytes + waiting_bytes
    return VisitSize(peak_bytes, flops, waiting_bytes=waiting_bytes)


class _EmbeddingShapes(TorchFunctionMode):
    """Looked-up rows of placeholders, which are all alike, are one row seen many times: those of a long text would take more
    memory than its run."""

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.embedding and is_placeholder(args[1]) and args[0].numel() * args[1].shape[1] > LONG_NUMBERS:
            ids, table = args[:2]
            return table[ids.reshape(-1).amax()].expand(*ids.shape, -1)  # out of range as by the function itself
        return function(*args, **kwargs)
