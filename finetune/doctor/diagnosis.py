"""`finetune doctor`: what of this machine would stop a run or slow it down, each with its mend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.doctor.findings import FAULT, Finding
from finetune.doctor.software import look_at_kernel, look_at_versions


def diagnose(output: Path, model: str | None) -> Iterator[Finding]:
    """Findings as they are made. output: the directory of runs, which need not be there. model: a directory or hub id; None: no
    model is looked at."""
    yield from look_at_kernel()
    yield from look_at_versions()
    try:
        from finetune.doctor import hardware, places
    except ImportError as error:
        yield Finding(
            FAULT, "packages", f"cannot be imported ({error})", "install this package again, with what it needs"
        )
        return
    for look in (
        hardware.look_at_processor, hardware.look_at_memory, hardware.look_at_io_uring, hardware.look_at_limits,
        hardware.look_at_huge_pages, hardware.look_at_accelerator, places.look_at_cache,
    ):  # fmt: skip
        yield from look()
    yield from places.look_at_output(output)
    if model is not None:
        yield from places.look_at_model(model)
