"""What a model's forward is given in place of logits, and its own loss makes of them. See [Note: loss tiles] in
`finetune.offload.step.tiled_loss`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from finetune.memory.errors import UserError
from finetune.offload.step.loss_form import LossForm
from finetune.offload.step.random_state import RandomState, get_random_state
from finetune.offload.step.tiled_loss import IGNORE_INDEX, Operation, TiledCrossEntropy, apply_operations


class DeferredLogits:
    """Stands for `head(hidden)` in the model's forward; remembers the random state there (an adapter of the head may have
    dropout) and the elementwise operations applied to it.

    hidden: [..., hidden]; what it stands for: [..., vocab_size]. An operation takes logits and the columns of the vocabulary
    that they are of. What would need whole logits raises UserError.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        vocab_size: int,
        operations: tuple[Operation, ...] = (),
        random_state: RandomState | None = None,
    ) -> None:
        self.hidden = hidden
        self.vocab_size = vocab_size
        self.operations = operations
        self.random_state = get_random_state() if random_state is None else random_state

    def then(self, operation: Operation) -> DeferredLogits:
        return DeferredLogits(self.hidden, self.vocab_size, (*self.operations, operation), self.random_state)

    def rows(self, hidden: torch.Tensor) -> DeferredLogits:
        """The same of other hidden states, which are some of these or in another order."""
        return DeferredLogits(hidden, self.vocab_size, self.operations, self.random_state)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        if any(isinstance(value, torch.Tensor) and value.numel() > 1 for value in options.values()):
            raise _needs_whole_logits("a tensor by keyword")

    def _operand(self, other: Any) -> Callable[[slice], Any]:
        """What stands beside the logits, for some columns: a number, or a tensor of one value or one for each column."""
        if not isinstance(other, torch.Tensor) or other.numel() == 1:
            return lambda columns: other
        if other.numel() != self.vocab_size or other.shape[-1] != self.vocab_size:
            raise _needs_whole_logits(f"a tensor of shape {list(other.shape)}")
        return lambda columns: other[..., columns]

    def float(self):
        return self.then(_float)

    def contiguous(self):
        return self

    def _method(self, name: str, *args: Any, **kwargs: Any) -> DeferredLogits:
        """The method of a tensor with this name; in place where it is."""
        in_place = name.endswith("_") and not name.startswith("_")
        method, operands = getattr(torch.Tensor, name.removesuffix("_") if in_place else name), map(self._operand, args)
        operands, dtype = list(operands), self.dtype
        self._check_options(kwargs)
        then = self.then(lambda x, columns: method(x, *(operand(columns) for operand in operands), **kwargs))
        if not in_place:
            return then
        self.operations = then.then(lambda x, columns: x.to(dtype)).operations
        return self

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.hidden.shape[:-1], self.vocab_size])

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return apply_operations(self.operations, self.hidden.new_zeros(1, 1), slice(0, 1)).dtype

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape):
        *rows, columns = shape[0] if len(shape) == 1 else shape
        if columns not in (-1, self.vocab_size) or (columns == -1 and -1 in rows):
            raise _needs_whole_logits(f"view{tuple(shape)}")
        return self.rows(self.hidden.reshape(*rows, self.hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        used = sum(
            0 if i is None or i is Ellipsis else i.ndim if getattr(i, "dtype", None) == torch.bool else 1 for i in index
        )
        last = index[-1]
        if (used == self.ndim or any(i is Ellipsis for i in index)) and not (
            last is Ellipsis or isinstance(last, slice) and last == slice(None)
        ):
            raise _needs_whole_logits("a choice of tokens of the vocabulary")
        return self.rows(self.hidden[index])

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.removesuffix("_") not in ELEMENTWISE:
            raise _needs_whole_logits(name)
        return partial(self._method, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", str(function))
        if function is functional.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        deferred = [a for a in args if isinstance(a, DeferredLogits)]
        # In place it would change a tensor that stands first, for what has no value yet.
        if name.removeprefix("__").removesuffix("__") not in ELEMENTWISE or len(deferred) != 1 or "out" in kwargs:
            raise _needs_whole_logits(name)
        deferred[0]._check_options(kwargs)
        operands = [a if a is deferred[0] else deferred[0]._operand(a) for a in args]
        return deferred[0].then(
            lambda x, columns: function(*(x if a is deferred[0] else a(columns) for a in operands), **kwargs)
        )


def _operator(name: str) -> Callable[..., DeferredLogits]:
    return lambda self, *args: self._method(name, *args)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "pow"):
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))


