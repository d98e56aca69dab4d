"""The block types of GGUF: bytes to numbers, in portable torch. The bits are those of `gguf.quants.dequantize`.

[Note: GGUF blocks]
A row is cut into blocks, of 32 elements or, in the K types and IQ4_XS, 256. A block has fp16 scales and codes of 2 to 8 bits.
In the K types, each 16 or 32 elements have a scale (and a minimum) of 4 or 6 bits, in units of the block's. All sums and
products are in fp32, one rounded after the other.

Source: `ggml/src/ggml-quants.c` and `ggml-common.h`, whose layouts `gguf/quants.py` has in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_IQ4_CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _parts(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """uint8 [blocks, bytes] -> [blocks, size] for each size, and the rest."""
    return blocks.split([*sizes, blocks.shape[1] - sum(sizes)], dim=1)


def _half(part: Tensor) -> Tensor:
    """fp16 in bytes [blocks, 2] -> fp32 [blocks, 1]."""
    return part.contiguous().view(torch.float16).float()


def _fields(part: Tensor, bits: int, width: int) -> Tensor:
    """Codes of so many bits: of each `width` bytes the lowest, then the next higher: uint8 [blocks, codes]."""
    groups = part.view(part.shape[0], -1, width)
    mask = (1 << bits) - 1
    found = [(groups >> shift) & mask if shift else groups & mask for shift in range(0, 8, bits)]
    return torch.stack(found, 2).view(part.shape[0], -1)


def _bits(part: Tensor) -> Tensor:
    """[blocks, bytes] -> [blocks, 8 bytes], the lowest bit of a byte first: uint8."""
    return torch.stack([(part >> shift) & 1 for shift in range(8)], 2).view(part.shape[0], -1)


def _q4_0(blocks: Tensor) -> Tensor:
    scale, codes = _parts(blocks, 2)
    return _fields(codes.contiguous(), 4, 16).float().sub_(8).mul_(_half(scale))


def _q4_1(blocks: Tensor) -> Tensor:
    scale, minimum, codes = _parts(blocks, 2, 2)
    return _fields(codes.contiguous(), 4, 16).float().mul_(_half(scale)).add_(_half(minimum))


def _q5_0(blocks: Tensor) -> Tensor:
    scale, high, low = _parts(blocks, 2, 4)
    return (_fields(low.contiguous(), 4, 16) | (_bits(high) << 4)).float().sub_(16).mul_(_half(scale))


def _q5_1(blocks: Tensor) -> Tensor:
    scale, minimum, high, low = _parts(blocks, 2, 2, 4)
    return (_fields(low.contiguous(), 4, 16) | (_bits(high) << 4)).float().mul_(_half(scale)).add_(_half(minimum))


def _q8_0(blocks: Tensor) -> Tensor:
    scale, codes = _parts(blocks, 2)
    return codes.view(torch.int8).float().mul_(_half(scale))


def _scaled(codes: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """codes: fp32 [blocks, 256]; scales, minima: fp32 [blocks, parts of a block] -> fp32 [blocks, 256]."""
    numbers = codes.view(*scales.shape, -1).mul_(scales[:, :, None])
    if minima is not None:
        numbers.sub_(minima[:, :, None])
    return numbers.view(codes.shape)


def _q2_k(blocks: Tensor) -> Tensor:
    parts, codes, scale, minimum = _parts(blocks, 16, 64, 2)
    scales, minima = _half(scale) * (parts & 15).float(), _half(minimum) * (parts >> 4).float()
    return _scaled(_fields(codes.contiguous(), 2, 32).float(), scales, minima)


def _q3_k(blocks: Tensor) -> Tensor:
    high, low, parts, scale = _parts(blocks, 32, 64, 12)
    low_scales, high_scales = _parts(parts, 8)
    scales = _fields(low_scales.contiguous(), 4, 8) | (_fields(high_scales.contiguous(), 2, 4) << 4)
    # A high bit that is not set stands for -4.
    codes = _fields(low.contiguous(), 2, 32).float().add_(_fields(high.contiguous(), 1, 32).float().sub_(1).mul_(4))
    return _scaled(codes, scales.float().sub_(32).mul_(_half(scale)))


def _six_bits(parts: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima of Q4_K and Q5_K, 6 bits each in [blocks, 12] bytes -> two of fp32 [blocks, 8]."""
    first, second, third = parts.split(4, dim=1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], 1)
    return scales.float(), minima.float()


def _q4_k(blocks: Tensor) -> Tensor:
    scale, minimum, parts, codes = _parts(blocks, 2, 2, 12)
    scales, minima = _six_bits(parts)
    return _scaled(_fields(codes.contiguous(), 4, 32).float(), scales.mul_(_half(scale)), minima.mul_(_half(minimum)))


def _q5_k(blocks: Tensor) -> Tensor:
    scale, minimum, parts, high, low = _parts(blocks, 2, 2, 12, 32)
    scales, minima = _six_bits(parts)
    codes = _fields(low.contiguous(), 4, 32) | (_fields(high.contiguous(), 1, 32) << 4)
    return _scaled(codes.float(), scales.mul_(_half(scale)), minima.mul_(_half(minimum)))


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, parts, scale = _parts(blocks, 128, 64, 16)
    codes = _fields(low.contiguous(), 4, 64) | (_fields(high.contiguous(), 2, 32) << 4)
    scales = parts.contiguous().view(torch.int8).float().mul_(_half(scale))
    return _scaled(codes.float().sub_(32), scales)


def _iq4_nl(blocks: Tensor) -> Tensor:
    scale, codes = _parts(blocks, 2)
    return iq4_table(blocks.device)[_fields(codes.contiguous(), 4, 16).int()].mul_(_half(scale))


def _iq4_xs(blocks: Tensor) -> Tensor:
    scale, high, low, codes = _parts(blocks, 2, 2, 4)
    low_scales = torch.stack([low & 15, low >> 4], 2).view(-1, 8)
    high_scales = torch.stack([(high >> shift) & 3 for shift in range(0, 8, 2)], 2).view(-1, 8)
    scales = (low_scales | (high_scales << 4)).float().sub_(32).mul_(_half(scale))
    return _scaled(iq4_table(blocks.device)[_fields(codes.contiguous(), 4, 16).int()], scales)


@cache
def iq4_table(device: torch.device) -> Tensor:
    """The number of every code of the IQ4 types, fp32 [16]."""
    return torch.tensor(_IQ4_CODES, dtype=torch.float32, device="cpu").to(device)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
"""Block type -> uint8 [blocks, bytes] -> fp32 [blocks, elements]."""
