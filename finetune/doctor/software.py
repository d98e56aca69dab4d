"""The kernel, and the packages that this one stands on. Imports none of these."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from finetune.doctor.findings import FAULT, FINE, SLOW, Finding

OLDEST_KERNEL = (5, 6)  # whose io_uring has what the engine uses


def look_at_kernel() -> Iterator[Finding]:
    system, release = platform.system(), platform.release()
    if system != "Linux":
        yield Finding(FAULT, "system", f"{system} is not supported", "use Linux, on Windows within WSL 2")
        return
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST_KERNEL:
        yield Finding(
            SLOW, "kernel", f"Linux {release} is older than 5.6, so threads read the disk", "use a newer kernel"
        )
    else:
        yield Finding(FINE, "kernel", f"Linux {release}, Python {platform.python_version()}")


def look_at_versions() -> Iterator[Finding]:
    """Of what this package depends on, against what it says it needs."""
    try:
        needed = [Requirement(text) for text in metadata.requires("finetune-offload") or ()]
    except metadata.PackageNotFoundError:
        yield Finding(
            SLOW, "versions", "finetune is not installed as a package, so what it needs is not known", "pip install it"
        )
        return
    found = []
    for one in needed:
        extras = one.marker is not None and "extra" in str(one.marker)
        if one.marker is not None and not extras and not one.marker.evaluate():
            continue
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            if not extras:
                yield Finding(FAULT, one.name, "is not installed", f"pip install '{one.name}{one.specifier}'")
            continue
        if not one.specifier.contains(version, prereleases=True):
            mend = f"pip install '{one.name}{one.specifier}'"
            yield Finding(FAULT, one.name, f"version {version} is installed, expected {one.specifier}", mend)
        elif not extras:
            found.append(f"{one.name} {version}")
    yield Finding(FINE, "versions", ", ".join(found))
