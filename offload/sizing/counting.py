"""What a block's visit computes, counted on the meta device: for machines that are not here, whose rates are known.

Every product, attention and other operation of the model's own code, its adapters and their gradients is seen with its shapes.
What one takes follows from a machine's rates (`finetune.memory.machine.ComputeRates`): a product is as fast as such products
are there, everything else as fast as memory moves its bytes, and nothing is faster than it is called.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.memory.machine import ComputeRates, Product
from finetune.offload.sizing.dry_run import block_on_meta
from finetune.offload.sizing.meta_operations import MetaAttention, run_operation
from finetune.offload.step.chunked_attention import ChunkAttention, KeysKnown
from finetune.offload.step.deferred_products import Needless
from finetune.offload.step.mask_rows import Span
from finetune.offload.weights.binding import LinearInSlot
from finetune.offload.weights.formats import StoredWeight
from finetune.offload.weights.formats.plain import dense_bytes
from finetune.offload.weights.parts import ModelParts


class CountedProduct(NamedTuple):
    kind: Product
    dtype: str
    rows: int
    out_features: int
    in_features: int


class CountedAttention(NamedTuple):
    dtype: str
    sequences: int
    length: int
    width: int  # heads times head size
    backward: bool


@dataclass(slots=True)
class Work:
    """Of one micro-batch in one pass through a block, less the decoding of weights."""

    products: Counter[CountedProduct] = field(default_factory=Counter)
    attention: Counter[CountedAttention] = field(default_factory=Counter)
    moved_bytes: int = 0  # read and written by all other operations
    operations: int = 0

    def seconds(self, rates: ComputeRates, queued: bool) -> float:
        """queued: whether operations are put into a queue, while the ones before are still running: an accelerator's."""
        products = sum(count * _product_seconds(product, rates) for product, count in self.products.items())
        attention = sum(count * rates.attention_seconds(*found) for found, count in self.attention.items())
        running = products + attention + self.moved_bytes / rates.elementwise_bytes_per_second
        calling = self.operations * rates.operation_seconds
        return max(running, calling) if queued else running + calling


def _product_seconds(product: CountedProduct, rates: ComputeRates) -> float:
    """An adapter's, of rank 16 or so, is not as fast as those that rates are of: memory moves its inputs."""
    _, dtype, rows, out_features, in_features = product
    numbers = rows * in_features + rows * out_features + out_features * in_features
    moving = numbers * getattr(torch, dtype).itemsize / rates.elementwise_bytes_per_second
    return max(rates.product_seconds(*product), moving)


@dataclass(frozen=True, slots=True)
class BlockWork:
    forward: Work
    recomputed: Work  # with a graph, without the products that backward never uses; empty: there is no backward
    backward: Work  # from the graph on
    keys: Work  # where blocks run in chunks of a text: what backward finds the keys and values of all chunks by
    decoded: tuple[StoredWeight, ...]  # weights that are decoded for a product or, where they can stay, once a visit
    bound: tuple[StoredWeight, ...]  # that are decoded whenever the block is bound


def count_block(
    parts: ModelParts, index: int, args: tuple, kwargs: dict[str, Any], train: bool, trained: Collection[str] = (),
    in_chunks: bool = False,
) -> BlockWork:  # fmt: skip
    """Of block `index`, called so. trained: local names of its own weights that get gradients. in_chunks: whether it will run
    in chunks of a text, which is the same work, but for keys and values.

    Raises what the model's code raises where it cannot run on meta: NotImplementedError, RuntimeError or TypeError.
    """
    block, binding, weights = parts.blocks[index], parts.bindings[index], parts.layouts[index].weights
    forward = Work()
    recomputed, backward, keys = Work(), Work(), Work()
    with block_on_meta(parts, index, args, kwargs) as (args, kwargs, views, _):
        rooms = [torch.empty(size, dtype=torch.uint8, device="meta") for size in binding.lazy_bytes.values()]
        binding.bind(views, trained, rooms)
        for name in binding.lazy_bytes:  # decoding is no work of the block's: it is done before, and stays
            _layer(binding.linear_weights[name]).numbers(binding.dtypes[name])
        with torch.no_grad(), _Operations(forward), _Attention(forward):
            block(*args, **kwargs)
        if train:
            if in_chunks:
                _count_keys(block, args, kwargs, keys)
            recomputed, backward = _count_backward(block, args, kwargs)
    bound = (name for name in weights if name not in binding.lazy_bytes)
    return BlockWork(
        forward,
        recomputed,
        backward,
        keys,
        tuple(weights[name] for name in binding.lazy_bytes),
        tuple(weights[name] for name in bound if not weights[name].is_stored_as(binding.dtypes[name])),
    )


