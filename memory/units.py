"""Byte amounts as people write them, and how much host memory this process may use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath

import psutil

from finetune.memory.meter import host_bytes

PAGE_BYTES = 4096  # what direct I/O, slots and files are aligned to
MIB = 1 << 20

_PREFIXES = "KMGTP"
_AMOUNT = re.compile(r"(?P<minus>-?)\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>%|[A-Za-z]*)")
_EXPECTED = "expected bytes such as 1GiB, 6GB, 512M, 50% (of what there is) or -2GB (all but 2 GB)"


def parse_bytes(amount: str | int, total_bytes: int | None = None) -> int:
    """Bytes named by `amount`: always positive.

    KB, MB, GB, TB, PB are powers of 1000; KiB ... PiB powers of 1024; a bare K ... P means KiB ... PiB, as it does to
    systemd and to memory cgroups; a number alone is bytes. Letter case does not matter, fractions round down. `50%` is
    a share of `total_bytes`, and a leading minus means all of `total_bytes` but that much.

    Raises ValueError: not an amount, nothing left, or relative to a `total_bytes` that was not given.
    """
    if isinstance(amount, bool) or not isinstance(amount, (str, int)):
        raise ValueError(f"{_EXPECTED}, found {amount!r}")
    match = _AMOUNT.fullmatch(str(amount).strip())
    if match is None:
        raise ValueError(f"{_EXPECTED}, found {amount!r}")
    number, unit, minus = Fraction(match["number"]), match["unit"], bool(match["minus"])
    if (minus or unit == "%") and total_bytes is None:
        raise ValueError(f"{amount!r} is relative, and there is no total here to take it of: give an absolute amount")
    if unit == "%":
        if number > 100:
            raise ValueError(f"expected a share of at most 100%, found {amount!r}")
        num_bytes = number * total_bytes / 100
    elif not unit and number.denominator != 1:
        raise ValueError(f"expected a unit after a fraction, as in {match['number']}GiB, found {amount!r}")
    else:
        num_bytes = number * _unit_bytes(unit, amount)
    if minus:
        num_bytes = total_bytes - num_bytes
    if num_bytes < 1:
        of = f" of {format_bytes(total_bytes)}" if total_bytes is not None and (minus or unit == "%") else ""
        raise ValueError(f"expected at least one byte, found {amount!r}{of}, which leaves nothing")
    return int(num_bytes)


def _unit_bytes(unit: str, amount: str | int) -> int:
    if unit.upper() in ("", "B"):
        return 1
    power = _PREFIXES.find(unit[0].upper()) + 1
    suffix = unit[1:].lower()
    if not power or suffix not in ("", "b", "ib"):
        raise ValueError(f"unknown unit {unit!r} in {amount!r}: {_EXPECTED}")
    return (1000 if suffix == "b" else 1024) ** power


def round_up(num_bytes: int, multiple: int = PAGE_BYTES) -> int:
    return -(-num_bytes // multiple) * multiple


def format_bytes(num_bytes: int | float) -> str:
    """`1288490189` -> "1.2 GiB"; whole bytes below 1 KiB."""
    size, unit = abs(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        # Half a tenth below 1024 would be printed as "1024.0" of the smaller unit.
        if size < (1024 if unit == "B" else 1023.95):
            break
        size, unit = size / 1024, larger
    sign = "-" if num_bytes < 0 else ""
    return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.1f} {unit}"


def format_mib(num_bytes: int) -> str:
    """`4097 << 10` -> "5 MiB": rounded up, for sizes that are to be compared."""
    return f"{-(-num_bytes // MIB)} MiB"


def format_seconds(seconds: float) -> str:
    """`3.14159` -> "3.1 s", `5000` -> "83 min", `20000` -> "5.6 h", `400000` -> "4.6 days": two digits, and all before the
    point."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 100 else f"{max(seconds, 0.001):.2g} s"


def total_host_bytes() -> int:
    """Host memory that this process can hold at most: physical memory, or a smaller memory cgroup limit (v1 or v2).

    The limits of the process' own cgroup and of all its ancestors count, as far as they can be seen from here. Memory
    that other processes use is not subtracted.
    """
    return min([psutil.virtual_memory().total, *(limit.limit_bytes for limit in _cgroup_limits_here())])


def available_host_bytes() -> int:
    """Host memory that this process can come to hold beside what others use now; what it holds already is in it."""
    others = [psutil.virtual_memory().available, *(limit.limit_bytes - limit.used_bytes for limit in _cgroup_limits_here())]
    return min(total_host_bytes(), max(0, min(others)) + host_bytes())


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """used_bytes: without pages of files, which the kernel takes back when it needs to; 0 where it cannot be read."""

    limit_bytes: int  # memory that the group may use
    used_bytes: int


def cgroup_limits(cgroups: str, mountinfo: str) -> list[CgroupLimit]:
    """Every memory limit on the path from a process' cgroup to the top, own cgroup first.

    `cgroups` is the text of /proc/PID/cgroup, `mountinfo` of /proc/PID/mountinfo (formats: man 7 cgroups, man 5 proc).
    """
    v1_path = v2_path = None
    for line in cgroups.splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            v1_path = path
        elif hierarchy == "0":
            v2_path = path
    limits = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, mount_point = (_unescape(field) for field in before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup" and "memory" in options.split(",") and v1_path is not None:
            limits += _limits_upwards(mount_point, root, v1_path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        elif kind == "cgroup2" and v2_path is not None:
            limits += _limits_upwards(mount_point, root, v2_path, "memory.max", "memory.current", "")
    return limits


def _cgroup_limits_here() -> list[CgroupLimit]:
    try:
        return cgroup_limits(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
    except OSError:  # not Linux, or no /proc
        return []


def _limits_upwards(
    mount_point: str, mount_root: str, cgroup_path: str, limit_name: str, usage_name: str, stat_prefix: str
) -> list[CgroupLimit]:
    path = PurePosixPath(cgroup_path)
    # A container without its own cgroup namespace sees the host's path, but has only its own subtree mounted.
    visible = path.is_relative_to(mount_root) and ".." not in path.parts
    below = path.relative_to(mount_root) if visible else PurePosixPath()
    limits = []
    for folder in (below, *below.parents):
        try:
            text = Path(mount_point, folder, limit_name).read_text().strip()
        except OSError:  # the top of a hierarchy has no limit file; parts of it may be hidden
            continue
        if text.isdigit():  # "max" is no limit
            limits.append(CgroupLimit(int(text), _used_bytes(Path(mount_point, folder), usage_name, stat_prefix)))
    return limits


def _used_bytes(folder: Path, usage_name: str, stat_prefix: str) -> int:
    try:
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files = sum(int(stat[f"{stat_prefix}{kind}_file"]) for kind in ("active", "inactive"))
    except (OSError, ValueError, KeyError):
        return 0
    return max(0, usage - files)


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
