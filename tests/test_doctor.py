"""`finetune doctor`: every problem is found where there is one, is a line with its mend, and decides the exit code."""

from __future__ import annotations

import builtins
import platform
import resource
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_models import save_tiny
from typer.testing import CliRunner

from finetune.cli import app
from finetune.doctor import hardware, places, software
from finetune.doctor.findings import FAULT, FINE, SLOW, Finding
from finetune.memory.units import PAGE_BYTES
from finetune.offload.residency.io import FaultPlan, IOEngine


def only(findings) -> Finding:
    (finding,) = findings
    return finding


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


@pytest.fixture
def limits(monkeypatch):
    """Sets resource limits, for the doctor's eyes only."""
    found = {
        resource.RLIMIT_MEMLOCK: resource.RLIM_INFINITY, resource.RLIMIT_NOFILE: 1024,
        resource.RLIMIT_FSIZE: resource.RLIM_INFINITY,
    }  # fmt: skip
    monkeypatch.setattr(hardware.resource, "getrlimit", lambda which: (found[which], 4096))
    return found


def test_a_machine_that_is_fine_has_no_faults(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    result = CliRunner().invoke(app, ["doctor", "--output", str(tmp_path / "out"), "--model", str(model)])
    assert result.exit_code == 0, result.output
    levels = {line.split()[0] for line in result.stdout.splitlines()}
    assert levels <= {FINE, SLOW} and "model: direct I/O works there" in result.stdout
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_fault_is_a_line_and_decides_the_exit_code(tmp_path):
    result = CliRunner().invoke(
        app, ["doctor", "--output", str(tmp_path), "--model", str(tmp_path / "no" / "such" / "model")]
    )
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith(
        f"fault  model: model '{tmp_path}/no/such/model': no such directory"
    )
    assert str(Finding(SLOW, "this", "is slow", "mend it")) == "slow   this: is slow: mend it"


@pytest.mark.parametrize(
    ("system", "release", "level", "words"),
    [
        ("Linux", "6.8.0-41-generic", FINE, "Linux 6.8.0-41-generic, Python"),
        ("Linux", "5.4.0", SLOW, "older than 5.6"),
        ("Linux", "4.18.0-553.el8", SLOW, "older than 5.6"),
        ("Darwin", "24.0.0", FAULT, "Darwin is not supported"),
    ],
)
def test_the_kernel(monkeypatch, system, release, level, words):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    found = only(software.look_at_kernel())
    assert found.level == level and words in found.words


def test_versions_against_what_is_needed(monkeypatch):
    installed = {"torch": "2.8.0", "peft": "0.21.1", "gguf": "0.1", "numpy": "2.4.0rc1"}
    extras = ['gguf>=0.2; extra == "gguf"', 'tensorboard; extra == "t"']
    needed = ["torch<2.14,>=2.9", "peft>=0.18", "greenlet", "numpy>=2", *extras, 'colorama; sys_platform == "win32"']

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    monkeypatch.setattr(metadata, "version", version)
    *faults, fine = software.look_at_versions()
    assert [(fault.level, fault.subject) for fault in faults] == [
        (FAULT, "torch"),
        (FAULT, "greenlet"),
        (FAULT, "gguf"),
    ]
    assert faults[0].words == "version 2.8.0 is installed, expected <2.14,>=2.9"
    assert faults[0].mend == "pip install 'torch<2.14,>=2.9'"
    assert faults[1].words == "is not installed" and faults[1].mend == "pip install 'greenlet'"
    assert fine.words == "peft 0.21.1, numpy 2.4.0rc1"


def test_a_package_that_is_not_installed_itself(monkeypatch):
    def requires(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert only(software.look_at_versions()).level == SLOW


def test_what_cannot_be_imported_is_a_fault(monkeypatch, tmp_path):
    real = builtins.__import__

    def without_torch(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "finetune.doctor" and "hardware" in (fromlist or ()):
            raise ImportError("No module named 'torch'")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    result = CliRunner().invoke(app, ["doctor", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("fault  packages: cannot be imported (No module named 'torch')")


def test_threads_that_lie_idle(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(4)))
    found = list(hardware.look_at_processor())
    assert found[-1].level == SLOW and found[-1].words == "1 compute, where 4 cores can be used"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert only(hardware.look_at_processor()).level == FINE


def test_little_memory_a_cgroup_and_swap(monkeypatch, tmp_path):
    memory = SimpleNamespace(total=8 << 30, available=6 << 30)
    swap = SimpleNamespace(total=4 << 30, used=3 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "swap_memory", lambda: swap)
    monkeypatch.setattr(hardware, "total_host_bytes", lambda: 512 << 20)
    write(tmp_path, "proc/sys/vm/overcommit_memory", "2\n")
    found = list(hardware.look_at_memory(tmp_path))
    assert [(one.subject, one.level) for one in found] == [("memory", SLOW), ("swap", SLOW), ("overcommit", SLOW)]
    assert found[0].words == "8.0 GiB, 6.0 GiB available; a memory cgroup allows 512.0 MiB"
    assert found[1].words == "3.0 GiB of 4.0 GiB are in use"
    monkeypatch.setattr(hardware, "total_host_bytes", lambda: 8 << 30)
    swap.used = swap.total = 0
    write(tmp_path, "proc/sys/vm/overcommit_memory", "0\n")
    assert [one.level for one in hardware.look_at_memory(tmp_path)] == [FINE, FINE]


@pytest.mark.parametrize(
    ("file", "text", "mend"),
    [
        ("proc/sys/kernel/io_uring_disabled", "2\n", "sysctl kernel.io_uring_disabled=0"),
        (".dockerenv", "", "seccomp profile"),
        ("etc/hostname", "", "Linux 5.6 or later"),
    ],
)
def test_io_uring_that_cannot_be_had(monkeypatch, tmp_path, file, text, mend):
    class Threads(IOEngine):
        def __init__(self) -> None:
            super().__init__("threads")
            self.backend_reason = "the kernel refused io_uring"

    monkeypatch.setattr(hardware, "IOEngine", Threads)
    found = only(hardware.look_at_io_uring(write(tmp_path, file, text)))
    assert found.level == SLOW and "the kernel refused io_uring" in found.words and mend in found.mend


def test_limits(limits):
    assert only(hardware.look_at_limits()).words == "not limited"
    limits[resource.RLIMIT_MEMLOCK] = 1 << 30
    assert only(hardware.look_at_limits()).words == "at most 1.0 GiB"
    limits |= {resource.RLIMIT_MEMLOCK: 8 << 20, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_FSIZE: 1 << 20}
    found = list(hardware.look_at_limits())
    assert [(one.subject, one.level) for one in found] == [
        ("locked memory", SLOW),
        ("open files", FAULT),
        ("file size", FAULT),
    ]
    assert "ulimit -l" in found[0].mend and found[1].mend == "ulimit -n 4096" and "1.0 MiB" in found[2].words


@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        ("always [madvise] never\n", FINE, "madvise"),
        ("[always] madvise never\n", FINE, "always"),
        ("always madvise [never]\n", SLOW, "never, so"),
        (None, SLOW, "not there, so"),
    ],
)
def test_huge_pages(tmp_path, text, level, words):
    if text is not None:
        write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", text)
    found = only(hardware.look_at_huge_pages(tmp_path))
    assert found.level == level and found.words.startswith(words)


class Accelerator:
    """A stand-in for one that is there."""

    traits = SimpleNamespace(kernels="triton")
    error: Exception | None = None
    free = 6 << 30

    def warm_up(self, dtype: torch.dtype) -> None:
        if self.error is not None:
            raise self.error

    def total_bytes(self) -> int:
        return 8 << 30

    def available_bytes(self) -> int:
        return self.free


@pytest.fixture
def accelerator(monkeypatch) -> Accelerator:
    device = Accelerator()
    found = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(hardware, "choose_device", lambda kind: device)
    monkeypatch.setattr(hardware, "find_spec", lambda name: object())
    return device


def test_an_accelerator_that_works(accelerator, tmp_path, monkeypatch):
    found = only(hardware.look_at_accelerator(tmp_path))
    assert found.level == FINE and found.words.startswith("cuda, 6.0 GiB of 8.0 GiB free, torch ")
    accelerator.free = 1 << 30
    assert only(hardware.look_at_accelerator(tmp_path)).level == SLOW
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    assert [one.subject for one in hardware.look_at_accelerator(tmp_path)] == ["accelerator", "triton"]


def test_an_accelerator_that_fails(accelerator, tmp_path):
    accelerator.error = RuntimeError("CUDA error: no kernel image\nis available for execution on the device")
    found = only(hardware.look_at_accelerator(tmp_path))
    assert found.level == FAULT and "no kernel image is available" in found.words and "\n" not in str(found)


def test_a_driver_that_torch_does_not_use(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert only(hardware.look_at_accelerator(tmp_path)).level == FINE
    write(tmp_path, "proc/driver/nvidia/version", "NVRM version: 550.54\nGCC version: 12\n")
    monkeypatch.setattr(torch.version, "cuda", None)
    found = only(hardware.look_at_accelerator(tmp_path))
    assert found.level == SLOW and "is not for CUDA" in found.words
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = only(hardware.look_at_accelerator(tmp_path))
    assert found.level == FAULT and found.words.endswith("the driver is: NVRM version: 550.54")


@pytest.mark.parametrize(
    ("kind", "level"), [("ext4", FINE), ("tmpfs", SLOW), ("nfs4", SLOW), ("fuse.sshfs", SLOW), ("9p", SLOW)]
)
def test_file_systems(monkeypatch, tmp_path, kind, level):
    mount = SimpleNamespace(mountpoint=str(tmp_path), device="a share", fstype=kind)
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [mount])
    found = next(places.look_at_output(tmp_path / "out"))
    assert found.level == level and f"({kind})" in found.words and "a share on" in found.words


def engine(monkeypatch, **fault: int) -> None:
    monkeypatch.setattr(places, "IOEngine", lambda: IOEngine("threads", inject=FaultPlan(**fault)))


def test_a_drive_that_does_not_read(monkeypatch, tmp_path):
    engine(monkeypatch, eio_at=1)
    found = list(places.look_at_output(tmp_path))
    assert found[-1].level == FAULT and "Input/output error" in found[-1].words
    assert list(tmp_path.iterdir()) == []


def test_no_direct_io(monkeypatch, tmp_path):
    monkeypatch.setattr(IOEngine, "notes", property(lambda self: ["no O_DIRECT for x: it goes through the page cache"]))
    found = list(places.look_at_output(tmp_path))
    assert found[-1].level == SLOW and "no direct I/O" in found[-1].words


def test_places_that_cannot_be_written_to(monkeypatch, tmp_path):
    def refuse(**where: object):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(places.tempfile, "mkstemp", refuse)
    found = list(places.look_at_output(tmp_path))
    assert found[-1].level == FAULT and f"{tmp_path} cannot be written to (Permission denied)" in found[-1].words
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert only(places.look_at_cache()).level == FINE
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)
    assert only(places.look_at_cache()).level == SLOW


def test_a_model_whose_file_is_cut(tmp_path):
    model = save_tiny("llama", tmp_path / "model", max_shard_size="1GB")
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: 2 * PAGE_BYTES])
    found = only(places.look_at_model(str(model)))
    assert found.level == FAULT and "model.safetensors" in found.words and "\n" not in str(found)
