"""What a quantised checkpoint will be, from the headers of the original: which weights are packed, in which files, how large.

[Note: which weights are packed]
Those that Transformers would pack with bitsandbytes: of linear layers, but for the head and what is tied to it. Experts that
the files have one by one are linear layers too, as Transformers 4 has them, and are packed as such models are published: each
matrix under its own name, the router in 16 bits. What lies in the files otherwise (stacked experts, transposed weights) stays
as it is.

[Note: both kinds in one checkpoint]
A budget of bits a weight makes some matrices nf4 and some int8. Every tensor then lies as bitsandbytes stores it, but
Transformers has one kind for a model. So config.json says both, load_in_4bit and load_in_8bit, which Transformers refuses in
one sentence: with one alone it would take packed bytes of the other kind for weights. `Packed4Bit` and `Packed8Bit` go by the
tensors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from finetune.offload.files.checkpoint import DTYPE_BITS, INDEX_FILE, Checkpoint, CheckpointError, TensorEntry
from finetune.offload.files.safetensors_files import file_header, shard_names, write_index
from finetune.offload.quantize.allocation import Choice, allocate, least_bits
from finetune.offload.quantize.experts import WORDS, find_experts, is_within
from finetune.offload.quantize.kernels import BLOCK, NESTED_BLOCK, nested_map
from finetune.offload.quantize.sensitivity import relative_errors
from finetune.offload.weights.formats.bitsandbytes_files import CODES
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.parts import ModelParts

KINDS = ("nf4", "int8")
_LONGEST_OFFSET = -1.2345678901234567e-38


@dataclass(frozen=True, slots=True)
class Packing:
    """How weights are packed."""

    kind: str | None
    """One of `KINDS`; None: for each matrix one that suits `bits`, or none."""
    nested: bool = True
    """Of nf4: absmax in 8 bits."""
    bits: float | None = None
    """That are stored for a weight, at most: the average over all matrices that can be packed."""

    @property
    def word(self) -> str:
        """For messages."""
        return self.kind or f"{self.bits:.6g} bits"


class NewTensor(NamedTuple):
    """A tensor of the quantised checkpoint."""

    name: str
    dtype: str  # safetensors' word
    shape: tuple[int, ...]
    content: bytes | None = None  # where it is known without the weights

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8 if self.content is None else len(self.content)


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file of the quantised checkpoint, made of one of the original's."""

    name: str
    entries: tuple[TensorEntry, ...]
    """What it is made of, in the order in which that is read."""
    packed: Mapping[str, tuple[NewTensor, ...]]
    """Name in the original -> what is stored of a weight that is packed; the first are the packed numbers, the last of nf4 is
    its state."""

    def header(self, states: Mapping[str, bytes] | None = None, size: int = 0) -> tuple[bytes, dict[str, int]]:
        """The header of the safetensors file, padded to whole pages and to `size`, and where each tensor begins in the file.

        states: the name of each state -> its bytes; None: the longest that they can be. Nothing but states lies elsewhere then.
        """
        tensors = []
        for tensor in self._in_file():
            num_bytes, shape = tensor.num_bytes, tensor.shape
            if states is not None and tensor.name in states:
                num_bytes = len(states[tensor.name])
                shape = (num_bytes,)
            tensors.append((tensor.name, tensor.dtype, shape, num_bytes))
        return file_header(tensors, size)

    def _in_file(self) -> list[NewTensor]:
        """In order: what has whole words, as it is read; then the rest by the size of its elements, so that all are aligned;
        then states, whose sizes are known last."""
        tensors, states = [], []
        for entry in self.entries:
            if entry.name in self.packed:
                stored = self.packed[entry.name]
                tensors += [tensor for tensor in stored if not is_state(tensor)]
                states += [tensor for tensor in stored if is_state(tensor)]
            else:
                tensors.append(NewTensor(entry.name, entry.dtype, entry.shape, None))
        rest = sorted((tensor for tensor in tensors if tensor.num_bytes % 8), key=_element_bytes, reverse=True)
        return [*(tensor for tensor in tensors if tensor.num_bytes % 8 == 0), *rest, *states]

    @property
    def num_bytes(self) -> int:
        """At most: a state is a few bytes shorter."""
        header, starts = self.header()
        return max([len(header), *(starts[tensor.name] + tensor.num_bytes for tensor in self._in_file())])

    @property
    def names(self) -> list[str]:
        """Of all its tensors."""
        return [tensor.name for tensor in self._in_file()]


