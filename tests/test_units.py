"""Byte words, and memory limits found in cgroups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.memory.meter import host_bytes
from finetune.memory.units import (
    CgroupLimit,
    available_host_bytes,
    cgroup_limits,
    format_bytes,
    parse_bytes,
    total_host_bytes,
)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (1, 1),
        ("1", 1),
        ("77B", 77),
        ("1GiB", 2**30),
        ("1gib", 2**30),
        (" 1.5 GiB ", 3 * 2**29),
        ("6GB", 6 * 10**9),
        ("512M", 512 * 2**20),
        ("768MiB", 768 * 2**20),
        ("3k", 3072),
        ("2T", 2 * 2**40),
        ("1PB", 10**15),
        ("0.1KB", 100),
        (".5K", 512),
        ("0.3GiB", 322122547),  # 322122547.2 rounds down, with no error of binary fractions
        ("50%", 5 * 10**9),
        ("12.5%", 1_250_000_000),
        ("100%", 10**10),
        ("-2GB", 8 * 10**9),
        ("- 2GB", 8 * 10**9),
        ("-2GiB", 10**10 - 2**31),
        ("-25%", 7_500_000_000),
        (-1000, 10**10 - 1000),
    ],
)
def test_parse_bytes(amount: str | int, expected: int) -> None:
    assert parse_bytes(amount, 10**10) == expected


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        ("", "expected bytes such as"),
        ("GiB", "found 'GiB'"),
        ("1 XiB", "unknown unit 'XiB'"),
        ("1GiBs", "unknown unit 'GiBs'"),
        ("1e9", "found '1e9'"),
        ("1.5", "1.5GiB"),
        ("0", "at least one byte"),
        ("-10GB", "leaves nothing"),
        ("-11GB", "of 9.3 GiB"),
        ("101%", "at most 100%"),
        ("0%", "leaves nothing"),
        ("1,5GiB", "found '1,5GiB'"),
        (True, "found True"),
        (1.5, "found 1.5"),
        (None, "found None"),
    ],
)
def test_parse_bytes_refuses(amount: object, words: str) -> None:
    with pytest.raises(ValueError, match="expected|unknown unit") as error:
        parse_bytes(amount, 10**10)
    assert words in str(error.value)


@pytest.mark.parametrize("amount", ["50%", "-2GB", -5])
def test_relative_amount_needs_a_total(amount: str | int) -> None:
    with pytest.raises(ValueError, match="absolute amount"):
        parse_bytes(amount)
    assert parse_bytes("2KiB") == 2048


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_288_490_189, "1.2 GiB"),
        (2**20 - 1, "1.0 MiB"),
        (-(2**31), "-2.0 GiB"),
        (2**60, "1024.0 PiB"),
    ],
)
def test_format_bytes(num_bytes: int, expected: str) -> None:
    assert format_bytes(num_bytes) == expected


def write_limits(root: Path, file_name: str, limits: dict[str, str]) -> None:
    for folder, text in limits.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / file_name).write_text(text + "\n")


def test_cgroup_v2_counts_the_ancestors(tmp_path: Path) -> None:
    write_limits(tmp_path, "memory.max", {"a": "3000", "a/b": "max", "a/b/c": "5000", "a/other": "1"})
    proc = "23 1 0:22 / /proc rw shared:1 - proc proc rw\n"
    mountinfo = proc + f"41 23 0:38 / {tmp_path} rw shared:9 - cgroup2 cgroup2 rw\n"
    assert [one.limit_bytes for one in cgroup_limits("0::/a/b/c\n", mountinfo)] == [5000, 3000]


def test_cgroup_v1_memory_beside_an_unlimited_v2(tmp_path: Path) -> None:
    v1, v2 = tmp_path / "with space", tmp_path / "unified"
    v2.mkdir()
    write_limits(v1, "memory.limit_in_bytes", {".": "9223372036854771712", "job": "700"})
    escaped = str(v1).replace(" ", "\\040")
    mountinfo = (
        f"35 31 0:32 / {escaped} rw,relatime - cgroup cgroup rw,memory\n"
        f"36 31 0:33 / {tmp_path}/cpu rw,relatime - cgroup cgroup rw,cpu\n"
        f"41 31 0:38 / {v2} rw,relatime - cgroup2 cgroup2 rw\n"
    )
    found = cgroup_limits("4:memory:/job\n1:cpu:/\n0::/\n", mountinfo)
    assert [one.limit_bytes for one in found] == [700, 9223372036854771712]


@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/../..", "/elsewhere", "/"])
def test_container_that_sees_only_its_own_subtree(tmp_path: Path, path: str) -> None:
    write_limits(tmp_path, "memory.max", {".": "1234", "docker/abc": "1"})
    mountinfo = f"41 31 0:38 /docker/abc {tmp_path} rw - cgroup2 cgroup2 rw\n"
    assert cgroup_limits(f"0::{path}\n", mountinfo) == [CgroupLimit(1234, 0)]


@pytest.mark.parametrize(
    ("kind", "limit", "usage", "prefix"),
    [("cgroup2", "memory.max", "memory.current", ""), ("cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")],
)
def test_pages_of_files_in_a_cgroup_are_not_used(tmp_path: Path, kind: str, limit: str, usage: str, prefix: str) -> None:
    write_limits(tmp_path, limit, {"job": "9000"})
    write_limits(tmp_path, usage, {"job": "5000"})
    write_limits(tmp_path, "memory.stat", {"job": f"cache 1\n{prefix}active_file 1200\n{prefix}inactive_file 700"})
    mountinfo = f"41 31 0:38 / {tmp_path} rw - {kind} x rw,memory\n"
    assert cgroup_limits("0::/job\n1:memory:/job\n", mountinfo) == [CgroupLimit(9000, 3100)]


def test_what_is_available_is_less_than_what_there_is_by_what_others_hold() -> None:
    physical_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_bytes() < available_host_bytes() <= total_host_bytes() <= physical_bytes
