"""The code of `csrc/lossless.h` on tensors: the lengths of its words, chunks that are encoded, numbers that are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from finetune_native import Dtype
from finetune_native import lossless as _native
from torch import Tensor

CHUNK = _native.CHUNK
"""Numbers of a chunk, at most."""
MAX_BITS = _native.MAX_BITS
"""Of a word."""

_DTYPES = {torch.bfloat16: Dtype.bfloat16, torch.float32: Dtype.float32}


def count_exponents(numbers: Tensor) -> Tensor:
    """How often each of the 256 exponents occurs, int64. numbers: contiguous bf16."""
    return torch.tensor(_native.count_exponents(numbers.data_ptr(), numbers.numel(), torch.get_num_threads()))


def code_lengths(counts: Sequence[int], most_bits: int = MAX_BITS) -> list[int]:
    """Bits of the words of an optimal prefix code with no word longer than `most_bits`, for symbols that occur so often; 0: has
    no word. A single symbol shares the code with another, so that every code is complete.

    Source: Larmore & Hirschberg 1990, "A fast algorithm for optimal length-limited Huffman codes" (package-merge).
    """
    present = [symbol for symbol, count in enumerate(counts) if count]
    if len(present) < 2:
        present = [*present, *(symbol for symbol in (0, 1) if symbol not in present)][:2]
    leaves = sorted((max(counts[symbol], 1), (symbol,)) for symbol in present)
    level: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(most_bits):
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = sorted(leaves + packages)
    lengths = [0] * len(counts)
    for _, symbols in level[: 2 * len(leaves) - 2]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def is_complete(lengths: Sequence[int]) -> bool:
    """Whether these are the lengths of a code in which every sequence of bits means something."""
    return max(lengths) <= MAX_BITS and sum(1 << MAX_BITS - bits for bits in lengths if bits) == 1 << MAX_BITS


def room_bytes(numbers: int, chunk: int) -> int:
    """What `encode` needs to write to."""
    return -(-numbers // chunk) * (4 + 2 * chunk)


def encode(numbers: Tensor, lengths: Tensor, chunk: int, first_chunk: int, target: Tensor) -> list[int]:
    """Encodes contiguous bf16, whole chunks of a tensor or its end, from chunk `first_chunk` on. Returns the bytes of every
    chunk; they lie in `target`, uint8 with `room_bytes`, one after another. lengths: uint8 [256]."""
    threads = torch.get_num_threads()
    return _native.encode(
        lengths.data_ptr(), chunk, first_chunk, numbers.data_ptr(), numbers.numel(), target.data_ptr(), target.numel(), threads
    )


def decode(stored: dict[str, Any], chunk: int, numbers: int, start: int, stop: int, target: Tensor) -> None:
    """Numbers [start, stop) of a tensor of so many, to `target`, contiguous bf16 or fp32 [stop - start].

    stored: "code", "offsets" and "packed": uint8 whose first 256 are lengths, int64, uint8, from the chunk of `start` on and,
    of `packed`, to where that of the last number ends. Raises ValueError for what is damaged.
    """
    packed = stored["packed"]
    _native.decode(
        stored["code"].data_ptr(), chunk, stored["offsets"].data_ptr(), packed.data_ptr(), packed.numel(), numbers, start, stop,
        target.data_ptr(), _DTYPES[target.dtype], torch.get_num_threads(),
    )  # fmt: skip
