"""Lossless compression: what is left of a model's bytes, and how fast a weight is decoded, beside a copy in memory.

    python benchmarks/bench_lossless.py MODEL_DIRECTORY [--threads 1 2]

The decoded weight is the model's largest linear layer, repeated to 64 MiB; the best of several runs counts. A copy writes as
many bytes as decoding does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from finetune.offload.weights.compress import compress_checkpoint
from finetune.offload.weights.formats.lossless_code import (
    CHUNK,
    code_lengths,
    count_exponents,
    decode,
    encode,
    room_bytes,
)
from finetune.offload.weights.parts import cut

NUMBERS = 1 << 25


def best_seconds(run: Callable[[], object], times: int = 20) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def largest_weight(directory: Path) -> torch.Tensor:
    """Its numbers, bf16 [NUMBERS]."""
    checkpoint = cut(directory).checkpoint
    of_blocks = [e for e in checkpoint.tensors.values() if len(e.shape) == 2 and e.dtype == "BF16" and "embed" not in e.name]
    entry = max(of_blocks, key=lambda entry: entry.num_bytes)
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        numbers = torch.frombuffer(bytearray(file.read(entry.num_bytes)), dtype=torch.bfloat16)
    print(f"{entry.name} {list(entry.shape)}, repeated")
    return numbers.repeat(-(-NUMBERS // numbers.numel()))[:NUMBERS].contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        side_files = {Path("config.json"): args.model / "config.json"}
        found = compress_checkpoint(cut(args.model), Path(scratch) / "compressed", 64 << 20, side_files)
        seconds = time.perf_counter() - start
    print(
        f"{found.weights} weights compressed in {seconds:.1f} s: {found.num_bytes} of {found.plain_bytes} bytes, "
        f"{found.num_bytes / found.plain_bytes:.4f}"
    )
    numbers = largest_weight(args.model)
    lengths = torch.tensor(code_lengths(count_exponents(numbers).tolist()), dtype=torch.uint8)
    for chunk in (CHUNK, 2048):
        packed = torch.empty(room_bytes(NUMBERS, chunk), dtype=torch.uint8)
        sizes = encode(numbers, lengths, chunk, 0, packed)
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        stored = {"code": lengths, "offsets": offsets, "packed": packed[: sum(sizes)]}
        for threads in dict.fromkeys(args.threads):
            torch.set_num_threads(threads)
            for dtype in (torch.bfloat16, torch.float32):
                target = torch.zeros(NUMBERS, dtype=dtype)
                copied = numbers.to(dtype)
                decoding = best_seconds(lambda: decode(stored, chunk, NUMBERS, 0, NUMBERS, target))  # noqa: B023
                assert target.equal(copied)
                copying = best_seconds(lambda: target.copy_(copied))  # noqa: B023
                print(
                    f"chunks of {chunk}, {threads} threads, to {dtype}: {sum(sizes) / (2 * NUMBERS):.4f} of the bytes, "
                    f"{2 * NUMBERS / decoding / 1e9:.2f} GB/s of bf16; a copy {target.nbytes / copying / 1e9:.2f} GB/s"
                )


if __name__ == "__main__":
    main()
