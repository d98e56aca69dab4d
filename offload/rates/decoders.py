"""How fast packed weights become numbers: of each format a matrix that is made up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finetune.offload.devices import Device
from finetune.offload.rates.timing import seconds_of
from finetune.offload.weights.formats import FORMATS, PlainTensor, Stored, StoredWeight
from finetune.offload.weights.formats.awq import PackedAwq
from finetune.offload.weights.formats.bitsandbytes import Packed4Bit, Packed8Bit, Span
from finetune.offload.weights.formats.bitsandbytes_files import State4Bit
from finetune.offload.weights.formats.compressed_tensors import CompressedTensor
from finetune.offload.weights.formats.compressed_tensors_config import Scheme
from finetune.offload.weights.formats.fp8 import BlockFP8
from finetune.offload.weights.formats.gguf import GgufTensor
from finetune.offload.weights.formats.gptq import PackedGptq
from finetune.offload.weights.formats.lossless import LosslessWeight
from finetune.offload.weights.formats.lossless import Span as LosslessSpan
from finetune.offload.weights.formats.lossless_code import CHUNK, code_lengths, count_exponents, encode, room_bytes
from finetune.offload.weights.formats.mxfp4 import MXFP4Experts
from finetune.offload.weights.formats.scaled import RowSpan

ROWS, COLUMNS = 1024, 4096  # of a matrix that is made up; multiples of every format's blocks


def measure_decoders(
    device: Device, dtype: torch.dtype, seconds: float, rows: int = ROWS, columns: int = COLUMNS
) -> dict[str, float]:
    """Weights per second to `dtype`, by the word of the format: all that are packed, as most checkpoints have them (4 bits in
    groups of 128; of GGUF Q4_K); and what is converted from bf16 where it is computed otherwise."""
    rates = {}
    for form in FORMATS:
        if form is PlainTensor and dtype == torch.bfloat16 or form.needs_host and not device.traits.computes_on_host:
            continue
        weight, stored = SAMPLES[form](rows, columns)
        rates[weight.word] = measure_decoder(weight, stored, device, dtype, seconds)
    return rates


def measure_decoder(weight: StoredWeight, stored: Stored, device: Device, dtype: torch.dtype, seconds: float) -> float:
    """Weights per second to `dtype` on the device. stored: in host memory."""
    target = torch.empty(weight.shape, dtype=dtype, device=device.torch_device)
    there = device.torch_device
    moved = stored.to(there) if isinstance(stored, Tensor) else {part: x.to(there) for part, x in stored.items()}
    return target.numel() / seconds_of(lambda: weight.decode(moved, dtype, target), device, seconds)


def filled(weight: StoredWeight) -> tuple[StoredWeight, Stored]:
    """With bytes for its tensors."""
    return weight, weight.load(_random)


def _random(tensor: PlainTensor) -> Tensor:
    """Scales that are numbers, codes that are any."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        return torch.rand(tensor.shape).to(tensor.dtype)
    codes = torch.randint(0, 120, (tensor.num_bytes,), dtype=torch.uint8)  # 127 and 255 are no numbers in FP8
    return codes.view(tensor.dtype).view(tensor.shape)


def _plain(dtype: torch.dtype, *shape: int) -> PlainTensor:
    return PlainTensor(dtype, shape, ())


def _grouped(form: type, rows: int, columns: int, codes: tuple[int, int], *more: object) -> StoredWeight:
    groups, words = columns // 128, rows // 8
    return form(
        _plain(torch.int32, *codes), _plain(torch.int32, groups, words), _plain(torch.float16, groups, rows), None,
        (rows, columns), 4, 128, ((0, rows),), *more,
    )  # fmt: skip


def _nf4(rows: int, columns: int) -> Packed4Bit:
    count = rows * columns
    packed, absmax = _plain(torch.uint8, count // 2), _plain(torch.float32, count // 64)
    state = State4Bit("nf4", 64, torch.bfloat16)
    return Packed4Bit(packed, absmax, None, None, (rows, columns), state, (Span(0, count),))


def _compressed(rows: int, columns: int) -> CompressedTensor:
    scheme, span = Scheme(4, False, True, True, "group", (1, 128), False), (RowSpan(0, rows),)
    words, scales = _plain(torch.int32, rows, columns // 8), _plain(torch.bfloat16, rows, columns // 128)
    return CompressedTensor(words, scales, None, None, (rows, columns), scheme, (1, 128), span, span)


def _fp8(rows: int, columns: int) -> BlockFP8:
    scales = _plain(torch.float32, rows // 128, columns // 128)
    return BlockFP8(_plain(torch.float8_e4m3fn, rows, columns), scales, (128, 128), (RowSpan(0, rows),))


def _mxfp4(rows: int, columns: int) -> MXFP4Experts:
    return MXFP4Experts(_plain(torch.uint8, 1, rows, columns // 32, 16), _plain(torch.uint8, 1, rows, columns // 32))


def _lossless(rows: int, columns: int) -> tuple[LosslessWeight, Stored]:
    """Of numbers that are spread as weights are, with a code of their own."""
    numbers = torch.empty(rows * columns).normal_(std=0.02).bfloat16()
    lengths = torch.tensor(code_lengths(count_exponents(numbers).tolist()), dtype=torch.uint8)
    packed = torch.empty(room_bytes(numbers.numel(), CHUNK), dtype=torch.uint8)
    sizes = encode(numbers, lengths, CHUNK, 0, packed)
    stored = {"packed": packed[: sum(sizes)], "offsets": torch.tensor([0, *sizes]).cumsum(0), "code": lengths}
    parts = (_plain(tensor.dtype, *tensor.shape) for tensor in stored.values())
    span = LosslessSpan(0, numbers.numel(), 0, 0, sum(sizes))
    return LosslessWeight(*parts, (rows, columns), CHUNK, numbers.numel(), (span,)), stored


def _gguf(rows: int, columns: int) -> GgufTensor:
    return GgufTensor(_plain(torch.uint8, rows, columns // 256 * 144), (rows, columns), "Q4_K")


def _int8(rows: int, columns: int) -> Packed8Bit:
    return Packed8Bit(_plain(torch.int8, rows, columns), _plain(torch.float32, rows))


SAMPLES: dict[type[StoredWeight], Callable[[int, int], tuple[StoredWeight, Stored]]] = {
    GgufTensor: lambda *shape: filled(_gguf(*shape)),
    Packed4Bit: lambda *shape: filled(_nf4(*shape)),
    Packed8Bit: lambda *shape: filled(_int8(*shape)),
    BlockFP8: lambda *shape: filled(_fp8(*shape)),
    CompressedTensor: lambda *shape: filled(_compressed(*shape)),
    PackedGptq: lambda rows, columns: filled(_grouped(PackedGptq, rows, columns, (columns // 8, rows), True)),
    PackedAwq: lambda rows, columns: filled(_grouped(PackedAwq, rows, columns, (columns, rows // 8))),
    MXFP4Experts: lambda *shape: filled(_mxfp4(*shape)),
    LosslessWeight: _lossless,
    PlainTensor: lambda *shape: filled(_plain(torch.bfloat16, *shape)),
}
"""Of every format, a matrix of so many rows and columns that is made up, and its bytes."""
