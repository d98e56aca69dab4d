"""The disk as a tier: whether what a run will write has room."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.config import Config
from memory.errors import UserError
from memory.plan import Plan
from memory.units import format_bytes, parse_bytes


def free_bytes(directory: Path) -> int:
    """Of the file system that has the directory, or will have it once that is made."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def check_disk(config: Config, plan: Plan, earlier_bytes: int) -> None:
    """Raises UserError unless what the run will write fits the file system, and with that of earlier runs `--disk`."""
    tokens = sum(f.stat().st_size for f in (config.output / "tokens").rglob("*") if f.is_file())
    parts = {**plan.disk_parts, "token cache": tokens}
    need = sum(parts.values())
    free = free_bytes(config.output)
    allowed = free if config.disk is None else min(free, max(0, parse_bytes(config.disk, free) - earlier_bytes))
    if need > allowed:
        raise UserError(
            f"the run writes up to {format_bytes(need)} under {config.output} ("
            + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
            + f"), {format_bytes(allowed)} are {'free' if allowed == free else 'allowed by --disk'}"
            + (f" beside {format_bytes(earlier_bytes)} of earlier runs: " if earlier_bytes and allowed < free else ": ")
            + "make room, name another --output, or raise --disk"
        )
