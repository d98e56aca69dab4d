"""Weight formats: see `base.StoredWeight`, and [Note: a new format] there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.weights.formats.awq import PackedAwq
from finetune.offload.weights.formats.base import Stored, StoredWeight, stored_name
from finetune.offload.weights.formats.bitsandbytes import Packed4Bit, Packed8Bit
from finetune.offload.weights.formats.compressed_tensors import CompressedTensor
from finetune.offload.weights.formats.fp8 import BlockFP8
from finetune.offload.weights.formats.gguf import GgufTensor
from finetune.offload.weights.formats.gptq import PackedGptq
from finetune.offload.weights.formats.lossless import LosslessWeight
from finetune.offload.weights.formats.mxfp4 import MXFP4Experts
from finetune.offload.weights.formats.plain import Extent, PlainTensor

__all__ = [
    "FORMATS", "Extent", "FoundWeight", "PlainTensor", "Stored", "StoredWeight", "find_weights", "quantization_of",
    "stored_name",
]  # fmt: skip

FORMATS: tuple[type[StoredWeight], ...] = (
    GgufTensor,
    Packed4Bit,
    Packed8Bit,
    BlockFP8,
    CompressedTensor,
    PackedGptq,
    PackedAwq,
    MXFP4Experts,
    LosslessWeight,
    PlainTensor,
)
"""In the order in which they look for their weights: plain is what no other has found."""


class FoundWeight(NamedTuple):
    """A weight of a checkpoint, before it is known which parameter it is."""

    form: type[StoredWeight]
    """Its format."""
    parts: dict[str, TensorEntry]
    """Its stored tensors, by the fields of `form`."""


def quantization_of(config: Any) -> dict[str, Any] | None:
    """`quantization_config` of a model's configuration, or `compression_config` of older compressed-tensors; None: neither."""
    quantization, older = (getattr(config, key, None) for key in ("quantization_config", "compression_config"))
    if quantization is not None or not isinstance(older, Mapping):
        return quantization
    inner = older.get("quantization_config")
    return {**older, **(inner if isinstance(inner, Mapping) else {}), "quant_method": "compressed-tensors"}


def find_weights(entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None) -> dict[str, FoundWeight]:
    """Every weight of a checkpoint, by the name that it would have if it were plain.

    quantization: `quantization_config` of config.json.
    """
    left, found = dict(entries), {}
    for form in FORMATS:
        weights = form.find(left, quantization)
        found |= {name: FoundWeight(form, parts) for name, parts in weights.items()}
        taken = {entry.name for parts in weights.values() for entry in parts.values()}
        left = {name: entry for name, entry in left.items() if name not in taken}
    return found