@dataclass(frozen=True)
class Outline:
    """A checkpoint, and what it is to become."""

    checkpoint: Checkpoint
    packing: Packing
    files: tuple[NewFile, ...]
    config: dict[str, Any]
    """What config.json is to hold."""
    kinds: Mapping[str, str | None]
    """Name in the original of every matrix that can be packed -> one of `KINDS`; None: it stays as it is."""
    unlike: tuple[str, ...]
    """Tensors that differ from those they would be tied to."""
    stacked_bytes: int = 0
    """Of experts that lie stacked in the files, and stay as they are."""

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def packed_entries(self) -> list[TensorEntry]:
        return [entry for file in self.files for entry in file.entries if entry.name in file.packed]

    @property
    def bits_per_weight(self) -> float:
        """Of packed weights, with everything that is stored of them, and of the others, together."""
        count = sum(prod(entry.shape) for file in self.files for entry in file.entries)
        return 8 * self.num_bytes / max(1, count)

    @property
    def matrices(self) -> dict[str, int]:
        """How many there are of each kind; "": that stay as they are."""
        return dict(sorted(Counter(kind or "" for kind in self.kinds.values()).items(), reverse=True))

    @property
    def matrix_bits(self) -> float:
        """Stored for a weight of the matrices that can be packed, on average."""
        stored = [tensor for file in self.files for tensors in file.packed.values() for tensor in tensors]
        left = [entry for file in self.files for entry in file.entries if self.kinds.get(entry.name, "") is None]
        count = sum(prod(entry.shape) for entry in (*self.packed_entries, *left))
        return 8 * sum(one.num_bytes for one in (*stored, *left)) / count


def outline(parts: ModelParts, packing: Packing) -> Outline:
    """Of the checkpoint that `parts` were cut from. For a budget of bits, a sample of its weights is read.

    Raises CheckpointError when it is quantised or has nothing to pack, or not in so few bits.
    """
    checkpoint, model = parts.checkpoint, parts.model
    config = json.loads((parts.directory / "config.json").read_bytes())
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{parts.directory}: the weights are quantised already (quantization_config in config.json): leave --quantize out, "
            "or name the original model"
        )
    entries, left = _linear_weights(parts)
    experts, routers, stacked_bytes = find_experts(parts, _kept_modules(parts.model))
    entries |= experts
    left += routers
    if not entries:
        raise CheckpointError(
            f"{parts.directory}: {type(model).__name__} has no linear layer that could be quantised: leave --quantize out"
        )
    kinds = _kinds(parts, packing, list(entries.values()))
    left += [name for name, entry in entries.items() if kinds[entry.name] is None]
    packed = {
        entry.name: stored_tensors(entry, kind, packing.nested) for entry in entries.values() if (kind := kinds[entry.name])
    }
    if not packed:
        raise CheckpointError(
            f"{parts.directory}: none of its matrices would be quantised with {packing.word}: leave --quantize out"
        )
    paths = [path for path in checkpoint.files if any(entry.path == path for entry in checkpoint.tensors.values())]
    files = []
    for name, path in zip(shard_names(len(paths)), paths, strict=True):
        inside = tuple(sorted((e for e in checkpoint.tensors.values() if e.path == path), key=lambda entry: entry.offset))
        files.append(NewFile(name, inside, {entry.name: packed[entry.name] for entry in inside if entry.name in packed}))
    config["quantization_config"] = _section(packing, {name: kinds[name] for name in packed}, parts, left)
    return Outline(checkpoint, packing, tuple(files), config, kinds, _unlike(parts), stacked_bytes)


