"""Optimizers' updates of streamed weights in one pass over memory, and a checksum of memory that came from disk.

A *piece* is `units` consecutive elements of state: arrays of them, beside the weights that its segments point to. An update
reads gradients, weights and state once and writes the new ones. What a rule does to an element stands in its file in
`finetune.offload.update.rules`; with fp32 state and fp32 weights (or bf16 weights with the lower half of their fp32 master,
`remainder`) the results are, bit for bit, those of torch.optim with foreach=False on fp32 parameters. There g is the gradient
times `gradient_scale`, rounded to the gradient's dtype: what clipping leaves in `.grad`.

[Note: fused operations]
Found in PyTorch 2.13 on AVX2 and AVX-512, the same in vector bodies and scalar tails: lerp and add(alpha=) are fused
multiply-adds, so is the last step of addcmul (fma(value * a, b, self)); addcdiv is not (self + (value * a) / b), and a
division by a number is a division. Its square root is MKL's, which on AMD processors is not rounded correctly: one root of
six is a unit in the last place off. `ROOT` says which one this process's PyTorch has; the kernels have both, and results are
the same whatever the instruction set. On Intel's processors MKL has a third (one root of 140 is off), which the kernels do not:
they take IEEE's there, and a weight can differ from PyTorch's by a unit in the last place of its fp32 master.

[Note: 8-bit state]
Blocks of `BLOCK` units have a scale, their largest magnitude, and codes for values of a fixed table in [-1, 1] or [0, 1] whose
relative precision falls with the magnitude (dynamic quantisation, Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from finetune_native import Dtype
from finetune_native import optimizer as _native

from finetune.offload.update.rules.rule import BLOCK, STATE_ITEMSIZES, Rule

ROUNDINGS = ("nearest", "stochastic")
ROOTS = tuple(_native.Root.__members__)
INSTRUCTION_SETS: tuple[str, ...] = tuple(_native.available())
"""Code that this processor can run, fastest first; all give the same bits."""

_DTYPES = {getattr(torch, dtype.name): dtype for dtype in Dtype}

Address = torch.Tensor | int
"""A contiguous CPU tensor, or an address; 0: there is none."""


@dataclass(frozen=True, slots=True)
class StateFormat:
    """How streamed state is kept. name: one of `STATE_ITEMSIZES`."""

    name: str = "float32"

    def __post_init__(self) -> None:
        if self.name not in STATE_ITEMSIZES:
            raise ValueError(f"unknown format {self.name!r}; there are {', '.join(STATE_ITEMSIZES)}")

    def array_bytes(self, rule: Rule, units: int) -> dict[str, int]:
        """Name -> bytes of every array of a piece: "first", "second", and with 8 bit "first_scales", "second_scales"."""
        sizes = {}
        for name in rule.states:
            sizes[name] = units * STATE_ITEMSIZES[self.name]
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
    weight_dtype: torch.dtype  # of weights and copy
    gradients: Address
    gradient_dtype: torch.dtype  # fp32 or bf16
    copy: Address = 0
    element: int = 0


class PieceState(NamedTuple):
    """What a piece keeps beside its weights. arrays: those of `StateFormat.array_bytes`, of `units` elements, kept as `format`
    says. remainder: int16 [units], the lower halves of the fp32 masters of bf16 weights."""

    units: int
    arrays: Mapping[str, Address]
    format: StateFormat = StateFormat()  # of the arrays
    remainder: Address = 0


class Step(NamedTuple):
    """number: from 1 on, of the state. gradient_scale: what gradients are multiplied with first. rounding: one of `ROUNDINGS`,
    of 16-bit weights without a remainder; fp16 to nearest only. seed: of random bits."""

    number: int
    learning_rate: float  # of this step
    gradient_scale: float = 1.0  # what gradients are multiplied by: clipping
    rounding: str = "nearest"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Code:
    """What runs, and on how many threads. instructions: one of `INSTRUCTION_SETS`. root: one of `ROOTS`; nothing else changes a
    bit."""

    threads: int = field(default_factory=torch.get_num_threads)
    instructions: str = INSTRUCTION_SETS[0]  # one of `INSTRUCTION_SETS`
    root: str = field(default_factory=lambda: ROOT)


class Sums(NamedTuple):
    """Sums of squares over an update's elements: of changes of the weights, and of new weights. Of the fp32 masters where
    there are any, else of the weights as stored. The same for any number of threads."""

    change_sq: float  # of changes
    weight_sq: float  # of new weights


def update(rule: Rule, step: Step, segments: Sequence[Segment], state: PieceState, code: Code | None = None) -> Sums:
    """One step of a piece, in place.

    segments: sorted by unit, apart from each other. A unit in no segment keeps its state; with 8 bit, if no unit of its block
    is in one. Raises ValueError for what does not fit.
    """
    code = code or Code()
    if step.number < 1:
        raise ValueError(f"steps count from 1, found {step.number}")
    for s in segments:
        if s.weight_dtype not in _DTYPES or s.gradient_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"expected fp32, bf16 or fp16 weights and fp32 or bf16 gradients, found {s}")
    if step.rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {step.rounding!r}; there are {', '.join(ROUNDINGS)}")
    decay = 1 - step.learning_rate * rule.weight_decay
    sums = _native.run(
        code.instructions,
        _native.Rule[rule.kernel],
        _native.StateFormat[state.format.name],
        _native.Root[code.root],
        step.rounding == "stochastic",
        step.seed,
        (step.gradient_scale, decay, *rule.scalars(step.learning_rate, step.number)),
        state.units,
        _address(state.remainder),
        _array("first", state.arrays, _SIGNED),
        _array("second", state.arrays, _UNSIGNED),
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
        code.threads,
    )
    return Sums(*sums)


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


def add_squares(lanes: torch.Tensor, values: torch.Tensor) -> None:
    """Adds the squares of `values`, fp32 or bf16, to the sums in `lanes`, fp32 [4, 8 or 16]: element i of a vector to lane i,
    as PyTorch's norms do. A vector has as many bytes as the lanes; the values fill whole ones."""
    _native.add_squares(_address(lanes), lanes.numel(), _address(values), _DTYPES[values.dtype], values.numel())


