"""Sequential reading of one large file: the engine against fio (io_uring and libaio), same block size and depth.

    python benchmarks/bench_read.py [--file PATH] [--gib 2] [--request-mib 4] [--depth 32] [--repeats 7] [--shift 0]

Runs are interleaved in random order and read past the page cache. Prints medians and their ratio to fio's best (bar:
0.95).
`--shift N` reads to an address N bytes off the file's alignment: the staged path.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from finetune.offload.residency.io import IOEngine

MIB = 1 << 20


def make_file(path: Path, num_bytes: int) -> None:
    """Random bytes, so that no layer below can compress or skip them; synced, so that no writing disturbs the reads."""
    with open(path, "wb") as file:
        for start in range(0, num_bytes, 64 * MIB):
            file.write(os.urandom(min(64 * MIB, num_bytes - start)))
        file.flush()
        os.fsync(file.fileno())


def fio_rate(path: Path, ioengine: str, request_bytes: int, depth: int, num_bytes: int) -> tuple[float, float]:
    """Bytes a second that fio reads, and CPU seconds for a GiB."""
    command = ["fio", "--name=read", f"--filename={path}", "--rw=read", "--direct=1", f"--ioengine={ioengine}",
               f"--bs={request_bytes}", f"--iodepth={depth}", f"--size={num_bytes}", "--readonly",
               "--output-format=json"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(result.stdout)["jobs"][0]
    cpu_seconds = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return job["read"]["bw_bytes"], cpu_seconds / (num_bytes >> 30)


class Target:
    """Memory of one window that the file is read into again and again, as slots are.

    Plain pages, as the slots' and fio's are: reads into huge pages were measured to be slower on a busy virtio disk.
    """

    def __init__(self, num_bytes: int) -> None:
        self.map = mmap.mmap(-1, num_bytes + 4096)
        self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        ctypes.memset(self.address, 1, num_bytes + 4096)


def engine_rate(
    path: Path, backend: str, args: argparse.Namespace, target: Target, register: bool
) -> tuple[float, float]:
    """Bytes a second, and CPU seconds for a GiB: tickets of one slot each, the others ahead."""
    num_bytes, slot_bytes = args.gib << 30, args.slot_mib * MIB
    with IOEngine(backend, queue_depth=args.depth, request_bytes=args.request_mib * MIB) as engine:
        if register:
            engine.register_buffer(target.address, args.slots * slot_bytes)
        file_id = engine.open(path)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu_begin, begin = usage.ru_utime + usage.ru_stime, time.perf_counter()
        tickets: list[int] = []
        for index, offset in enumerate(range(0, num_bytes, slot_bytes)):
            if len(tickets) == args.slots:
                engine.wait(tickets.pop(0))
            address = target.address + index % args.slots * slot_bytes + args.shift
            tickets.append(engine.submit_reads([(file_id, offset, slot_bytes, address)]))
        for ticket in tickets:
            engine.wait(ticket)
        seconds = time.perf_counter() - begin
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return num_bytes / seconds, (usage.ru_utime + usage.ru_stime - cpu_begin) / args.gib


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="an existing file to read; default: a temporary one here")
    parser.add_argument("--gib", type=int, default=2)
    parser.add_argument("--request-mib", type=int, default=4)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--slot-mib", type=int, default=64, help="bytes of one ticket, as of one block")
    parser.add_argument("--slots", type=int, default=4, help="tickets in flight at most")
    parser.add_argument("--shift", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if shutil.which("fio") is None:
        print("fio is not installed: there is nothing to compare with", file=sys.stderr)
        return 1

    target = Target(args.slots * args.slot_mib * MIB)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = args.file or Path(folder) / "read.bin"
        if args.file is None:
            make_file(path, args.gib << 30)
        request_bytes, num_bytes = args.request_mib * MIB, args.gib << 30
        contenders: dict[str, Callable[[], tuple[float, float]]] = {
            "fio io_uring": lambda: fio_rate(path, "io_uring", request_bytes, args.depth, num_bytes),
            "fio libaio": lambda: fio_rate(path, "libaio", request_bytes, args.depth, num_bytes),
            "engine io_uring": lambda: engine_rate(path, "io_uring", args, target, register=False),
            "engine io_uring registered": lambda: engine_rate(path, "io_uring", args, target, register=True),
            "engine threads": lambda: engine_rate(path, "threads", args, target, register=False),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        cpu: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.repeats):
            for name in random.sample(list(contenders), len(contenders)):  # none always follows the same neighbour
                rate, cpu_seconds = contenders[name]()
                rates[name].append(rate)
                cpu[name].append(cpu_seconds)

    print(f"{platform.platform()}, {os.cpu_count()} CPUs; {args.gib} GiB, {args.request_mib} MiB x {args.depth}, "
          f"address shift {args.shift}, direct (cold), medians of {args.repeats}")  # fmt: skip
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(value for name, value in medians.items() if name.startswith("fio"))
    for name, value in medians.items():
        spread = f"{min(rates[name]) / 1e6:.0f}..{max(rates[name]) / 1e6:.0f}"
        cost = f"{statistics.median(cpu[name]):.3f} CPU s per GiB"
        print(f"{name:28} {value / 1e6:7.0f} MB/s ({spread}), {value / best:.3f} of fio's best, {cost}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
