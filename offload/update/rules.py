"""Optimizers' updates of streamed weights in one pass over memory, and a checksum of memory that came from disk.

A *piece* is `units` consecutive elements of state: arrays of them, beside the weights that its segments point to. An update
reads gradients, weights and state once and writes the new ones. With fp32 state and fp32 weights (or bf16 weights with the
lower half of their fp32 master, `remainder`) the results are, bit for bit, those of torch.optim with foreach=False on fp32
parameters:

    adamw     m = lerp(m, g, 1 - beta1); v = beta2 v + (1 - beta2) g g
              theta = (1 - lr wd) theta - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    lion      theta = (1 - lr wd) theta - lr sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g    (Chen et al. 2023)
    sgd       m = momentum m + g; theta = (1 - lr wd) theta - lr m       (torch.optim.SGD's, but for the decoupled decay)
    signsgd   theta = (1 - lr wd) theta - lr sign(g)
    adafactor, apollo, projection, columns
              theta = (1 - lr wd) theta - lr g, where g is the direction that `offload.update.adafactor` or
              `offload.update.projections` makes of the gradient
    lamb      as adamw; the learning rate has the parameter's ratio of `offload.update.trust_ratio` in it

g is the gradient times `gradient_scale`, rounded to the gradient's dtype: what clipping leaves in `.grad`.

[Note: fused operations]
Found in PyTorch 2.13 on AVX2 and AVX-512, the same in vector bodies and scalar tails: lerp and add(alpha=) are fused
multiply-adds, so is the last step of addcmul (fma(value * a, b, self)); addcdiv is not (self + (value * a) / b), and a
division by a number is a division. Its square root is MKL's, which on AMD processors is not rounded correctly: one root of
six is a unit in the last place off. `ROOT` says which one this process's PyTorch has; the kernels have both, and results are
the same whatever the instruction set. On Intel's processors MKL has a third (one root of 140 is off), which the kernels do not:
they take IEEE's there, and a weight can differ from PyTorch's by a unit in the last place of its fp32 master.

[Note: 8-bit state]
Blocks of 256 units have a scale, their largest magnitude, and codes for values of a fixed table in [-1, 1] or [0, 1] whose
relative precision falls with the magnitude (dynamic quantisation, Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from finetune_native import optimizer as _native

RULES = ("adamw", "lion", "sgd", "signsgd", "adafactor", "lamb", "apollo", "projection", "columns")
STATE_FORMATS = ("float32", "bfloat16", "8bit")
ROUNDINGS = ("nearest", "stochastic")
ROOTS = ("ieee", "mkl")
BLOCK = 256
"""Units under one scale of 8-bit state."""
INSTRUCTION_SETS: tuple[str, ...] = tuple(_native.available())
"""Code that this processor can run, fastest first; all give the same bits."""

_DESCENT = 4
_KERNELS = {"adamw": 0, "lion": 1, "sgd": 2, "signsgd": 3, "lamb": 0}
_STATE_OF = {"adamw": ("first", "second"), "lamb": ("first", "second"), "lion": ("first",), "sgd": ("first",)}
_ITEMSIZES = {"float32": 4, "bfloat16": 2, "8bit": 1}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Address = torch.Tensor | int
"""A contiguous CPU tensor, or an address; 0: there is none."""


@dataclass(frozen=True, slots=True)
class Rule:
    """name: one of `RULES`. betas: of adamw, lamb, lion and what projects. eps: of these but lion. momentum: of sgd. Weight
    decay is decoupled in all. rank, interval, scale: of apollo, projection and columns, see `offload.update.projections`."""

    name: str
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.9
    rank: int = 0
    interval: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"unknown rule {self.name!r}; there are {', '.join(RULES)}")

    @property
    def state(self) -> tuple[str, ...]:
        """Which of "first" and "second" it keeps of every element."""
        return _STATE_OF.get(self.name, ())

    @property
    def has_directions(self) -> bool:
        """Whether a step moves along something made of whole matrices, whose state is apart from the elements'."""
        return self.name in ("adafactor", "apollo", "projection", "columns")


