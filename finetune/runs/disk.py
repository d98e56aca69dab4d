"""The disk as a tier: whether what a run will write has room."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.plan import Plan
from finetune.memory.units import MIB, format_mib, parse_bytes


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
        limited = allowed < free
        beside = f" beside {format_mib(earlier_bytes)} of earlier runs" if earlier_bytes and limited else ""
        sizes = "\n".join(f"    {size / MIB:>8.1f} MiB  {name}" for name, size in parts.items() if size)
        found = _remedies(config, parts, need, allowed, earlier_bytes if limited else None)
        remedies = "\n".join(f"    {remedy}" for remedy in found)
        raise UserError(
            f"the run writes up to {format_mib(need)} under {config.output}, {allowed // MIB} MiB are "
            f"{'allowed by --disk' if limited else 'free'}{beside}:\n{sizes}\n  Each of these makes room:\n{remedies}"
        )


def _remedies(
    config: Config, parts: Mapping[str, int], need: int, allowed: int, earlier_bytes: int | None
) -> Iterator[str]:
    """earlier_bytes: of earlier runs, where --disk is the limit; None: the file system is."""
    if earlier_bytes is None:
        yield f"{format_mib(need - allowed)} more free where {config.output} is, or an --output on another drive"
    else:
        yield f"--disk {-(-(need + earlier_bytes) // MIB)}MiB"
        if 0 < need - allowed <= earlier_bytes:
            yield f"{config.output} without its earlier runs: {format_mib(earlier_bytes)}"
    kept = config.training.kept_states
    fewer = need - parts.get("resumable states", 0) * (kept - 1) // (kept + 1)
    if kept > 1 and fewer <= allowed:
        yield f"--set training.save_total_limit=1: {format_mib(fewer)}"