def _count_keys(block: torch.nn.Module, args: tuple, kwargs: dict[str, Any], work: Work) -> None:
    length = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)).shape[1]
    attention = ChunkAttention([Span(0, length)], type(block).__name__)
    attention.only_keys = True
    with torch.no_grad(), _Operations(work), attention.installed(), contextlib.suppress(KeysKnown):
        block(*args, **kwargs)


def _count_backward(block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Work, Work]:
    """Of a visit after the first one, which teaches which products need not be recomputed: recomputation and gradients."""
    needless = Needless(block)
    hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)).requires_grad_()
    for _ in range(2):
        recomputed, backward = Work(), Work()
        for tensor in (hidden, *block.parameters()):
            tensor.grad = None
        with _Operations(recomputed), _Attention(recomputed, backward):
            outputs = needless.recompute(lambda: tree_leaves(block(*args, **kwargs)))
        outputs = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        edges = [torch.autograd.graph.get_gradient_edge(output) for output in outputs]
        gradients = [torch.empty(output.shape, dtype=output.dtype, device="meta") for output in outputs]
        with _Operations(backward):
            torch.autograd.backward(edges, gradients)
    return recomputed, backward


def decode_seconds(weight: StoredWeight, dtype: torch.dtype, rates: ComputeRates) -> float:
    """Of a whole weight. A format that the machine has no rate of is as fast as memory moves its bytes and its numbers."""
    rate = rates.decoded_weights_per_second.get(weight.word)
    if rate is not None:
        return prod(weight.shape) / rate
    return (weight.num_bytes + dense_bytes(weight.shape, dtype)) / rates.elementwise_bytes_per_second


def _layer(module: torch.nn.Linear) -> LinearInSlot:
    return module.forward


_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class _Operations(TorchDispatchMode):
    """Adds operations to `work`. Those that give views of what they got cost nothing."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = run_operation(function, args, kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        is_view = all(tensor.untyped_storage()._cdata in known for tensor in made)
        if is_view and not function._schema.is_mutable:
            return result
        self._work.operations += 1
        if function in _PRODUCTS:
            self._add_product(*args[-2:])
        else:
            self._work.moved_bytes += sum(tensor.nbytes for tensor in (*given, *made))
        return result

    def _add_product(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """a: [(batch,) m, k], b: [(batch,) k, n]"""
        (m, k), n, count = a.shape[-2:], b.shape[-1], prod(a.shape[:-2])
        dtype = str(a.dtype).removeprefix("torch.")
        if a.stride(-2) == 1 and a.stride(-1) != 1:  # g^T x
            found = CountedProduct("weight_gradient", dtype, k, m, n)
        elif b.stride(-2) == 1 and b.stride(-1) != 1:  # x W^T
            found = CountedProduct("forward", dtype, m, n, k)
        else:  # g W
            found = CountedProduct("input_gradient", dtype, m, k, n)
        self._work.products[found] += count


class _Attention(TorchFunctionMode):
    """Adds attention to `work`, and its gradient, where there will be one, to that of the gradients."""

    def __init__(self, work: Work, gradients: Work | None = None) -> None:
        super().__init__()
        self._work, self._gradients, self._on_meta = work, gradients, MetaAttention()

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention and len(args) >= 3:
            query, key = args[:2]
            sequences, length = prod(query.shape[:-3]), max(query.shape[-2], key.shape[-2])
            dtype, width = str(query.dtype).removeprefix("torch."), query.shape[-3] * query.shape[-1]
            for work, backward in ((self._work, False), (self._gradients, True)):
                if work is not None:
                    work.attention[CountedAttention(dtype, sequences, length, width, backward)] += 1
                    work.operations += 1
        return self._on_meta.__torch_function__(function, types, args, kwargs)
