"""Bases as people publish them quantised, of tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packed_checkpoints import Packed, pack_compressed, pack_fp8, write_twice


class Base(NamedTuple):
    pack: Callable[[torch.Tensor], Packed]
    section: Mapping[str, Any]
    """`quantization_config`"""
    word: str
    """As messages have it."""


def fp8(block: tuple[int, int], dtype: torch.dtype = torch.float32) -> Base:
    section = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    return Base(partial(pack_fp8, block=block, scale_dtype=dtype), section, "fp8 with scales")


def compressed(form: str, weights: Mapping[str, Any], **options: Any) -> Base:
    section = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    groups = {"group_0": {"targets": ["Linear", "Embedding"], "weights": {"type": "int", **weights}}}
    return Base(partial(pack_compressed, **options), section | {"config_groups": groups}, "compressed-tensors")


BASES = {
    "fp8": fp8((16, 24)),
    "fp8, bf16 scales": fp8((20, 20), torch.bfloat16),
    "int4": compressed(
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False},
        bits=4, block=(1, 8), symmetric=False,
    ),
    "int8": compressed(
        "int-quantized", {"num_bits": 8, "strategy": "block", "block_structure": [16, 24]},
        bits=8, block=(16, 24), words=False, dtype=torch.float32,
    ),
}  # fmt: skip


def write(base: Base, model: Path, folder: Path, ends: tuple[str, ...] = ("proj.weight",)) -> tuple[Path, Path]:
    return write_twice(model, folder, lambda _, value: base.pack(value), base.section, ends)