def is_state(tensor: NewTensor) -> bool:
    """Whether it says how its weight was packed, which is known in full once that is done."""
    return ".quant_state." in tensor.name


def state(entry: TensorEntry, offset: float | None) -> bytes:
    """What bitsandbytes keeps of a weight in 4 bits beside its tensors. offset: of nested absmax; None: they are not."""
    values: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": WORDS[entry.dtype], "shape": list(entry.shape),
    }  # fmt: skip
    if offset is not None:
        values |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(values).encode()


def _kinds(parts: ModelParts, packing: Packing, entries: list[TensorEntry]) -> dict[str, str | None]:
    """As `Outline.kinds`."""
    # Beside int8 stands .SCB in place of .weight.
    usable = {entry.name: KINDS if entry.name.endswith(".weight") else ("nf4",) for entry in entries}
    if packing.bits is None:
        return {name: packing.kind if packing.kind in kinds else None for name, kinds in usable.items()}
    errors = relative_errors(entries, packing.nested)
    options: list[list[tuple[str | None, Choice]]] = []
    for entry in entries:
        known = {kind: errors[entry.name][kind] for kind in usable[entry.name] if kind in errors[entry.name]}
        options.append([(None, Choice(8 * entry.num_bytes, 0.0))])
        for kind, error in known.items():
            num_bytes = sum(tensor.num_bytes for tensor in stored_tensors(entry, kind, packing.nested))
            options[-1].append((kind, Choice(8 * num_bytes, error)))
    choices = [[choice for _, choice in some] for some in options]
    count = sum(prod(entry.shape) for entry in entries)
    least = least_bits(choices)
    if packing.bits * count < least:
        raise CheckpointError(
            f"{parts.directory}: {packing.word} a weight are too few: its matrices take at least "
            f"{ceil(1000 * least / count) / 1000:g}, with scales: give as many"
        )
    found = allocate(choices, packing.bits * count)
    return {entry.name: some[index][0] for entry, some, index in zip(entries, options, found, strict=True)}


def _linear_weights(parts: ModelParts) -> tuple[dict[str, TensorEntry], list[str]]:
    """See [Note: which weights are packed]: name of the module -> tensor; and the modules that Transformers would pack too and
    that stay as they are."""
    from transformers.pytorch_utils import Conv1D

    model, sources = parts.model, parts.sources
    kept = _kept_modules(model)
    by_place = {(entry.path, entry.offset): entry for entry in parts.checkpoint.tensors.values()}
    uses = Counter(extent for weight in sources.values() for extent in getattr(weight, "extents", ()))
    found, left = {}, []
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D) or is_within(name, kept):
            continue
        weight = sources.get(f"{name}.weight")
        entry = None
        if isinstance(weight, PlainTensor) and len(weight.extents) == 1 and uses[weight.extents[0]] == 1:
            extent = weight.extents[0]
            entry = by_place.get((extent.path, extent.file_offset))
        is_whole = entry is not None and entry.shape == weight.shape and entry.num_bytes == weight.num_bytes > 0
        if is_whole and type(module) is nn.Linear and entry.dtype in WORDS:
            found[name] = entry
        else:
            left.append(name)
    return found, left


def _kept_modules(model: nn.Module) -> tuple[str, ...]:
    return (*_skipped_modules(model), *(model._keep_in_fp32_modules or ()))


def _skipped_modules(model: nn.Module) -> list[str]:
    """Those that Transformers leaves as they are: the head, what is tied, and the last module. (Its own function stands in a
    package whose import brings PyTorch's compiler.)"""
    ties = getattr(model, "all_tied_weights_keys", {})
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head and head is not None}
    last = [name for name, _ in model.named_parameters()][-1:]
    return sorted({name.removesuffix(".weight") for name in (*ties, *ties.values(), *heads, *last)})


