"""What packed formats share: a weight's stored tensors gathered by name, and checked before any number is made of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry


def gather(
    entries: Mapping[str, TensorEntry], suffixes: Mapping[str, str], needed: Collection[str], weight: str = ""
) -> dict[str, dict[str, TensorEntry]]:
    """The weights that have something stored beside them: name -> part -> tensor.

    suffixes: part -> how its name ends; `weight` in place of that is the end of the weight's own name, whose part is "packed".
    needed: parts that no weight is without. Raises CheckpointError for one that is.
    """
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        for part, suffix in suffixes.items():
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix), {})[part] = entry
    for base, parts in found.items():
        first = next(iter(parts.values()))
        if base + weight in entries:
            parts["packed"] = entries[base + weight]
        for part, suffix in {"packed": weight, **suffixes}.items():
            if part in needed and part not in parts:
                raise CheckpointError(
                    f"{first.path}: expected tensor '{base}{suffix}' for '{first.name}', found none: download the model again"
                )
    return {base + weight: parts for base, parts in found.items()}


def check(entry: TensorEntry, is_right: bool, expected: str, found: Any) -> None:
    if not is_right:
        raise CheckpointError(
            f"{entry.path}: tensor '{entry.name}': expected {expected}, found {found!s:.80}: download the model again"
        )


def check_tensor(entry: TensorEntry, dtype: str, shape: tuple[int, ...]) -> None:
    is_right = entry.dtype == dtype and entry.shape == shape
    check(entry, is_right, f"{dtype} {list(shape)}", f"{entry.dtype} {list(entry.shape)}")


def matrix_shape(entry: TensorEntry) -> tuple[int, int]:
    """Raises CheckpointError for a tensor that is no matrix."""
    is_matrix = len(entry.shape) == 2 and all(entry.shape)
    check(entry, is_matrix, "a matrix", f"a shape of {list(entry.shape)}")
    return entry.shape


def read_bytes(entry: TensorEntry, most: int) -> bytes:
    """The tensor's bytes. Raises CheckpointError for more than `most`."""
    check(entry, entry.num_bytes <= most, f"at most {most} bytes", entry.num_bytes)
    try:
        with open(entry.path, "rb") as file:
            return os.pread(file.fileno(), entry.num_bytes, entry.offset)
    except OSError as error:
        raise CheckpointError(f"{entry.path}: can't be read: {error.strerror}") from error
