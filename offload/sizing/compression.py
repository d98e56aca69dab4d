"""What compressing a model without loss would give and take: from a sample of its weights, on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetune.memory.errors import UserError
from finetune.memory.machine import ComputeRates
from finetune.offload.weights.compress import is_compressible
from finetune.offload.weights.formats import PlainTensor, quantization_of
from finetune.offload.weights.formats.lossless import LosslessWeight
from finetune.offload.weights.formats.lossless_code import (
    CHUNK,
    code_lengths,
    count_exponents,
    decode,
    encode,
    room_bytes,
)
from finetune.offload.weights.parts import ModelParts

SAMPLES = 8  # matrices, of blocks that are evenly spaced
SAMPLE_NUMBERS = 1 << 18  # of each, at most
PROBE_NUMBERS = 1 << 20  # that are decoded to see how fast that is
PROBES = 12


@dataclass(frozen=True, slots=True)
class Compression:
    """What was found."""

    share: float
    """Of the bytes of a compressed matrix, what is left."""
    decoded_bytes_per_second: float
    """Of bf16, by all threads."""
    model_bytes: int
    """Of the whole model, compressed."""
    block_bytes: tuple[int, ...]
    """Of each block, compressed."""
    weight_bytes: tuple[tuple[int, ...], ...]
    """Of each block's compressed matrices, decoded, the largest first."""

    def decoded_at(self, rates: ComputeRates) -> Compression | None:
        """On a machine that is not here. None: it has no rate of decoding them."""
        rate = rates.decoded_weights_per_second.get(LosslessWeight.word)
        return None if rate is None else replace(self, decoded_bytes_per_second=rate * torch.bfloat16.itemsize)


def try_compression(parts: ModelParts) -> Compression | None:
    """None where nothing can be compressed, or the weights cannot be read."""
    weights = [[w for w in layout.weights.values() if is_compressible(w)] for layout in parts.layouts]
    found = [block[0] for block in weights if block]
    if quantization_of(parts.model.config) is not None or not found:
        return None
    try:
        samples = [_read(weight) for weight in found[:: -(-len(found) // SAMPLES)]]
    except (OSError, UserError):
        return None
    numbers = bits = 0
    for sample in samples:
        counts = count_exponents(sample).tolist()
        bits += sum(count * length for count, length in zip(counts, code_lengths(counts), strict=True))
        numbers += sample.numel()
    # Sign and fraction of a number are a byte, and a chunk has 24 of its own.
    share = (numbers + bits / 8 + 24 * numbers / CHUNK) / (2 * numbers)
    saved = 1 - share
    everything = {weight.extents[0]: weight for weight in parts.sources.values() if is_compressible(weight)}
    return Compression(
        share,
        _decode_rate(samples[0]),
        parts.checkpoint.num_bytes - int(saved * sum(weight.num_bytes for weight in everything.values())),
        tuple(
            layout.num_bytes - int(saved * sum(weight.num_bytes for weight in block))
            for layout, block in zip(parts.layouts, weights, strict=True)
        ),
        tuple(tuple(sorted((weight.num_bytes for weight in block), reverse=True)) for block in weights),
    )


def _read(weight: PlainTensor) -> Tensor:
    """Numbers from a matrix's middle, bf16."""
    numbers = min(SAMPLE_NUMBERS, weight.num_bytes // 2)
    extent = weight.extents[0]
    buffer = torch.empty(numbers, dtype=torch.bfloat16)
    with open(extent.path, "rb", buffering=0) as file:
        file.seek(extent.file_offset + (weight.num_bytes // 2 - numbers) // 2 * 2)
        if file.readinto(buffer.view(torch.uint8).numpy()) != buffer.nbytes:
            raise OSError(f"{extent.path} ends early")
    return buffer


def _decode_rate(sample: Tensor) -> float:
    numbers = sample.repeat(-(-PROBE_NUMBERS // sample.numel()))[:PROBE_NUMBERS].contiguous()
    lengths = torch.tensor(code_lengths(count_exponents(numbers).tolist()), dtype=torch.uint8)
    packed = torch.empty(room_bytes(numbers.numel(), CHUNK), dtype=torch.uint8)
    sizes = encode(numbers, lengths, CHUNK, 0, packed)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    stored = {"code": lengths, "offsets": offsets, "packed": packed[: sum(sizes)]}
    target, seconds = torch.empty_like(numbers), []
    for _ in range(PROBES):
        started = time.perf_counter()
        decode(stored, CHUNK, numbers.numel(), 0, numbers.numel(), target)
        seconds.append(time.perf_counter() - started)
    return numbers.nbytes / min(seconds)
