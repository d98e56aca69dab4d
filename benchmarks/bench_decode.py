"""Decoders of packed weights, to memory, against PyTorch's operations that give the same bits and against a plain copy.

    python benchmarks/bench_decode.py [--rows 24576] [--columns 4096] [--strip 512] [--seconds 1]

A matrix larger than the caches is decoded a strip of rows at a time, again and again from its start, into a target that is
allocated once, as the tensor arena does it. Each strip is timed, so that what else runs on the machine disturbs few of them: on
one thread by the time that it had the core, on all threads by the clock. Printed: billions of weights a second, the median and
the best. `copy` reads and writes the bytes of the target.

Where there is an accelerator, it decodes whole matrices of every format there instead, by our kernels and by PyTorch's
operations. Printed: billions of weights a second, the median, and how many bytes that reads and writes; `copy` as above.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from typing import NamedTuple

import torch

from finetune.memory.device_kinds import DEVICE_KINDS
from finetune.offload.devices import Device, choose_device
from finetune.offload.files.gguf_file import BLOCKS
from finetune.offload.rates.decoders import SAMPLES, filled, measure_decoder
from finetune.offload.rates.timing import seconds_of
from finetune.offload.weights.formats import PlainTensor
from finetune.offload.weights.formats.bitsandbytes import CODES
from finetune.offload.weights.formats.gguf import GgufTensor
from finetune.offload.weights.formats.gguf_blocks import DECODERS
from finetune.offload.weights.formats.native_kernels import INSTRUCTION_SETS, Codes, Scales, decode

FORMATS = ("NF4", "int8", "FP8 e4m3", "FP8 e5m2", "bfloat16", "float16")
BLOCK = 128  # of FP8


class Case(NamedTuple):
    name: str
    kernel: Callable[[int, int], object]
    """Decodes rows [start, stop)."""
    torchs: Callable[[int, int], object] | None
    """The same numbers by PyTorch's operations."""


def packed(form: str, rows: int, columns: int) -> tuple[Codes, Scales | None]:
    if form == "NF4":
        codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
        return Codes("four_bit", codes, CODES["nf4"]), Scales(torch.rand(rows, columns // 64), 64)
    if form == "int8":
        return Codes("int8", torch.randint(-127, 128, (rows, columns), dtype=torch.int8)), Scales(torch.rand(rows), columns)
    kind = {"FP8 e4m3": "float8_e4m3fn", "FP8 e5m2": "float8_e5m2"}.get(form, form)
    data = torch.empty(rows, columns, dtype=torch.bfloat16).normal_().to(getattr(torch, kind))
    return Codes(kind, data), Scales(torch.rand(rows // BLOCK, columns // BLOCK), BLOCK, BLOCK) if form[:3] == "FP8" else None


def strip_of(codes: Codes, scales: Scales | None, start: int, stop: int) -> tuple[Codes, Scales | None]:
    rows = scales.rows if scales else 1
    some = scales and scales._replace(data=scales.data[start // rows : stop // rows])
    return codes._replace(data=codes.data[start:stop]), some


def in_torch(codes: Codes, scales: Scales | None, target: torch.Tensor) -> None:
    values = codes.data
    if codes.table:
        pairs = values.int()
        values = torch.tensor(codes.table)[torch.stack([pairs >> 4, pairs & 15], -1)]
    if scales:
        some = scales.data.repeat_interleave(scales.rows, 0).view(len(target), -1, 1)
        values = values.float().view(*some.shape[:2], -1) * some
    target.copy_(values.view(target.shape))


def cases(rows: int, columns: int) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        target, source = torch.empty(rows, columns, dtype=dtype), torch.ones(rows, columns, dtype=dtype)
        yield Case(f"copy {name}", lambda a, b, to=target, x=source: to[a:b].copy_(x[a:b]), None)
        for form in FORMATS:
            codes, scales = packed(form, rows, columns)
            if scales is None and dtype != torch.float32:
                continue

            def kernel(a: int, b: int, codes=codes, scales=scales, target=target) -> None:
                some, of_them = strip_of(codes, scales, a, b)
                decode(some, of_them, target[a:b])

            def torchs(a: int, b: int, codes=codes, scales=scales, target=target) -> None:
                in_torch(*strip_of(codes, scales, a, b), target[a:b])

            yield Case(f"{form} to {name}", kernel, torchs)


def on_accelerator(device: Device, rows: int, columns: int, seconds: float) -> None:
    traits = DEVICE_KINDS[device.kind]
    forms = [form for form in SAMPLES if form not in (PlainTensor, GgufTensor) and not form.needs_host]
    samples = {form.word: SAMPLES[form](rows, columns) for form in forms}
    for word in DECODERS:
        row_bytes = columns // BLOCKS[word].elements * BLOCKS[word].num_bytes
        samples[f"GGUF {word}"] = filled(GgufTensor(PlainTensor(torch.uint8, (rows, row_bytes), ()), (rows, columns), word))
    for dtype in (torch.bfloat16, torch.float32):
        source = torch.ones(rows, columns, dtype=dtype, device=device.torch_device)
        target = torch.empty_like(source)
        rate = 2 * source.nbytes / seconds_of(lambda to=target, x=source: to.copy_(x), device, seconds)
        print(f"to {dtype}; copy: {rate / 1e9:.0f} GB/s")
        for name, (weight, stored) in samples.items():
            ours = measure_decoder(weight, stored, device, dtype, seconds)
            DEVICE_KINDS[device.kind] = replace(traits, kernels=None)
            torchs = measure_decoder(weight, stored, device, dtype, seconds)
            DEVICE_KINDS[device.kind] = traits
            moved = weight.num_bytes / (rows * columns) + dtype.itemsize
            print(f"{name:22} {ours / 1e9:7.1f}, {ours * moved / 1e9:5.0f} GB/s  torch {torchs / 1e9:6.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24576)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--strip", type=int, default=512, help=f"rows decoded at once, a multiple of {BLOCK}")
    parser.add_argument("--seconds", type=float, default=1.0, help="a case")
    arguments = parser.parse_args()
    if not (device := choose_device("auto")).traits.computes_on_host:
        on_accelerator(device, arguments.rows, arguments.columns, arguments.seconds)
        return
    strips = [(start, start + arguments.strip) for start in range(0, arguments.rows, arguments.strip)]
    count = arguments.strip * arguments.columns

    def rate(run: Callable[[int, int], object], threads: int) -> str:
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        times, started = [], time.perf_counter()
        for strip in strips[:2]:
            run(*strip)
        for strip in cycle(strips):
            before = clock()
            run(*strip)
            times.append(clock() - before)
            if time.perf_counter() - started > arguments.seconds:
                break
        return f"{count / statistics.median(times) / 1e9:6.2f} ({count / min(times) / 1e9:5.2f})"

    print(f"{count / 1e6:.1f}M weights a strip, {INSTRUCTION_SETS[0]}; G/s, median (best)")
    all_threads = torch.get_num_threads()
    for name, kernel, torchs in cases(arguments.rows, arguments.columns):
        line = f"{name:22}"
        for threads in sorted({1, all_threads}):
            line += f"  {threads} threads: {rate(kernel, threads)}"
            if torchs:
                line += f" torch {rate(torchs, threads)}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
