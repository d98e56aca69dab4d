"""Experts of a mixture, one matrix at a time: stacked parameters [experts, rows, columns] that are never whole in memory.

[Note: streamed experts]
Transformers stacks the matrices of a layer's experts into one parameter and multiplies tokens, sorted by expert, by all of it
with `grouped_mm`. A streamed stack stands for such a parameter: a tensor with shape and dtype and no numbers. The model's own
code runs, and PEFT's around it; where it comes to the product, the matrices of those experts that got tokens are fetched one
after the other, and each is multiplied by its own tokens. On a CPU these are the products that `grouped_mm` makes itself, with
the same bits. A CUDA device's own kernel cuts sums otherwise.

PEFT adapts a stack by W + s B A of all experts (`baddbmm`). Of a streamed one it is made of one expert at a time, too.

[Note: gradients of stacks]
The gradient of an expert's matrix is the sum, over the lanes of a visit, of a product of what its tokens were and of their
gradients. Of a stack that is trained, backward keeps these two instead of the products, until all lanes are done; then the
gradient is made of one expert after the other. So no gradient waits for other lanes, those of experts without tokens do not
exist, and what waits is as large as what a visit computes with: it grows with tokens, not with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from finetune.memory.errors import UserError
from finetune.offload.weights.formats import Stored, StoredWeight

ALIGNMENT = 16
"""Bytes: MKL rounds a lone row's product otherwise where the matrix is not aligned so, as in files it may not be."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStack:
    """A stacked parameter whose experts are fetched one by one."""

    block: int
    """Index of the block that it is in."""
    name: str
    """Of the parameter, fully qualified."""
    module: nn.Module
    """The layer's experts, which have the parameter."""
    attribute: str
    """Its name there."""
    weight: StoredWeight
    """[experts, rows, columns], as it is stored."""
    dtype: torch.dtype
    """In which it computes."""

    @property
    def experts_per_token(self) -> int:
        """All of them, where the model does not say how many."""
        return getattr(self.module.config, "num_experts_per_tok", None) or self.weight.shape[0]

    def matrix(self, expert: int) -> StoredWeight:
        """[1, rows, columns]"""
        return self.weight.rows([(expert, expert + 1)])


class NearExperts(Protocol):
    """Brings matrices near."""

    def expect(self, stack: int, experts: Sequence[int], backward: bool) -> Sequence[int]:
        """These matrices of stack number `stack` are multiplied next. Returns the order in which they are best taken. backward:
        for gradients."""

    def acquire(self, stack: int, expert: int) -> dict[str, Tensor]:
        """The stored tensors of `ExpertStack.matrix`, by the names of a layout in which it is called ""."""

    def release(self, stack: int, expert: int) -> None: ...


Group = tuple[int, int, int]
"""(expert, first row, row behind the last one)"""


class LaneGradient(NamedTuple):
    """What the gradients of a stack are made of, of one lane. See [Note: gradients of stacks]."""

    x: Tensor  # [n, k], what was multiplied by the matrices, rows of one expert after those of another
    grad: Tensor  # [n, m], of the products
    rows: Mapping[int, tuple[int, int]]  # of experts that have some: expert -> the first one, the one behind the last
    turned: bool  # whether the products were with matrices [m, k], not [k, m]

    @property
    def num_bytes(self) -> int:
        return self.x.nbytes + self.grad.nbytes

    def of(self, expert: int) -> Tensor | None:
        """[rows, columns] as the matrix is stored; None: it had no tokens."""
        if expert not in self.rows:
            return None
        rows = slice(*self.rows[expert])
        x, grad = self.x[rows], self.grad[rows]
        return grad.t() @ x if self.turned else x.t() @ grad