@dataclass(frozen=True, slots=True)
class StateFormat:
    """How streamed state is kept. name: one of `STATE_FORMATS`; bf16 state is always rounded stochastically."""

    name: str = "float32"

    def __post_init__(self) -> None:
        if self.name not in STATE_FORMATS:
            raise ValueError(f"unknown format {self.name!r}; there are {', '.join(STATE_FORMATS)}")

    def array_bytes(self, rule: Rule, units: int) -> dict[str, int]:
        """Name -> bytes of every array of a piece: "first", "second", and with 8 bit "first_scales", "second_scales"."""
        sizes = {}
        for name in rule.state:
            sizes[name] = units * _ITEMSIZES[self.name]
            if self.name == "8bit":
                sizes[f"{name}_scales"] = 4 * -(-units // BLOCK)
        return sizes

    def bytes_per_unit(self, rule: Rule) -> float:
        """Of all arrays together, the scales' share included."""
        return sum(self.array_bytes(rule, BLOCK).values()) / BLOCK


class Segment(NamedTuple):
    """`count` elements of one parameter, whose state begins at index `unit` of the piece's arrays.

    weights: fp32, bf16 or fp16, any alignment; gradients: fp32 or bf16. copy: where the new weights are written once more,
    in their dtype. element: number of the first element, 64 bits; random bits are a function of it (and of seed and array),
    so numbers that no other element of the model has give independent rounding.
    """

    unit: int
    count: int
    weights: Address
    weight_dtype: torch.dtype
    gradients: Address
    gradient_dtype: torch.dtype
    copy: Address = 0
    element: int = 0


class Sums(NamedTuple):
    """Sums of squares over an update's elements: of changes of the weights, and of new weights. Of the fp32 masters where
    there are any, else of the weights as stored. The same for any number of threads."""

    change_sq: float
    weight_sq: float


def update(
    rule: Rule,
    step: int,
    learning_rate: float,
    segments: Sequence[Segment],
    state: Mapping[str, Address],
    units: int,
    *,
    state_format: StateFormat = StateFormat(),  # noqa: B008
    remainder: Address = 0,
    gradient_scale: float = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
    threads: int | None = None,
    instructions: str = INSTRUCTION_SETS[0],
    root: str | None = None,
) -> Sums:
    """One step of a piece, in place. step: from 1 on.

    segments: sorted by unit, apart from each other. state: the arrays of `StateFormat.array_bytes`. remainder: int16
    [units], the lower halves of the fp32 masters of bf16 weights. rounding: of 16-bit weights without; fp16 to nearest only.
    root: one of `ROOTS`, PyTorch's by default. A unit in no segment keeps its state; with 8 bit, if no unit of its block is
    in one. Raises ValueError for what does not fit.
    """
    beta1, beta2 = rule.betas
    keep1, divisor, step_size = beta1, 1.0, learning_rate
    if step < 1:
        raise ValueError(f"steps count from 1, found {step}")
    for s in segments:
        if s.weight_dtype not in _DTYPES or s.gradient_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"expected fp32, bf16 or fp16 weights and fp32 or bf16 gradients, found {s}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; there are {', '.join(ROUNDINGS)}")
    if rule.name in ("adamw", "lamb"):
        step_size = learning_rate / (1 - beta1**step)
        divisor = (1 - beta2**step) ** 0.5
    elif rule.name == "sgd":
        keep1 = rule.momentum
    scalars = (
        gradient_scale,
        1 - learning_rate * rule.weight_decay,
        keep1,
        1 - beta1,
        beta2,
        1 - beta2,
        divisor,
        rule.eps,
        -step_size,
    )
    change_sq, weight_sq = _native.run(
        instructions,
        _KERNELS.get(rule.name, _DESCENT),
        STATE_FORMATS.index(state_format.name),
        ROOTS.index(root or ROOT),
        rounding == "stochastic",
        seed,
        scalars,
        units,
        _address(remainder),
        _state("first", state, _SIGNED),
        _state("second", state, _UNSIGNED),
        [
            (
                s.unit,
                s.count,
                _address(s.weights),
                _DTYPES[s.weight_dtype],
                _address(s.gradients),
                _DTYPES[s.gradient_dtype],
                _address(s.copy),
                s.element,
            )
            for s in segments
        ],
        torch.get_num_threads() if threads is None else threads,
    )
    return Sums(change_sq, weight_sq)