ELEMENTWISE = frozenset(
    ("add", "radd", "sub", "rsub", "subtract", "mul", "rmul", "multiply", "div", "truediv", "rtruediv", "true_divide",
     "divide", "neg", "negative", "pow", "clamp", "clip", "tanh", "sigmoid", "to", "type", "double", "half", "bfloat16")
)  # fmt: skip
"""Names of what may be applied to logits, as a method, an operator or a function of torch."""


def _float(x: torch.Tensor, columns: slice) -> torch.Tensor:
    return x.float()


def _needs_whole_logits(operation: str) -> UserError:
    return UserError(
        f"the model applies {operation} to its logits or its loss. A tiled loss never has whole logits, so only "
        "elementwise operations, a choice of rows and cross entropy are possible: this model's own loss can't be streamed"
    )


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """A mean (or sum) of cross entropies that the model's own loss asked for, times `weight`.

    logits: [n, vocabulary], deferred. labels: int64 [n], -100 where there is none. row_weights: fp32 [n]; None: all 1.
    """

    logits: DeferredLogits
    labels: torch.Tensor
    is_mean: bool = True  # over labelled rows; else a sum
    weight: float = 1.0
    form: LossForm = LossForm()
    row_weights: torch.Tensor | None = None
    divisor: float | None = None  # of the sum over the step; None: its labels

    @property
    def num_items(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    def tiled(self, tile_tokens: int, divisor: float, backward: bool, keeps_rows: bool) -> TiledCrossEntropy:
        return TiledCrossEntropy(
            self.logits, self.labels, tile_tokens, divisor, backward, keeps_rows, self.form, self.row_weights
        )


class DeferredLoss:
    """Stands for the loss in the model's forward: a sum of cross entropies and of tensors that the model adds to them."""

    def __init__(self, terms: tuple[CrossEntropy, ...], added: torch.Tensor | float = 0.0) -> None:
        self.terms = terms
        self.added = added

    @property
    def num_items(self) -> int:
        """Labels that the (first) cross entropy is a mean of."""
        return self.terms[0].num_items

    @property
    def device(self) -> torch.device:
        return self.terms[0].labels.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def formed(self, form: LossForm, weights: torch.Tensor | None, divisor: float | None) -> DeferredLoss:
        """With its only cross entropy in this form. weights: of its labels in their order, fp32 [labels]; None: all 1."""
        (term,) = self.terms
        if weights is not None:
            weights = torch.zeros(term.labels.shape, device=self.device).masked_scatter_(
                term.labels != IGNORE_INDEX, weights.to(self.device)
            )
        return DeferredLoss((replace(term, form=form, row_weights=weights, divisor=divisor),), self.added)

    def __add__(self, other):
        if isinstance(other, DeferredLoss):
            return DeferredLoss(self.terms + other.terms, self.added + other.added)
        return DeferredLoss(self.terms, self.added + other)

    __radd__ = __add__

    def __mul__(self, other):
        if isinstance(other, torch.Tensor) and other.requires_grad or isinstance(other, DeferredLoss):
            raise _needs_whole_logits("a product of losses")
        terms = tuple(replace(term, weight=term.weight * float(other)) for term in self.terms)
        return DeferredLoss(terms, self.added * other)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self * (1.0 / float(other))

    def to(self, *args, **kwargs):
        return self

    def mean(self):
        return self

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise _needs_whole_logits(name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.add, torch.Tensor.add) and not kwargs:  # of a tensor that stands first
            return args[1] + args[0]
        raise _needs_whole_logits(getattr(function, "__name__", str(function)))


def _cross_entropy(input: DeferredLogits, target: torch.Tensor, **options: Any) -> DeferredLoss:
    """In place of `torch.nn.functional.cross_entropy`; options: its other arguments, which it gives by keyword."""
    weight, reduction, smoothing = (options.get(name) for name in ("weight", "reduction", "label_smoothing"))
    if weight is not None or smoothing or reduction not in ("mean", "sum") or input.ndim != 2 or target.ndim != 1:
        asked = f"weight {weight is not None}, label_smoothing {smoothing}, reduction {reduction}"
        raise _needs_whole_logits(f"cross entropy with {asked} over {input.ndim} dimensions")
    labels, ignored = target.to(input.device), options["ignore_index"]
    if ignored != IGNORE_INDEX:
        labels = labels.masked_fill(labels == ignored, IGNORE_INDEX)
    if input.operations and input.operations[-1] is _float:  # which a tiled loss does in any case
        input = DeferredLogits(input.hidden, input.vocab_size, input.operations[:-1], input.random_state)
    return DeferredLoss((CrossEntropy(input, labels, reduction == "mean"),))
