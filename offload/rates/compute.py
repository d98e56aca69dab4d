"""What a processor or an accelerator computes in a second, measured with the operations that models run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional

from finetune.memory.machine import AttentionRate, ProductRate, Products
from finetune.memory.units import MIB
from finetune.offload.devices import Device, Direction
from finetune.offload.noise.noise import Noise, Parameter, Target, move
from finetune.offload.rates.timing import seconds_of
from finetune.offload.update.kernels import PieceState, Segment, StateFormat, Step, update
from finetune.offload.update.rules import OPTIMIZERS

PATIENCE = 8  # rows or tokens go up until one operation takes so many times the seconds that it is given
NOISE_RANK = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is multiplied. A weight that is streamed is not in a cache when its product begins: so each size has many weights,
    which take turns."""

    shapes: tuple[tuple[int, int], ...] = ((2048, 2048), (4096, 4096))  # [out, in] of weights
    rows: tuple[int, ...] = (1, 8, 64, 256, 512, 2048)
    lengths: tuple[int, ...] = (128, 512, 2048)  # of sequences
    weight_bytes: int = 256 * MIB  # of the weights of a size, together
    elements: int = 4 * MIB  # of an operation on all elements of an activation, of a pass of noise and of an update


HEADS, HEAD_SIZE = 16, 64


