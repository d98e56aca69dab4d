"""Processor, memory, limits and accelerator."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from finetune.doctor.findings import FAULT, FINE, SLOW, Finding, read_setting
from finetune.memory.device_kinds import DEVICE_KINDS
from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes, total_host_bytes
from finetune.offload.devices import choose_device
from finetune.offload.rates.machine import processor_name
from finetune.offload.residency.io import IOEngine

LEAST_LOCKED_BYTES = 256 << 20  # of a few slots of a 7B model's blocks
LEAST_MEMORY_BYTES = 1 << 30
LEAST_OPEN_FILES = 256


def look_at_processor() -> Iterator[Finding]:
    name, threads = processor_name(), torch.get_num_threads()
    words = f"{name}, {threads} compute threads"
    if choose_device("cpu").multiplies(torch.bfloat16):
        yield Finding(FINE, "processor", f"{words}, products in bf16")
    else:
        yield Finding(FINE, "processor", f"{words}; without bf16 instructions, bf16 models compute in fp32 here")
    cores = psutil.cpu_count(logical=False) or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    if threads < min(cores, usable):
        mend = "unset OMP_NUM_THREADS, or set engine.num_threads"
        yield Finding(SLOW, "threads", f"{threads} compute, where {min(cores, usable)} cores can be used", mend)


def look_at_memory(root: Path = Path("/")) -> Iterator[Finding]:
    memory, limit = psutil.virtual_memory(), total_host_bytes()
    words = f"{format_bytes(memory.total)}, {format_bytes(memory.available)} available"
    if limit < memory.total:
        words += f"; a memory cgroup allows {format_bytes(limit)}"
    if min(limit, memory.available) < LEAST_MEMORY_BYTES:
        yield Finding(
            SLOW, "memory", words, "end what else takes memory, or raise the cgroup's limit: less than 1 GiB is left"
        )
    else:
        yield Finding(FINE, "memory", words)
    swap = psutil.swap_memory()
    if swap.used > swap.total // 2:
        mend = "end what takes the memory, or give --host-memory less"
        yield Finding(SLOW, "swap", f"{format_bytes(swap.used)} of {format_bytes(swap.total)} are in use", mend)
    else:
        yield Finding(
            FINE, "swap", f"{format_bytes(swap.used)} of {format_bytes(swap.total)} in use" if swap.total else "none"
        )
    if read_setting(root / "proc/sys/vm/overcommit_memory") == "2":
        words = "memory is not overcommitted (vm.overcommit_memory is 2), so mappings may be refused"
        yield Finding(SLOW, "overcommit", words, "sysctl vm.overcommit_memory=0")


def look_at_io_uring(root: Path = Path("/")) -> Iterator[Finding]:
    with IOEngine() as engine:
        backend, reason = engine.backend, engine.backend_reason
    if backend == "io_uring":
        yield Finding(FINE, "io_uring", "reads and writes the disk")
        return
    if read_setting(root / "proc/sys/kernel/io_uring_disabled") not in ("", "0"):
        mend = "sysctl kernel.io_uring_disabled=0"
    elif (root / ".dockerenv").exists() or (root / "run/.containerenv").exists():
        mend = "start the container with a seccomp profile that allows io_uring"
    else:
        mend = "use Linux 5.6 or later, and a build with liburing"
    yield Finding(SLOW, "io_uring", f"cannot be used ({reason}), threads read and write the disk", mend)


def look_at_limits() -> Iterator[Finding]:
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked == resource.RLIM_INFINITY:
        yield Finding(FINE, "locked memory", "not limited")
    elif locked < LEAST_LOCKED_BYTES:
        words = f"limited to {format_bytes(locked)}, so the kernel pins buffers again for every request"
        mend = "ulimit -l unlimited (memlock in /etc/security/limits.conf; docker run --ulimit memlock=-1)"
        yield Finding(SLOW, "locked memory", words, mend)
    else:
        yield Finding(FINE, "locked memory", f"at most {format_bytes(locked)}")
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < LEAST_OPEN_FILES:
        yield Finding(
            FAULT, "open files", f"at most {files}, too few for models of many files", f"ulimit -n {min(4096, most)}"
        )
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY:
        yield Finding(
            FAULT, "file size", f"limited to {format_bytes(size)}, which weights exceed", "ulimit -f unlimited"
        )


def look_at_huge_pages(root: Path = Path("/")) -> Iterator[Finding]:
    text = read_setting(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        yield Finding(FINE, "huge pages", chosen)
    else:
        mend = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding(
            SLOW, "huge pages", f"{chosen or 'not there'}, so decoders and products walk through small ones", mend
        )


def look_at_accelerator(root: Path = Path("/")) -> Iterator[Finding]:
    driver = read_setting(root / "proc/driver/nvidia/version").splitlines()[:1]
    build = torch.version.cuda or torch.version.hip
    built = f"torch {torch.__version__}" + (f" for {'CUDA' if torch.version.cuda else 'ROCm'} {build}" if build else "")
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type not in DEVICE_KINDS:
        if not driver:
            yield Finding(FINE, "accelerator", "none: runs compute on the processor")
        elif torch.version.cuda is None:
            words = f"there is an NVIDIA driver, but {built} is not for CUDA: runs compute on the processor"
            yield Finding(SLOW, "accelerator", words, "install a torch for CUDA")
        else:
            words = f"{built} cannot use it; the driver is: {driver[0]}"
            yield Finding(FAULT, "accelerator", words, f"install a driver for CUDA {build}, or check its device nodes")
        return
    try:
        device = choose_device(found.type)
        for dtype in (torch.float32, torch.bfloat16):
            device.warm_up(dtype)
    except (RuntimeError, UserError) as error:
        reason = " ".join(str(error).split())[:200]
        yield Finding(
            FAULT, "accelerator", f"{found.type} fails with {built}: {reason}", "install a torch that is built for it"
        )
        return
    total, free = device.total_bytes(), device.available_bytes()
    words = f"{found.type}, {format_bytes(free)} of {format_bytes(total)} free, {built}"
    if free < total // 2:
        yield Finding(SLOW, "accelerator", words, "end what else uses it (nvidia-smi lists that)")
    else:
        yield Finding(FINE, "accelerator", words)
    if device.traits.kernels == "triton" and find_spec("triton") is None:
        words = "is not installed: method zo cannot run on the accelerator, and packed weights are decoded more slowly"
        yield Finding(SLOW, "triton", words, "pip install triton")
