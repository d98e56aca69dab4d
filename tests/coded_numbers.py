"""Numbers in bf16 of many kinds, and such in the lossless code."""

from __future__ import annotations

import torch

from finetune.offload.weights.formats.lossless_code import (
    CHUNK,
    code_lengths,
    count_exponents,
    decode,
    encode,
    room_bytes,
)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.int16).view(torch.bfloat16)


def draw(kind: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(count, generator=generator)
    values = {
        "weights": lambda: (normal * 0.02).bfloat16(),
        "any bits": lambda: bits(torch.randint(-(1 << 15), 1 << 15, (count,), generator=generator)),
        "one value": lambda: torch.full((count,), -1.5).bfloat16(),
        "zeros": lambda: torch.zeros(count).bfloat16(),
        "two exponents": lambda: torch.where(normal > 0, 1.0, 2.0).bfloat16(),
        "steep": lambda: (normal.double().exp() ** 9).bfloat16(),  # words as long as there can be, and longer without a limit
        "special": lambda: torch.where(normal > 1, torch.inf, torch.where(normal < -1, torch.nan, normal * 1e-39)).bfloat16(),
    }
    return values[kind]()


class Coded:
    """Numbers in the code, as a weight keeps them."""

    def __init__(self, numbers: torch.Tensor, chunk: int = CHUNK, lengths: list[int] | None = None) -> None:
        self.chunk, self.numbers = chunk, numbers.numel()
        lengths = lengths or code_lengths(count_exponents(numbers).tolist())
        self.code = torch.tensor(lengths, dtype=torch.uint8)
        room = torch.full((room_bytes(self.numbers, chunk),), 0xAA, dtype=torch.uint8)
        self.sizes = encode(numbers, self.code, chunk, 0, room)
        self.packed = room[: sum(self.sizes)]
        self.offsets = torch.tensor([0, *self.sizes]).cumsum(0)

    def decode(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        stop = self.numbers if stop is None else stop
        first, last = start // self.chunk, -(-stop // self.chunk)
        low, high = int(self.offsets[first]), int(self.offsets[last])
        stored = {"code": self.code, "offsets": self.offsets[first : last + 1], "packed": self.packed[low:high]}
        target = torch.empty(stop - start, dtype=dtype)
        decode(stored, self.chunk, self.numbers, start, stop, target)
        return target
