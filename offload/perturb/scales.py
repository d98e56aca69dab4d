"""The scales of packed weights as what is tuned: QZO (Shang et al. 2025, "Fine-tuning Quantized Neural Networks with
Zeroth-order Optimization").

A packed number is a code times the scale of its block. Codes are discrete and stay; scales are fp32, and are perturbed and
moved like any other weight: scale + epsilon z, where the noise of a scale depends on seed, stored tensor and element. A variant
of a block has scales of its own and the clean slot's codes.

[Note: least scale]
A step may not turn the signs of a block: in the authors' code, scales that an update makes smaller than 1e-7 are set to that.
Here a group's sum is an update, see [Note: groups] in `finetune.offload.perturb.journal`. Perturbed scales may be smaller, as
there.
"""

from __future__ import annotations

from collections.abc import Iterator

from finetune.memory.errors import UserError
from finetune.offload.noise.noise import parameter_key
from finetune.offload.perturb.products import product_weights
from finetune.offload.weights.formats import PlainTensor, StoredWeight, stored_name
from finetune.offload.weights.parameter_map import ParameterMap
from finetune.offload.weights.parts import ModelParts

LEAST_SCALE = 1e-7


def scale_tensors(parts: ModelParts) -> ParameterMap:
    """The scales of what is streamed, by fully qualified name: that of the weight, and the field."""
    found = ParameterMap()
    for name, weight in _streamed(parts):
        for part in weight.scale_parts:
            found[stored_name(name, part)] = weight.tensors[part]
    return found


def scale_keys(parts: ModelParts) -> dict[str, int]:
    """Fully qualified name of a stored tensor -> key of its noise. Of tied weights, both have that of their home."""
    tied = parts.sources.tied
    return {
        stored_name(name, part): parameter_key(stored_name(tied.get(name, name), part))
        for name, weight in _streamed(parts)
        for part in weight.scale_parts
    }


def check_scales(parts: ModelParts) -> None:
    """Raises UserError for a model without scales, or with some that can't be tuned."""
    packed = [(name, weight) for name, weight in _streamed(parts) if not isinstance(weight, PlainTensor)]
    if not packed:
        raise UserError(
            "zo.parameters scales: expected linear layers whose weights are packed with scales, found none: use zo.parameters "
            "all"
        )
    tables = {weight for _, _, weight in parts.embeddings} | {edge.source for edge in parts.edges}
    for name, weight in packed:
        if not weight.scale_parts:
            raise UserError(
                f"zo.parameters scales: {name} is stored as {weight.word} without scales in fp32 (they are packed themselves, "
                "or in 16 bits): pack the model without nested statistics (bnb_4bit_use_double_quant=False), or use "
                "zo.perturb products"
            )
        if weight in tables:
            raise UserError(
                f"zo.parameters scales: {name} is an embedding too, whose scales would stay: tune an adapter "
                "(zo.parameters lora)"
            )


def element_in(part: PlainTensor, whole: PlainTensor) -> int:
    """Which element of `whole` is the first one of `part`, some neighbouring elements of it."""
    if not part.extents:
        return 0
    first = part.extents[0]
    for extent in whole.extents:
        if extent.path == first.path and 0 <= first.file_offset - extent.file_offset < extent.num_bytes:
            return (extent.target_offset + first.file_offset - extent.file_offset) // whole.dtype.itemsize
    raise ValueError("these elements are not of that tensor")


def _streamed(parts: ModelParts) -> Iterator[tuple[str, StoredWeight]]:
    return ((name, parts.sources[name]) for name in sorted(product_weights(parts)) if name in parts.sources)