class StackedMatrices:
    """What the products of a stack know of it. near: None while nothing is open; products then run on meta only.

    trained: whether backward leaves in `waiting`, lane by lane, what the gradients of the matrices are made of. make: makes
    what products meet, [1, rows, columns] in the dtype that computes, of an expert and what is stored of it; None: its numbers.
    """

    __slots__ = ("stack", "number", "near", "trained", "waiting", "make")

    def __init__(self, stack: ExpertStack, number: int) -> None:
        self.stack = stack
        self.number = number
        self.near: NearExperts | None = None
        self.trained = False
        self.waiting: list[LaneGradient] = []
        self.make: Callable[[int, Stored], Tensor] | None = None

    @contextmanager
    def matrix(self, expert: int) -> Iterator[Tensor]:
        """One expert's, dense [rows, columns] in the dtype that computes."""
        weight = self.stack.matrix(expert)
        views = self.near.acquire(self.number, expert)
        try:
            stored = weight.take(views, "")
            dense = (weight.decode(stored, self.stack.dtype) if self.make is None else self.make(expert, stored))[0]
            if dense.is_cpu and dense.data_ptr() % ALIGNMENT:
                dense = dense.clone()
            yield dense
            del dense
        finally:
            self.near.release(self.number, expert)

    @contextmanager
    def on_meta(self, expert: int) -> Iterator[Tensor]:
        weight = self.stack.matrix(expert)
        stored = weight.load(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        yield weight.decode(stored, self.stack.dtype)[0].clone()


class StreamedStack(Tensor):
    """A stack [experts, rows, columns] in place of its parameter. Shape and dtype are there; numbers exist in products only."""

    matrices: StackedMatrices
    turned: bool
    """Whether rows and columns have changed places."""
    update: tuple[Tensor, Tensor, float] | None
    """(left [experts, rows, rank], right [experts, rank, columns], factor): left right times factor is added."""

    @staticmethod
    def of(placeholder: Tensor, matrices: StackedMatrices, turned: bool = False, update: Any = None) -> StreamedStack:
        """placeholder: a tensor of the shape and dtype."""
        stack = placeholder.as_subclass(StreamedStack)
        stack.matrices, stack.turned, stack.update = matrices, turned, update
        return stack

    def __repr__(self) -> str:  # torch's own reads the numbers
        return f"StreamedStack({self.matrices.stack.name}, {tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__.partition(".")[0]
        handle = _OPERATIONS.get(name)
        if handle is not None:
            return handle(*args, **kwargs)
        if name not in _WITHOUT_NUMBERS:
            raise UserError(
                f"the model or its adapter uses {name} on the stacked weights of experts "
                f"({_name_in(args)}), which is not possible while these are fetched one by one"
            )
        return super().__torch_function__(function, types, args, kwargs)


def _name_in(args: Sequence[Any]) -> str:
    return next((arg.matrices.stack.name for arg in args if isinstance(arg, StreamedStack)), "a stack")


_WITHOUT_NUMBERS = {
    "__get__", "__set__", "size", "dim", "numel", "stride", "element_size", "untyped_storage", "is_floating_point",
    "is_contiguous", "requires_grad_", "data_ptr", "is_complex", "storage_offset",
}  # fmt: skip


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def _detach(stack: StreamedStack) -> StreamedStack:
    return StreamedStack.of(_plain(stack).detach(), stack.matrices, stack.turned, stack.update)


def _transpose(stack: StreamedStack, first: int, second: int) -> StreamedStack:
    if {first % 3, second % 3} != {1, 2}:
        raise UserError(f"{stack.matrices.stack.name}: expected rows and columns to be transposed, found {first} and {second}")
    return StreamedStack.of(_plain(stack).transpose(first, second), stack.matrices, not stack.turned, stack.update)


def _baddbmm(stack: StreamedStack, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> StreamedStack:
    if beta != 1 or stack.update is not None or stack.turned:
        raise UserError(f"{stack.matrices.stack.name} takes one adapter of experts at a time")
    return StreamedStack.of(_plain(stack), stack.matrices, False, (left, right, alpha))


def _grouped_mm(x: Tensor, stack: StreamedStack, *, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """x [n, k] whose first offs[0] rows are the first expert's, and so on; [n, m]."""
    left, right, factor = stack.update or (None, None, 1.0)
    matrices = stack.matrices
    # What is to have a gradient must be there, for backward to come by: this stands for the stack.
    wanted = x.new_empty(0).requires_grad_() if matrices.trained and torch.is_grad_enabled() else None
    return _GroupedProduct.apply(x, left, right, wanted, offs, _How(matrices, stack.turned, factor))


_OPERATIONS = {
    "detach": _detach,
    "set_": lambda stack, other: stack,  # by itself, in `torch.nn.utils.parametrize`
    "transpose": _transpose,
    "baddbmm": _baddbmm,
    "grouped_mm": _grouped_mm,
    "_grouped_mm": _grouped_mm,
}


class _How(NamedTuple):
    """Of a product with a stack."""

    matrices: StackedMatrices
    turned: bool  # whether rows and columns have changed places
    factor: float  # of the adapter's update


class _GroupedProduct(torch.autograd.Function):
    """[Note: streamed experts]. wanted: None where the stack has no gradient."""

    @staticmethod
    def forward(ctx, x, left, right, wanted, offsets, how: _How):
        ctx.groups = groups = _groups(x, offsets)
        ctx.matrices, ctx.turned, ctx.factor = matrices, turned, factor = how
        ctx.trained = wanted is not None
        ctx.save_for_backward(x if left is not None or ctx.trained else None, left, right)
        ctx.columns = x.shape[1]
        rows, columns = matrices.stack.weight.shape[1:]
        out = x.new_empty(x.shape[0], rows if turned else columns)
        for expert, start, stop, matrix in _near(matrices, groups, x, backward=False):
            with matrix as weight:
                weight = _updated(weight, left, right, factor, expert)
                torch.mm(x[start:stop], weight.t() if turned else weight, out=out[start:stop])
                del weight
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, left, right = ctx.saved_tensors
        dx = grad.new_empty(grad.shape[0], ctx.columns) if ctx.needs_input_grad[0] else None
        moved = left is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        dleft, dright = (torch.zeros_like(left), torch.zeros_like(right)) if moved else (None, None)
        if ctx.trained:
            ctx.matrices.waiting.append(LaneGradient(x, grad, {e: rows for e, *rows in ctx.groups}, ctx.turned))
        for expert, start, stop, matrix in _near(ctx.matrices, ctx.groups[::-1], grad, backward=True):
            some = grad[start:stop]
            if dx is not None:
                with matrix as weight:
                    weight = _updated(weight, left, right, ctx.factor, expert)
                    torch.mm(some, weight if ctx.turned else weight.t(), out=dx[start:stop])
                    del weight
            if moved:
                mine = (some.t() @ x[start:stop] if ctx.turned else x[start:stop].t() @ some)[None]
                dleft[expert] = _of_many(mine, right[expert : expert + 1].transpose(1, 2)) * ctx.factor
                dright[expert] = _of_many(left[expert : expert + 1].transpose(1, 2), mine) * ctx.factor
        return dx, dleft, dright, None, None, None


def _of_many(a: Tensor, b: Tensor) -> Tensor:
    """a [1, m, k] times b [1, k, n], with the bits that it has among products of other experts: MKL multiplies one matrix by a
    single column otherwise than several."""
    return (a.expand(2, -1, -1).bmm(b.expand(2, -1, -1)) if b.shape[2] == 1 else a.bmm(b))[0]


def _groups(x: Tensor, offsets: Tensor) -> list[Group]:
    """Of experts that have rows."""
    if x.is_meta:  # whose rows these are is not known: one expert may get all
        return [(0, 0, x.shape[0])]
    ends = offsets.tolist()
    return [(expert, start, end) for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if start < end]


def _near(
    matrices: StackedMatrices, groups: Sequence[Group], x: Tensor, backward: bool
) -> Iterator[tuple[int, int, int, Any]]:
    """Every group with what lends its matrix, in any order: each has rows of its own."""
    if x.is_meta:
        yield from ((*group, matrices.on_meta(group[0])) for group in groups)
        return
    if matrices.near is None:
        raise RuntimeError(f"{matrices.stack.name} is multiplied while no experts are near")
    of_expert = {group[0]: group for group in groups}
    for expert in matrices.near.expect(matrices.number, list(of_expert), backward):
        yield *of_expert[expert], matrices.matrix(expert)


def _updated(weight: Tensor, left: Tensor | None, right: Tensor | None, factor: float, expert: int) -> Tensor:
    if left is None:
        return weight
    return torch.baddbmm(weight[None], left[expert : expert + 1], right[expert : expert + 1], alpha=factor)[0]


def can_be_streamed(module: nn.Module, attribute: str, weight: StoredWeight) -> bool:
    """Whether a parameter of `module` is a stack of experts that Transformers multiplies with `grouped_mm`."""
    is_stack = len(weight.shape) == 3 and weight.shape[0] == getattr(module, "num_experts", 0) > 1
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return is_stack and hasattr(module, "is_transposed") and implementation == "grouped_mm" and attribute in module._parameters
