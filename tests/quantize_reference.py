"""How bitsandbytes quantises, in NumPy from its published formats, a number at a time where that shows the rule."""

from __future__ import annotations

import numpy as np
import torch

NF4 = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833234,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
ONE = np.float32(1)


def nf4(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Packed bytes, and absmax of each block of 64."""
    flat = weight.float().numpy().reshape(-1)
    between = (NF4[:-1] + NF4[1:]) / np.float32(2)
    codes, absmax = [], []
    for start in range(0, flat.size, 64):
        block = flat[start : start + 64]
        largest = np.abs(block).max()
        divisor = max(largest, np.float32(1e-38))
        if block.size == 64:
            scaled, largest = block * (ONE / divisor), largest
        else:
            scaled, largest = block / divisor, divisor
        # At the middle between two codes the lower one is taken.
        codes += [int((between < number).sum()) for number in np.clip(scaled, -ONE, ONE)]
        absmax.append(largest)
    codes += [7] * (len(codes) % 2)
    return np.uint8([high * 16 + low for high, low in zip(codes[::2], codes[1::2], strict=True)]), np.float32(absmax)


def nested_numbers() -> np.ndarray:
    """The signed dynamic type: 0, 1, and in each of seven decades the middles of equal parts of [0.1, 1]."""
    positive = []
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        positive += list((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    return np.sort(np.float32([0, 1, *positive, *(-number for number in positive)]))


def nested(absmax: np.ndarray, offset: float, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """absmax less offset in 8 bits, and the largest of each 256. numbers: the map, ascending."""
    between = np.float32(0.5) * (numbers[:-1] + numbers[1:])
    codes, tops = [], []
    for start in range(0, absmax.size, 256):
        group = absmax[start : start + 256] - np.float32(offset)
        top = np.abs(group).max()
        tops.append(top)
        for number in group if top else ():
            scaled = np.clip(number * (ONE / top), -ONE, ONE)
            half = (scaled + ONE) * np.float32(0.5)
            step = int(np.float32(float(half) * 65535 + 0.5))  # one of 65536, rounded once
            codes.append(int((between < np.float32(2 * step) / np.float32(65535) - ONE).sum()))
        codes += [0] * (0 if top else group.size)
    return np.uint8(codes), np.float32(tops)


def int8(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, by way of fp16."""
    rows = weight.half().float().numpy()
    tops = np.abs(rows).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = rows * (ONE / tops * np.float32(127))[:, None]
    return np.rint(np.where(tops[:, None] > 0, scaled, 0)).astype(np.int8), tops
