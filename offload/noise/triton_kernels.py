"""The pass of `finetune.offload.noise.noise` on accelerators, in Triton: the same words, the same single fp32 operations, the
same bits.

Nothing may be fused (`enable_fp_fusion=False`), roots are IEEE's, constants are the nearest fp32. A program does `TILE`
elements: of every span of 128, word w of their counters' 64 (normals) gives elements w and w + 64, so elements are held as
two halves.
Imported only where there is an accelerator: PyTorch for CUDA, ROCm and Intel GPUs brings Triton along.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from finetune.offload.devices.triton_rounding import ROUNDED_TO, put, rounded
from finetune.offload.noise.noise import ROUNDINGS, Group, Parameter, Target

TILE = 2048
_RADEMACHER, _GAUSSIAN = 0, 1
_EXACT, _NEAREST, _STOCHASTIC = range(len(ROUNDINGS))
_ANGLE = tl.constexpr(float.fromhex("0x1.921fb6p-32"))  # a quarter turn in units of 2^-30


@triton.jit
def _philox(counters, parameter, seed):
    """The four words of each counter, uint32 like `counters`, int64 [n]."""
    high = (counters >> 32).to(tl.uint32)
    zero = high * 0
    parameter_low = zero + (parameter & 0xFFFFFFFF).to(tl.uint32)
    parameter_high = zero + ((parameter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key_low = zero + (seed & 0xFFFFFFFF).to(tl.uint32)
    key_high = zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    low = (counters & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox_impl(low, high, parameter_low, parameter_high, key_low, key_high)


@triton.jit
def _words(first_counter, parameter, seed, NUM: tl.constexpr):
    """All words of counters first_counter ... + NUM / 4, in order: uint32 [NUM]."""
    counters = first_counter + tl.arange(0, NUM // 4).to(tl.int64)
    a, b, c, d = _philox(counters, parameter, seed)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [NUM])


@triton.jit
def _signs(a, b, SPANS: tl.constexpr):
    """+1 and -1 by the bits of two words of each of SPANS counters: fp32 [SPANS * 64]."""
    bits = (tl.join(a, b)[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
    return tl.reshape(1.0 - 2.0 * bits.to(tl.float32), [SPANS * 64])


@triton.jit
def _normals(word):
    """Box-Muller as in csrc/noise_tile.inc: two normals a word."""
    bits = (((word << 1) & 0x1FFFF) | 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    q = f * 0.285838 - 0.44111767
    q = q * f + 0.5080658
    q = q * f - 0.66516054
    q = q * f + 0.9998043
    q = q * f - 2.000009
    radius = tl.sqrt_rn((exponent - 17).to(tl.float32) * -1.3862944 + q * f)
    x = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * _ANGLE
    z = x * x
    sine = ((z * 0.008150057 - 0.16662382) * z + 0.9999985) * x
    cosine = (z * 0.040362295 - 0.4996855) * z + 0.9999882
    cosine = tl.where((word >> 31) == 1, -cosine, cosine)
    swapped = ((word >> 30) & 1) == 1
    return radius * tl.where(swapped, sine, cosine), radius * tl.where(swapped, cosine, sine)


@triton.jit
def _noise(tile, parameter, seed, KIND: tl.constexpr, TILE: tl.constexpr):
    """z of the tile's first and second halves of 64: fp32 [TILE / 2] each."""
    SPANS: tl.constexpr = TILE // 128
    if KIND == 0:
        a, b, c, d = _philox(tile * SPANS + tl.arange(0, SPANS).to(tl.int64), parameter, seed)
        return _signs(a, b, SPANS), _signs(c, d, SPANS)
    else:
        return _normals(_words(tile * (TILE // 8), parameter, seed, TILE // 2))


@triton.jit
def _rounded_at_random(theta, words, SPANS: tl.constexpr):
    """theta, fp32 [SPANS * 64], to one of its two neighbours in bfloat16; words: uint32 [SPANS, 32], two elements each."""
    shifts = (16 * tl.arange(0, 2)).to(tl.uint32)
    random = tl.reshape((words[:, :, None] >> shifts[None, None, :]) & 0xFFFF, [SPANS * 64])
    bits = theta.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return (tl.where(finite, bits + random, bits) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _put(to, mask, theta, z, coefficient):
    """A coefficient of 0 is theta itself, also where it is a negative zero."""
    put(to, tl.where(coefficient == 0.0, theta, theta + coefficient * z), mask)


# Kernels take pointers and numbers, no structures: hence the many arguments, which `move` and `_pending_on` put together.
@triton.jit
def _pass(
    source, first_element: tl.int64, end_element: tl.int64, parameter: tl.int64,
    scales, firsts, roundings, rounding_seeds, num_groups, seeds, coefficients,
    target0, target1, target_seeds, target_coefficients,
    KIND: tl.constexpr, ROUNDED_TO: tl.constexpr, TARGETS: tl.constexpr, SAME_NOISE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """firsts: int32 [groups + 1], where each group's updates begin; roundings: int32 [groups]; seeds: int64 [updates]."""
    SPANS: tl.constexpr = TILE // 128
    tile = first_element // TILE + tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE // 2)
    low = tile * TILE + (place // 64 * 128 + place % 64).to(tl.int64)
    high = low + 64
    low_mask = (low >= first_element) & (low < end_element)
    high_mask = (high >= first_element) & (high < end_element)
    low_at, high_at = low - first_element, high - first_element
    theta_low = tl.load(source + low_at, low_mask, other=0.0).to(tl.float32)
    theta_high = tl.load(source + high_at, high_mask, other=0.0).to(tl.float32)
    for group in range(num_groups):
        first, last = tl.load(firsts + group), tl.load(firsts + group + 1)
        sum_low = tl.zeros([TILE // 2], tl.float32)
        sum_high = tl.zeros([TILE // 2], tl.float32)
        if KIND == 0:
            for four in range(first, last, 4):
                part_low = tl.zeros([TILE // 2], tl.float32)
                part_high = tl.zeros([TILE // 2], tl.float32)
                for j in tl.static_range(4):
                    there = four + j < last
                    c = tl.load(coefficients + four + j, there, other=0.0)
                    z_low, z_high = _noise(tile, parameter, tl.load(seeds + four + j, there, other=0), KIND, TILE)
                    part_low, part_high = part_low + c * z_low, part_high + c * z_high
                sum_low, sum_high = sum_low + part_low, sum_high + part_high
        else:
            for j in range(first, last):
                c = tl.load(coefficients + j)
                z_low, z_high = _noise(tile, parameter, tl.load(seeds + j), KIND, TILE)
                sum_low, sum_high = sum_low + c * z_low, sum_high + c * z_high
        scale = tl.load(scales + group)
        theta_low, theta_high = theta_low * scale, theta_high * scale
        if last > first:
            theta_low, theta_high = theta_low + sum_low, theta_high + sum_high
        rounding = tl.load(roundings + group)
        if rounding == 1:
            theta_low, theta_high = rounded(theta_low, ROUNDED_TO), rounded(theta_high, ROUNDED_TO)
        if rounding == 2:
            words = _words(tile * (TILE // 8), parameter, tl.load(rounding_seeds + group), TILE // 2)
            halves = tl.permute(tl.reshape(words, [SPANS, 2, 32]), [0, 2, 1])
            words_low, words_high = tl.split(halves)
            theta_low = _rounded_at_random(theta_low, words_low, SPANS)
            theta_high = _rounded_at_random(theta_high, words_high, SPANS)
    z_low, z_high = _noise(tile, parameter, tl.load(target_seeds), KIND, TILE)
    c = tl.load(target_coefficients)
    _put(target0 + low_at, low_mask, theta_low, z_low, c)
    _put(target0 + high_at, high_mask, theta_high, z_high, c)
    if TARGETS == 2:
        if not SAME_NOISE:
            z_low, z_high = _noise(tile, parameter, tl.load(target_seeds + 1), KIND, TILE)
        c = tl.load(target_coefficients + 1)
        _put(target1 + low_at, low_mask, theta_low, z_low, c)
        _put(target1 + high_at, high_mask, theta_high, z_high, c)


def move(
    kind: str,
    parameter: Parameter,
    source: torch.Tensor,
    pending: Sequence[Group],
    targets: Sequence[Target],
    first_element: int,
) -> None:
    """`finetune.offload.noise.noise.move` of one or two targets, for signs and normals, all on one accelerator; checked
    there."""
    if not source.numel() or not targets:
        return
    device = source.device
    num_tiles = -(-(first_element + source.numel()) // TILE) - first_element // TILE
    _pass[(num_tiles,)](
        source, first_element, first_element + source.numel(), _signed(parameter.key),
        *_pending_on(tuple(pending), device),
        targets[0].tensor, targets[-1].tensor,
        torch.tensor([_signed(t.seed) for t in targets], dtype=torch.int64, device=device),
        torch.tensor([t.coefficient for t in targets], dtype=torch.float32, device=device),
        KIND=_GAUSSIAN if kind == "gaussian" else _RADEMACHER, ROUNDED_TO=ROUNDED_TO[parameter.stored_dtype],
        TARGETS=len(targets), SAME_NOISE=targets[0].seed == targets[-1].seed, TILE=TILE, enable_fp_fusion=False,
    )  # fmt: skip


@lru_cache(maxsize=4)
def _pending_on(pending: tuple[Group, ...], device: torch.device) -> tuple[torch.Tensor | int, ...]:
    """The groups as the kernel takes them; they are the same for every tensor of a step."""

    def on_device(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values or [0], dtype=dtype, device=device)

    updates = [update for group in pending for update in group.updates]
    firsts = [0]
    for group in pending:
        firsts.append(firsts[-1] + len(group.updates))
    return (
        on_device([group.scale for group in pending], torch.float32),
        on_device(firsts, torch.int32),
        on_device([ROUNDINGS.index(group.rounding) for group in pending], torch.int32),
        on_device([_signed(group.rounding_seed) for group in pending], torch.int64),
        len(pending),
        on_device([_signed(update.seed) for update in updates], torch.int64),
        on_device([update.coefficient for update in updates], torch.float32),
    )


def _signed(number: int) -> int:
    """The 64 bits of `number` as a signed integer, which is what Triton takes."""
    return number - (1 << 64) if number >= 1 << 63 else number
