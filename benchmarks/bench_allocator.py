"""Time and memory of one transformer block under four allocators.

A Llama block of the 1.17B shape with LoRA rank 16 on its seven projections: forward without a graph, recomputation with
one, backward; one sequence of 512 tokens, fp32. Each allocator runs in processes of its own, interleaved, so that the
machine's drift touches all alike; processor time is given beside the clock's for a machine that is busy. Memory is
anonymous memory above what the process held before the first iteration.

    python benchmarks/bench_allocator.py [--iterations 30] [--rounds 2] [--mimalloc PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HIDDEN, FFN, HEADS, KV_HEADS, SEQUENCE, RANK = 2048, 5632, 32, 4, 512, 16
CAPACITY_BYTES = 512 << 20
ALLOCATORS = ("glibc", "glibc tuned", "mimalloc", "arena")
MIMALLOC = Path(sysconfig.get_path("purelib"), "cmeel.prefix/lib/libmimalloc.so")


def measure(allocator: str, iterations: int) -> dict:
    """One process's figures: seconds an iteration (all but the first), bytes, and the checksum of the last
    gradients."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    from finetune.memory.arena import install_arena, tune_malloc
    from finetune.memory.meter import MemoryMeter, host_bytes

    torch.manual_seed(0)
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=FFN, **heads)
    config._attn_implementation = "sdpa"
    lora = LoraConfig(r=RANK, target_modules="all-linear")
    block = inject_adapter_in_model(lora, LlamaDecoderLayer(config, 0)).train()
    x = torch.randn(1, SEQUENCE, HIDDEN)
    cos_sin = LlamaRotaryEmbedding(config)(x, torch.arange(SEQUENCE)[None])
    arena = None
    if allocator == "glibc tuned":
        tune_malloc()
    elif allocator == "arena":
        arena = install_arena(CAPACITY_BYTES)
        if not arena:
            sys.exit(arena.reason)
    seconds, cpu_seconds = [], []
    before_bytes = host_bytes()
    with MemoryMeter(interval_seconds=0.005) as meter:
        for _ in range(iterations):
            start, cpu_start = time.perf_counter(), time.process_time()
            with torch.no_grad():
                block(x, position_embeddings=cos_sin)
            inputs = x.clone().requires_grad_()
            block(inputs, position_embeddings=cos_sin).square().mean().backward()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
            checksum = sum(p.grad.double().sum().item() for p in block.parameters() if p.grad is not None)
            block.zero_grad(set_to_none=True)
    figures = {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "peak_bytes": meter.peak_bytes - before_bytes,
               "end_bytes": host_bytes() - before_bytes, "checksum": checksum}
    if arena:
        stats = arena.stats()
        figures |= {"live_peak_bytes": stats.peak_bytes, "overflow_bytes": stats.overflow_peak_bytes}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mimalloc", type=Path, default=MIMALLOC, help="libmimalloc.so (wheel cmeel-mimalloc)")
    parser.add_argument("--measure", choices=ALLOCATORS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.iterations)))
        return
    runs: dict[str, list[dict]] = {}
    for _ in range(arguments.rounds):
        for allocator in ALLOCATORS:
            environment = dict(os.environ)
            if allocator == "mimalloc":
                if not arguments.mimalloc.exists():
                    continue
                environment["LD_PRELOAD"] = str(arguments.mimalloc)
            command = [sys.executable, __file__, "--measure", allocator, "--iterations", str(arguments.iterations)]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.setdefault(allocator, []).append(json.loads(output.splitlines()[-1]))
    checksums = {run["checksum"] for of_one in runs.values() for run in of_one}
    if len(checksums) != 1:
        sys.exit(f"the allocators' gradients differ: {checksums}")
    base = statistics.median(s for run in runs["glibc"] for s in run["seconds"])
    print("allocator    s/iteration  x glibc     cpu s  peak MiB at end MiB live peak MiB")
    for allocator, of_one in runs.items():
        median = statistics.median(s for run in of_one for s in run["seconds"])
        cpu = statistics.median(s for run in of_one for s in run["cpu_seconds"])
        peak, end, live = (max(run.get(key, 0) for run in of_one) >> 20
                           for key in ("peak_bytes", "end_bytes", "live_peak_bytes"))
        print(f"{allocator:12s} {median:11.3f} {median / base:8.2f} {cpu:9.2f} {peak:9d} {end:10d} {live or '':>13}")


if __name__ == "__main__":
    main()
