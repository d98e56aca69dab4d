"""Which experts of a checkpoint are packed: see [Note: which weights are packed] in `outline.py`.

That a matrix is an expert's is seen from where its bytes go: into rows of a stacked parameter, whole and upright.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from torch import nn

from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.parts import ModelParts

WORDS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Of dtypes that can be packed, what bitsandbytes calls them."""


def find_experts(parts: ModelParts, kept: Collection[str]) -> tuple[dict[str, TensorEntry], list[str], int]:
    """Name of the linear layer, as the files have it -> its matrix; the routers beside them, as the files have them, which are
    linear layers to Transformers 4 and stay as they are; and bytes of experts that lie otherwise.

    kept: modules of which nothing is packed.
    """
    model, sources = parts.model, parts.sources
    in_files: dict[Path, list[TensorEntry]] = {}
    for entry in sorted(parts.checkpoint.tensors.values(), key=lambda entry: entry.offset):
        in_files.setdefault(entry.path, []).append(entry)
    found: dict[str, TensorEntry] = {}
    routers: list[str] = []
    stacked_bytes = 0
    for name, _ in model.named_parameters():
        weight, owner = sources.get(name), name.rpartition(".")[0]
        is_stack = isinstance(weight, PlainTensor) and len(weight.shape) == 3 and weight.can_be_updated
        if not is_stack or is_within(owner, kept):
            continue
        matrices = list(_matrices(weight, in_files))
        if sum(entry.num_bytes for entry in matrices) == weight.num_bytes:
            found |= {entry.name.removesuffix(".weight"): entry for entry in matrices}
            routers += _routers(parts, owner.rpartition(".")[0])
        elif "expert" in name:
            stacked_bytes += weight.num_bytes
    return found, list(dict.fromkeys(routers)), stacked_bytes


def is_within(name: str, modules: Collection[str]) -> bool:
    """Whether a module is one of these, as Transformers compares their names, or inside of one."""
    return any(name.endswith(module) or name.startswith(f"{module}.") for module in modules)


def _matrices(weight: PlainTensor, in_files: dict[Path, Sequence[TensorEntry]]) -> Iterator[TensorEntry]:
    """Tensors of the files that are whole rows of one matrix of a stack."""
    _, rows, columns = weight.shape
    row_bytes = columns * weight.dtype.itemsize
    for path, file_offset, num_bytes, target_offset in weight.extents:
        entries = in_files[path]
        for entry in entries[bisect_left(entries, file_offset, key=lambda entry: entry.offset) :]:
            if entry.offset + entry.num_bytes > file_offset + num_bytes:
                break
            row, rest = divmod(target_offset + entry.offset - file_offset, row_bytes)
            is_upright = len(entry.shape) == 2 and entry.shape[1] == columns and not rest
            is_linear = entry.dtype in WORDS and entry.name.endswith(".weight")
            if is_upright and is_linear and 0 < entry.shape[0] <= rows - row % rows:
                yield entry


def _routers(parts: ModelParts, block: str) -> Iterator[str]:
    """Modules beside experts that have a matrix and are no linear layers. block: the module that has them all."""
    for name, module in parts.model.get_submodule(block).named_children():
        key = parts.sources.direct.get(f"{block}.{name}.weight" if block else f"{name}.weight")
        weight = getattr(module, "weight", None)
        if key is not None and not isinstance(module, nn.Linear) and weight is not None and weight.dim() == 2:
            yield key.removesuffix(".weight")