def measure_products(
    device: Device, dtype: torch.dtype, sizes: Sizes, seconds: float, gradients: Sequence[str] = ("input", "weight")
) -> list[Products]:
    """seconds: of each number of rows. gradients: of what they are wanted."""
    tables = []
    for out_features, in_features in sizes.shapes:
        one_bytes = out_features * in_features * dtype.itemsize
        count = max(1, sizes.weight_bytes // one_bytes)
        shape = (count, out_features, in_features)
        weights = torch.empty(shape, dtype=dtype, device=device.torch_device)
        weights[0].normal_(std=in_features**-0.5)
        weights[1:] = weights[0]
        products: dict[str, Callable[[int], Callable[[], object]]] = {
            "forward": lambda rows, w=weights: _forward(w, rows),
            "input_gradient": lambda rows, w=weights: _input_gradient(w, rows),
            "weight_gradient": lambda rows, w=weights: _weight_gradient(w, rows),  # last: it overwrites one
        }
        wanted = ["forward", *(f"{name}_gradient" for name in gradients)]
        rates = {
            name: [
                ProductRate(rows=rows, flops_per_second=2 * rows * out_features * in_features / taken)
                for rows, taken in _rising(sizes.rows, products[name], device, seconds)
            ]
            for name in wanted
        }
        name = _name(dtype)
        tables.append(Products(dtype=name, out_features=out_features, in_features=in_features, **rates))
    return tables


def _rising(
    numbers: Iterable[int], make: Callable[[int], Callable[[], object]], device: Device, seconds: float
) -> Iterable[tuple[int, float]]:
    """Seconds of what `make` gives for each of these numbers, until that takes too long: beyond, rates hardly change."""
    for number in numbers:
        taken = seconds_of(make(number), device, seconds)
        yield number, taken
        if taken > PATIENCE * seconds:
            return


def _forward(weights: Tensor, rows: int) -> Callable[[], object]:
    turns, x = cycle(weights), weights.new_ones(rows, weights.shape[2])
    return lambda: functional.linear(x, next(turns))


def _input_gradient(weights: Tensor, rows: int) -> Callable[[], object]:
    turns, g = cycle(weights), weights.new_ones(rows, weights.shape[1])
    return lambda: g.mm(next(turns))


def _weight_gradient(weights: Tensor, rows: int) -> Callable[[], object]:
    x, g, target = weights.new_ones(rows, weights.shape[2]), weights.new_ones(rows, weights.shape[1]), weights[-1]
    return lambda: torch.mm(g.t(), x, out=target)  # memory that is there, as the engine's tensors have it


def measure_attention(device: Device, dtype: torch.dtype, sizes: Sizes, seconds: float) -> list[AttentionRate]:
    def inputs(length: int) -> list[Tensor]:
        shape = (1, HEADS, length, HEAD_SIZE)
        return [torch.randn(shape, device=device.torch_device).to(dtype).requires_grad_() for _ in range(3)]

    def forward(length: int) -> Callable[[], object]:
        q, k, v = inputs(length)

        @torch.no_grad()
        def call() -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return call

    def backward(length: int) -> Callable[[], object]:
        q, k, v = inputs(length)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        g = torch.ones_like(y)
        return lambda: torch.autograd.grad(y, (q, k, v), g, retain_graph=True)

    pairs = zip(
        _rising(sizes.lengths, forward, device, seconds),
        _rising(sizes.lengths, backward, device, seconds),
        strict=False,
    )
    return [
        AttentionRate(
            dtype=_name(dtype),
            length=length,
            forward_flops_per_second=4 * length**2 * HEADS * HEAD_SIZE / taken,
            backward_flops_per_second=10 * length**2 * HEADS * HEAD_SIZE / backward_taken,
        )
        for (length, taken), (_, backward_taken) in pairs
    ]


def measure_elementwise(device: Device, dtype: torch.dtype, sizes: Sizes, seconds: float) -> float:
    """Bytes per second: two activations multiplied to a third."""
    x = torch.ones(sizes.elements, dtype=dtype, device=device.torch_device)
    y, z = torch.ones_like(x), torch.empty_like(x)
    return 3 * x.nbytes / seconds_of(lambda: torch.mul(x, y, out=z), device, seconds)


def measure_operation(device: Device, seconds: float) -> float:
    """Seconds of an operation on 16 numbers."""
    x = torch.ones(16, device=device.torch_device)
    return seconds_of(lambda: x + x, device, seconds)


def measure_copies(device: Device, num_bytes: int, seconds: float) -> tuple[float | None, float | None]:
    """Bytes per second from the host to the device and back, from and to memory as the engine's slots have it. None: they take
    no time."""
    if device.shares_host_memory:
        return None, None
    there, here = device.allocate_slab(num_bytes), device.allocate_host_slab(num_bytes).fill_(1)

    def to_device() -> None:
        device.synchronize(device.copy_async(there, here, Direction.H2D))

    def to_host() -> None:
        device.synchronize(device.copy_async(here, there, Direction.D2H))

    rates = tuple(num_bytes / seconds_of(copy, device, seconds) for copy in (to_device, to_host))
    device.free_slab(there)
    return rates


def measure_memory_copy(device: Device, num_bytes: int, seconds: float) -> float:
    """Bytes per second from host memory to host memory."""
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
    return num_bytes / seconds_of(lambda: target.copy_(source), device, seconds)


def measure_noise(
    device: Device, dtype: torch.dtype, kinds: Iterable[str], sizes: Sizes, seconds: float
) -> dict[str, float]:
    """Elements per second, by kind. kinds: of `finetune.offload.noise.noise.Noise`. Empty where nothing runs our kernels."""
    if device.traits.kernels is None:
        return {}
    source = torch.ones(sizes.elements, dtype=dtype, device=device.torch_device)
    target = torch.empty_like(source)
    rates = {}
    for kind in kinds:
        noise = Noise(kind, NOISE_RANK if kind == "low_rank" else 0)

        def call(noise: Noise = noise) -> None:
            move(noise, Parameter(5, sizes.shapes[0][1]), source, (), [Target(target, 9, 1e-3)])

        rates[kind] = source.numel() / seconds_of(call, device, seconds)
    return rates


def measure_updates(
    host: Device, dtype: torch.dtype, rules: Iterable[str], sizes: Sizes, seconds: float
) -> dict[str, float]:
    """Elements per second, by optimizer: fp32 state and masters, gradients in the weights' dtype. Of those that are one kernel;
    the others' matrices come on top."""
    rates = {}
    gradient = torch.full((sizes.elements,), 1e-3, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    for name in rules:
        rule, weights = OPTIMIZERS[name](), torch.ones(sizes.elements, dtype=dtype)
        form = StateFormat("float32")
        arrays = {
            key: torch.zeros(size, dtype=torch.uint8) for key, size in form.array_bytes(rule, sizes.elements).items()
        }
        remainder = torch.zeros(sizes.elements, dtype=torch.int16) if dtype == torch.bfloat16 else 0
        segment = Segment(0, sizes.elements, weights, dtype, gradient, gradient.dtype, torch.empty_like(weights))
        state = PieceState(sizes.elements, arrays, form, remainder)

        def call(rule=rule, segment=segment, state=state) -> None:
            update(rule, Step(5, 1e-9), [segment], state)

        rates[name] = sizes.elements / seconds_of(call, host, seconds)
    return rates


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