def stored_tensors(entry: TensorEntry, kind: str, nested: bool) -> tuple[NewTensor, ...]:
    """What is stored of a weight that is packed so: as in `NewFile.packed`. nested: as in `Packing`."""
    if kind == "int8":
        base = entry.name.removesuffix(".weight")
        return (
            NewTensor(entry.name, "I8", entry.shape),
            NewTensor(f"{base}.SCB", "F32", entry.shape[:1]),
            NewTensor(f"{base}.weight_format", "U8", (), b"\0"),
        )
    count, blocks = prod(entry.shape), -(-prod(entry.shape) // BLOCK)
    codes = np.array(CODES["nf4"], "<f4").tobytes()
    longest = state(entry, _LONGEST_OFFSET if nested else None)
    stored = [NewTensor(entry.name, "U8", (-(-count // 2), 1))]
    if nested:
        numbers = nested_map().numpy().astype("<f4").tobytes()
        stored += [
            NewTensor(f"{entry.name}.absmax", "U8", (blocks,)),
            NewTensor(f"{entry.name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
            NewTensor(f"{entry.name}.nested_quant_map", "F32", (256,), numbers),
        ]
    else:
        stored.append(NewTensor(f"{entry.name}.absmax", "F32", (blocks,)))
    stored.append(NewTensor(f"{entry.name}.quant_map", "F32", (16,), codes))
    stored.append(NewTensor(f"{entry.name}.quant_state.bitsandbytes__nf4", "U8", (len(longest),), longest))
    return tuple(stored)


def _element_bytes(tensor: NewTensor) -> int:
    return tensor.num_bytes // max(1, prod(tensor.shape))


def _section(packing: Packing, kinds: Mapping[str, str], parts: ModelParts, left: Sequence[str]) -> dict[str, Any]:
    """`quantization_config`, as Transformers writes it; see [Note: both kinds in one checkpoint]. kinds: of what is packed."""
    entry = parts.checkpoint.tensors[next(iter(kinds))]
    is_4bit, is_8bit = (kind in kinds.values() for kind in KINDS)
    # Where it names none, Transformers leaves out what it would have left out here.
    skipped = sorted({*_skipped_modules(parts.model), *left}) if left else None
    return {
        "_load_in_4bit": is_4bit,
        "_load_in_8bit": is_8bit,
        "bnb_4bit_compute_dtype": WORDS[entry.dtype],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": is_4bit and packing.nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": is_4bit,
        "load_in_8bit": is_8bit,
        "quant_method": "bitsandbytes",
    }


def _unlike(parts: ModelParts) -> tuple[str, ...]:
    """Names in the files of the targets of ties that do not hold."""
    by_place = {(entry.path, entry.offset): entry.name for entry in parts.checkpoint.tensors.values()}
    weights = (parts.sources[target] for target, _ in parts.sources.apart)
    extents = (extent for weight in weights for extent in weight.tensors[""].extents)
    return tuple(name for e in extents if (name := by_place.get((e.path, e.file_offset))))


def write_sparse(plan: Outline, directory: Path, side_files: Mapping[Path, Path]) -> None:
    """A directory like the quantised one, with holes in place of what is not known yet: headers, configuration and what says
    how weights are packed are there, so that a run can be planned over it. side_files: name -> what it links to."""
    for file in plan.files:
        header, starts = file.header()
        with open(directory / file.name, "wb") as target:
            target.write(header)
            target.truncate(file.num_bytes)
            for tensor in (tensor for stored in file.packed.values() for tensor in stored if tensor.content):
                target.seek(starts[tensor.name])
                target.write(tensor.content)
            for name in plan.unlike:
                if name in starts:
                    target.seek(starts[name])
                    target.write(b"\1")
    for name, path in side_files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to(path.absolute())
    write_side(plan, directory)


def write_side(plan: Outline, directory: Path) -> None:
    """config.json and the index."""
    config = directory / "config.json"
    config.unlink(missing_ok=True)
    config.write_text(json.dumps(plan.config, indent=2) + "\n")
    if len(plan.files) > 1:
        homes = {name: file.name for file in plan.files for name in file.names}
        write_index(directory / INDEX_FILE, homes, plan.num_bytes)
