"""Checksums of what is written to be read back: against bits that flip and files that are cut, joined or exchanged.

Not against people: who can write a file can write its checksum.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "checksum"
_BLOCK_BYTES = 1 << 20


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, JSON values without the key SEAL, and a checksum of them all under it."""
    return {**values, SEAL: json_digest(values)}


def unseal(found: Any) -> dict[str, Any]:
    """What was sealed. Raises ValueError when `found` is anything else."""
    if not isinstance(found, dict) or SEAL not in found:
        raise ValueError("there is no checksum in it")
    values = {key: value for key, value in found.items() if key != SEAL}
    if found[SEAL] != json_digest(values):
        raise ValueError("its checksum does not fit")
    return values


def json_digest(values: Any) -> str:
    """Of JSON values, whatever the order of keys: 128 bits as hexadecimal digits."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_checksum(path: Path) -> str:
    """CRC-32 of a file's bytes as hexadecimal digits, read in small blocks. Raises OSError."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return crc_text(value)


def crc_text(value: int) -> str:
    return f"{value:08x}"