def sum_of_squares(lanes: torch.Tensor, rest: torch.Tensor) -> float:
    """Of the lanes, and of values that fill no vector."""
    return _native.sum_of_squares(_address(lanes), lanes.numel(), _address(rest), _DTYPES[rest.dtype], rest.numel())


def masters(weights: torch.Tensor, remainder: torch.Tensor | None) -> torch.Tensor:
    """fp32 masters of stored weights; remainder: int16, the lower halves, of bf16 weights that have them."""
    if remainder is None:
        return weights.float()
    return ((weights.view(torch.int16).int() << 16) + remainder).view(torch.float32)


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
    if not memory.is_cpu or not memory.is_contiguous():
        raise ValueError(f"expected a contiguous tensor on the CPU, found {memory.device} {tuple(memory.shape)}")
    return memory.data_ptr()


def _array(name: str, arrays: Mapping[str, Address], table: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return (_address(arrays.get(name, 0)), _address(arrays.get(f"{name}_scales", 0)), *(t.data_ptr() for t in table))


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
    _native.square_roots(instructions, _native.Root[root], _address(x), result.data_ptr(), x.numel())
    return result


def _root_of_torch() -> str:
    x = torch.linspace(1e-3, 1.0, 1024)
    return next((root for root in ROOTS if square_root(x, root).equal(x.sqrt())), "ieee")


_SIGNED, _UNSIGNED = _with_bounds(code_table(True)), _with_bounds(code_table(False))
ROOT: str = _root_of_torch()
"""The square root of this process's PyTorch, one of `ROOTS`."""
