"""The directories of runs, of the model and of the cache."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from finetune.doctor.findings import FAULT, FINE, SLOW, Finding
from finetune.memory.errors import UserError
from finetune.memory.units import PAGE_BYTES, format_bytes
from finetune.offload.files.checkpoint import is_gguf, read_checkpoint, resolve_model
from finetune.offload.files.user_cache import user_cache
from finetune.offload.rates.disk import drive_name, nearest_directory
from finetune.offload.residency.io import IOEngine, IOFailure

IN_MEMORY = ("tmpfs", "ramfs")
REMOTE = ("nfs", "cifs", "smb", "9p", "ceph", "fuse", "virtiofs", "lustre", "glusterfs")


def look_at_output(output: Path) -> Iterator[Finding]:
    folder = nearest_directory(output)
    yield from _look_at_file_system("output", folder)
    try:
        descriptor, name = tempfile.mkstemp(prefix=".doctor.", dir=folder)
    except OSError as error:
        mend = "name another --output, or mend its access"
        yield Finding(FAULT, "output", f"{folder} cannot be written to ({error.strerror})", mend)
        return
    try:
        os.write(descriptor, bytes(4096))
        yield from _look_at_direct_io("output", folder, Path(name))
    except OSError as error:
        yield Finding(FAULT, "output", f"{folder} cannot be written to ({error.strerror})", "make room there")
    finally:
        os.close(descriptor)
        os.unlink(name)


def look_at_cache() -> Iterator[Finding]:
    folder = nearest_directory(user_cache())
    if os.access(folder, os.W_OK | os.X_OK):
        yield Finding(FINE, "cache", str(user_cache()))
    else:
        words = f"{user_cache()} cannot be written to, so --quantize and bench have no place"
        yield Finding(SLOW, "cache", words, "set XDG_CACHE_HOME to another directory")


def look_at_model(model: str) -> Iterator[Finding]:
    try:
        source = resolve_model(model)
        files = [source] if is_gguf(source) else read_checkpoint(source).files
    except (UserError, OSError) as error:
        yield Finding(FAULT, "model", " ".join(str(error).split()), "")
        return
    yield from _look_at_file_system("model", source)
    yield from _look_at_direct_io("model", source, files[0])


def _look_at_file_system(subject: str, path: Path) -> Iterator[Finding]:
    folder = nearest_directory(path).resolve()
    kinds = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((kinds[one] for one in (folder, *folder.parents) if one in kinds), "an unknown file system")
    free = psutil.disk_usage(str(folder)).free
    words = f"{path} is on {drive_name(path)} ({kind}), {format_bytes(free)} free"
    if kind in IN_MEMORY:
        yield Finding(
            SLOW, subject, f"{words}; what is there takes memory that no limit counts", "use a directory on a disk"
        )
    elif kind.startswith(REMOTE):
        yield Finding(
            SLOW, subject, f"{words}; a network is slower than a drive", "use a directory on a drive of this machine"
        )
    else:
        yield Finding(FINE, subject, words)


def _look_at_direct_io(subject: str, folder: Path, file: Path) -> Iterator[Finding]:
    """file: one there, of a page at least."""
    with IOEngine() as engine:
        page = torch.empty(2 * PAGE_BYTES, dtype=torch.uint8)
        address = page.data_ptr() + -page.data_ptr() % PAGE_BYTES
        try:
            engine.wait(engine.submit_reads([(engine.open(file), 0, PAGE_BYTES, address)]))
        except IOFailure as error:
            yield Finding(FAULT, subject, str(error), "mend the drive or the file")
            return
        except UserError as error:
            yield Finding(FAULT, subject, str(error))
            return
        notes = engine.notes
    if any("O_DIRECT" in note for note in notes):
        words = f"there is no direct I/O in {folder}, so what is read goes through the page cache as well"
        yield Finding(SLOW, subject, words, "use ext4, XFS or Btrfs on a drive")
    else:
        yield Finding(FINE, subject, "direct I/O works there")
