"""How long this machine takes to change one weight: to update it with an optimizer, or to make its variants."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from finetune.offload.noise.noise import Group, Noise, Parameter, Target, move
from finetune.offload.update.kernels import PieceState, Segment, Step, checksum, update
from finetune.offload.update.rules.rule import Rule
from finetune.offload.update.stream import Keeping

ELEMENTS = 1 << 20  # of the sample: larger than what caches near the cores hold
COLUMNS = 1 << 10
REPEATS = 5


def update_seconds(rule: Rule, keeping: Keeping, stored: torch.dtype, computed: torch.dtype) -> float:
    """Of one weight: the kernel and the checksums of what is read and written. stored: dtype of weights. computed: of
    gradients."""
    sizes = keeping.state.array_bytes(rule, ELEMENTS)
    whole = keeping.masters and stored == torch.float16
    weights = torch.zeros(ELEMENTS, dtype=torch.float32 if whole else stored)
    gradients = torch.full((ELEMENTS,), 1e-3, dtype=computed)
    arrays = {name: torch.zeros(num_bytes, dtype=torch.uint8) for name, num_bytes in sizes.items()}
    remainder = torch.zeros(ELEMENTS, dtype=torch.int16) if keeping.masters and weights.dtype == torch.bfloat16 else 0
    state = PieceState(ELEMENTS, arrays, keeping.state, remainder)
    segment = Segment(0, ELEMENTS, weights, weights.dtype, gradients, gradients.dtype, torch.empty_like(weights))
    step = Step(5, 1e-5, rounding="nearest" if keeping.masters else "stochastic")
    kept = [*arrays.values(), *([remainder] if isinstance(remainder, torch.Tensor) else [])]

    def run() -> None:
        update(rule, step, [segment], state)
        for tensor in (weights, *kept, *kept):  # written, and read
            checksum(tensor, tensor.nbytes, torch.get_num_threads())

    return _median(run) / ELEMENTS


def variant_seconds(
    noise: Noise, pending: Sequence[Group], seeds: Sequence[int], together: int, stored: torch.dtype, computed: torch.dtype
) -> float:
    """Of one weight: to make all variants of a step, `together` of a seed in one pass. pending: updates that come first."""
    source = torch.zeros(ELEMENTS, dtype=stored)
    targets = [torch.empty(ELEMENTS, dtype=computed) for _ in range(together)]
    parameter = Parameter(1, COLUMNS, stored)

    def run() -> None:
        for seed in seeds:
            move(noise, parameter, source, pending, [Target(target, seed, 1e-3) for target in targets])

    return _median(run) / ELEMENTS


def _median(run: Callable[[], None]) -> float:
    """The median of some runs, after one that does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[REPEATS // 2]