def checksum(
    memory: Address, num_bytes: int, threads: int | None = None, instructions: str = INSTRUCTION_SETS[0]
) -> int:
    """A number of 64 bits: another one for certain if one bit differs (or any one aligned word of 4 bytes), and but for
    chance whatever differs, is swapped or repeated. Not for use against people. The same on every machine of little endian.

    Tiles of 64 KiB are padded with zeros to whole rows of 64 words of 32 bits; word j of a row goes to lane j, which starts
    at j: lane = (lane ^ word) * 0x9E3779B1; lane ^= lane >> 15. A tile's sum is that of mix64(lane | (j + 1) << 32), the
    whole that of mix64(sum ^ mix64(tile + 1)), and the number is mix64(whole ^ mix64(num_bytes)).
    """
    return _native.checksum(
        instructions, _address(memory), num_bytes, torch.get_num_threads() if threads is None else threads
    )


def code_table(signed: bool) -> torch.Tensor:
    """The 256 values of 8-bit codes, ascending fp32: 7 decades, each with twice as many values as the one below; 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        means = (10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2).tolist()
        values += means + ([-x for x in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def _address(memory: Address) -> int:
    if isinstance(memory, int):
        return memory
    if memory.device.type != "cpu" or not memory.is_contiguous():
        raise ValueError(f"expected a contiguous tensor on the CPU, found {memory.device} {tuple(memory.shape)}")
    return memory.data_ptr()


def _state(name: str, state: Mapping[str, Address], table: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return (_address(state.get(name, 0)), _address(state.get(f"{name}_scales", 0)), *(t.data_ptr() for t in table))


def _with_bounds(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table, fp32 [256]; the bound above each of its values, half-way to the next; and uint8 [65536], for every upper
    half of fp32 bits the code of the lowest number that has it. No two bounds share an upper half."""
    bounds = torch.cat([(table[1:] + table[:-1]) / 2, torch.tensor([torch.inf])])
    if table[0] == 0:
        bounds[0] = 0  # a second moment that is not 0 must not become 0: the step would be divided by epsilon
    halves = torch.arange(1 << 16, dtype=torch.int32)
    lower = (halves >= 1 << 15).int() * 0xFFFF  # the lowest of negative numbers has all lower bits set
    lowest = ((halves << 16) | lower).view(torch.float32).nan_to_num(0.0)
    return table, bounds, torch.searchsorted(bounds, lowest).clamp(max=255).to(torch.uint8)


def square_root(x: torch.Tensor, root: str, instructions: str = INSTRUCTION_SETS[0]) -> torch.Tensor:
    """fp32 roots of a contiguous fp32 tensor whose size is a multiple of 16."""
    result = torch.empty_like(x)
    _native.square_roots(instructions, ROOTS.index(root), _address(x), result.data_ptr(), x.numel())
    return result


def _root_of_torch() -> str:
    x = torch.linspace(1e-3, 1.0, 1024)
    return next((root for root in ROOTS if square_root(x, root).equal(x.sqrt())), "ieee")


_SIGNED, _UNSIGNED = _with_bounds(code_table(True)), _with_bounds(code_table(False))
ROOT: str = _root_of_torch()
"""The square root of this process's PyTorch, one of `ROOTS`."""
