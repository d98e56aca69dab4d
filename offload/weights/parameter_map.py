"""From a model's parameters to bytes of its checkpoint.

Nothing is converted and nothing is copied on disk: a parameter is a list of extents of the user's own safetensors files, or
several such lists where it is in a format of more than one tensor (`finetune.offload.weights.formats`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from finetune.offload.files.checkpoint import Checkpoint, CheckpointError
from finetune.offload.weights.assembly import Sources
from finetune.offload.weights.conversion import PlacementTensor, extents_of, run_converter
from finetune.offload.weights.formats import (
    FORMATS,
    Extent,
    FoundWeight,
    PlainTensor,
    StoredWeight,
    find_weights,
    quantization_of,
)
from finetune.offload.weights.formats.plain import torch_dtype
from finetune.offload.weights.formats.stacked import JoinedRows, StackedWeights
from finetune.offload.weights.formats.stored_parts import check
from finetune.offload.weights.gguf_model import gguf_names

_COMPARED_ELEMENTS = 1 << 19


class ParameterMap(dict[str, StoredWeight]):
    """Every parameter and persistent buffer of a model by fully qualified name; tied ones are equal.

    tied: name -> the name whose bytes it uses, for every tie that holds in this checkpoint (see `map_parameters`).
    direct: parameter -> the weight of the checkpoint that is it, as it is stored and by no conversion.
    copies: (home, copy) of every tied weight that the checkpoint holds once more; what changes the one must change the other.
    apart: (target, source) of ties that the configuration asks for and that don't hold, for both are there and unlike.
    absent: names that Transformers lets a checkpoint leave out and that this one does; they are not in the map, the
        model's own initialisation gives their values.
    unused: checkpoint tensors that no parameter takes, less those Transformers knows to ignore. Worth a warning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tied: dict[str, str] = {}
        self.direct: dict[str, str] = {}
        self.copies: tuple[tuple[PlainTensor, PlainTensor], ...] = ()
        self.apart: tuple[tuple[str, str], ...] = ()
        self.absent: tuple[str, ...] = ()
        self.unused: tuple[str, ...] = ()


def map_parameters(
    model: PreTrainedModel, checkpoint: Checkpoint, fresh: Collection[str] = ()
) -> ParameterMap:
    """Say for each parameter and persistent buffer of `model` (on any device, meta too) where its bytes come from.

    Names, conversions and ties follow `convert_and_load_state_dict_in_model` and `PreTrainedModel.tie_weights`. Where a
    checkpoint holds both ends of a tie they are compared, as Transformers does: equal values make one home, unlike ones
    stay two parameters that are not in `tied`, whatever the configuration says. fresh: names that the checkpoint may lack.

    Raises CheckpointError for quantised weights, missing parameters, shapes or dtypes that don't fit, and conversions
    that aren't placements.
    """
    quantization = quantization_of(model.config)
    found = find_weights(checkpoint.tensors, quantization)
    if quantization is not None and all(form is PlainTensor for form, _ in found.values()):
        known = ", ".join(form.word for form in FORMATS if form is not PlainTensor)
        raise CheckpointError(
            f"{checkpoint.directory}: the weights are quantised (quantization_config in config.json) by "
            f"{quantization.get('quant_method')!r:.60}, and no weight is stored as one of {known}: use the original weights; "
            "if these are not quantised, remove quantization_config"
        )
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    sources = Sources(quantization)
    direct, placed, unexpected = _assign(model, checkpoint, found, tensors, sources)
    result = ParameterMap()
    result.direct = direct
    for name, key in direct.items():
        form, parts = found[key]
        if form is PlainTensor:
            result[name] = _plain(name, PlacementTensor.of(parts[""]), tensors[name].shape, checkpoint)
        else:
            _check_layer(model, name, form)
            result[name] = form.make(tuple(tensors[name].shape), parts, quantization)
            _check_shape(name, result[name].shape, tensors[name].shape, checkpoint)
    for name, placement in placed:
        if name not in tensors or name in result:
            continue
        if sources.has_packed(placement):
            _check_shape(name, placement.shape, tensors[name].shape, checkpoint)
            result[name] = _assembled(model, name, placement, sources)
        else:
            result[name] = _plain(name, placement, tensors[name].shape, checkpoint)
    _tie(model, tensors, result)
    _check_complete(model, checkpoint, tensors, result, unexpected, fresh)
    _check_not_quantised(checkpoint, tensors, result, quantization is not None)
    return result


def _assign(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    found: Mapping[str, FoundWeight],
    tensors: Mapping[str, Tensor],
    sources: Sources,
) -> tuple[dict[str, str], list[tuple[str, PlacementTensor]], dict[str, str]]:
    """Give each weight of the checkpoint to a parameter (parameter -> the weight's name), to one that is put together (with
    what it is put together from), or to nobody (new -> old name)."""
    if checkpoint.is_gguf:
        direct, stacks = gguf_names(model, checkpoint)
        return direct, [(name, _joined(name, keys, found, sources)) for name, keys in stacks.items()], {}
    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    direct: dict[str, str] = {}
    collected: dict[str, WeightConverter] = {}
    unexpected: dict[str, str] = {}
    for key in sorted(found, key=dot_natural_key):
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in tensors and key in tensors:
            name, pattern = rename_source_key(key, [], [], prefix, tensors)
        if name not in tensors:
            unexpected[name] = key
        elif pattern is not None:
            if name not in collected:
                collected[name] = deepcopy(by_pattern[pattern])
            collected[name].add_tensor(name, key, pattern, sources.place(name, key, found[key]))
        elif name in direct:
            unexpected[key] = key
        else:
            direct[name] = key
    placed = [item for name, converter in collected.items() for item in run_converter(converter, name, model).items()]
    return direct, placed, unexpected


def _joined(name: str, keys: Sequence[str], found: Mapping[str, FoundWeight], sources: Sources) -> PlacementTensor:
    """Stacks of matrices in a GGUF file, whose matrices are joined one by one, along their rows."""
    entries = [found[key].parts["stored"] for key in keys]
    for entry in entries:
        expected = (*entries[0].shape[:1], entry.shape[-2], entries[0].shape[-1]) if len(entry.shape) == 3 else None
        check(entry, entry.shape == expected, f"a stack of matrices like '{keys[0]}'", f"a shape of {list(entry.shape)}")
    return torch.cat([sources.place(name, entry.name, found[entry.name]).view(entry.shape) for entry in entries], 1)


def _assembled(model: PreTrainedModel, name: str, placement: PlacementTensor, sources: Sources) -> StoredWeight:
    """A stack is no layer's: its matrices are the weights of linear layers that the module multiplies by itself."""
    weight = sources.assemble(name, placement)
    if not isinstance(weight, StackedWeights):
        for part in weight.parts if isinstance(weight, JoinedRows) else (weight,):
            _check_layer(model, name, type(part))
    return weight


def _check_layer(model: PreTrainedModel, name: str, form: type[StoredWeight]) -> None:
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, form.layers):
        raise CheckpointError(
            f"parameter '{name}' of a {type(owner).__name__} is stored as {form.word}, which is read for "
            f"{' and '.join(layer.__name__ for layer in form.layers)} only: use the original weights"
        )


def _plain(name: str, placement: PlacementTensor, shape: Sequence[int], checkpoint: Checkpoint) -> PlainTensor:
    _check_shape(name, placement.shape, shape, checkpoint)
    dtypes = sorted({box.entry.dtype for box in placement.boxes})
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{checkpoint.directory}: parameter '{name}' is put together from tensors of unlike dtypes "
            f"({', '.join(dtypes)}), expected one: save the model in one dtype"
        )
    dtype = torch_dtype(dtypes[0], f"{checkpoint.directory}: parameter '{name}'") if dtypes else torch.uint8
    return PlainTensor(dtype, tuple(shape), extents_of(name, placement))


def _check_shape(name: str, shape: Sequence[int], expected: Sequence[int], checkpoint: Checkpoint) -> None:
    if tuple(shape) != tuple(expected):
        raise CheckpointError(
            f"{checkpoint.directory}: parameter '{name}' has shape {list(shape)} in the checkpoint, the "
            f"model expects {list(expected)}: config.json and the weights are not of one model"
        )


def _tie(model: PreTrainedModel, tensors: Mapping[str, Tensor], weights: ParameterMap) -> None:
    """Resolve tied names, as `PreTrainedModel.tie_weights` does for a loaded checkpoint."""
    ties = list(model.all_tied_weights_keys.items())
    for target, source in ties:
        if source not in weights and target not in weights:
            others = (other for other, its_source in ties if its_source == source and other in weights)
            source = next(others, source)
        if target in weights and source in weights:
            _tie_both(weights, target, source)
        elif source in weights:
            _alias(weights, target, source)
        elif target in weights:
            _alias(weights, source, target)
    # Modules shared by the model's own code: one tensor under several names.
    homes = {id(tensors[name]): name for name in reversed(weights)}
    for name, tensor in tensors.items():
        if name not in weights and id(tensor) in homes:
            _alias(weights, name, homes[id(tensor)])


def _tie_both(weights: ParameterMap, target: str, source: str) -> None:
    """A tie of which the checkpoint holds both ends."""
    if not _same_values(weights[target], weights[source]):
        weights.apart += ((target, source),)
        return
    if weights[target] != weights[source]:
        weights.copies += ((weights[source], weights[target]),)
    _alias(weights, target, source)


def _alias(weights: ParameterMap, name: str, home: str) -> None:
    weights[name] = weights[home]
    weights.tied[name] = weights.tied.get(home, home)


def _check_complete(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    weights: ParameterMap,
    unexpected: Mapping[str, str],
    fresh: Collection[str],
) -> None:
    missing = tensors.keys() - weights.keys() - set(fresh)
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    # Transformers' own lists of what may be missing or left over.
    model._adjust_missing_and_unexpected_keys(info)
    weights.unused = tuple(sorted(unexpected[name] for name in info.unexpected_keys))
    weights.absent = tuple(sorted(missing - info.missing_keys))
    if info.missing_keys:
        names = sorted(info.missing_keys)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise CheckpointError(
            f"{checkpoint.directory}: {len(names)} parameter(s) of {type(model).__name__} are not in the checkpoint "
            f"({checkpoint.found}): {', '.join(names[:8])}{more}. {_why_missing(model, checkpoint, names)}"
        )


def _check_not_quantised(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], weights: ParameterMap, is_quantised: bool
) -> None:
    """Quantised weights that no format has found, or whose config.json doesn't say so: integers, or 8 bits with a scale that no
    parameter takes. is_quantised: whether config.json says so of others; numbers of 8 bits then have lost their scales."""
    scales = [name for name in weights.unused if "scale" in name.rpartition(".")[2]]
    for name, weight in weights.items():
        if not isinstance(weight, PlainTensor):
            continue
        is_scaled = weight.dtype.itemsize == 1 and (bool(scales) or is_quantised)
        if tensors[name].is_floating_point() and (not weight.dtype.is_floating_point or is_scaled):
            scaled = f" with scales beside it ({scales[0]})" if is_scaled and scales else ""
            raise CheckpointError(
                f"{checkpoint.directory}: parameter '{name}' is stored as {weight.word}{scaled}, "
                "expected a floating-point number of its own: the weights are quantised, use the original ones"
            )


def _why_missing(model: PreTrainedModel, checkpoint: Checkpoint, names: Sequence[str]) -> str:
    if checkpoint.lost:
        tensor, file = next(iter(checkpoint.lost.items()))
        return f"'{tensor}' should be in {file}, which doesn't hold it: download the model again"
    ties = model._tied_weights_keys
    if isinstance(ties, Mapping) and set(names) <= set(ties):
        return (
            f"If it is one with {ties[names[0]]}, set tie_word_embeddings to true in config.json; else the model was saved "
            "without its head"
        )
    return "Is it another model's, or one without this head?"


def _same_values(first: StoredWeight, second: StoredWeight) -> bool:
    """Whether two weights hold the same numbers: plain ones in whatever dtypes, others only where they are the same bytes."""
    if first == second:
        return True
    if not isinstance(first, PlainTensor) or not isinstance(second, PlainTensor) or first.shape != second.shape:
        return False
    same_dtype, count = first.dtype == second.dtype, prod(first.shape)
    for start in range(0, count, _COMPARED_ELEMENTS):
        a, b = (_read(tensor, start, min(start + _COMPARED_ELEMENTS, count)) for tensor in (first, second))
        if not (a == b if same_dtype else _numbers(a, first.dtype).equal(_numbers(b, second.dtype))):
            return False
    return True


def _numbers(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).double()


def _read(tensor: PlainTensor, start: int, stop: int) -> bytes:
    """Elements [start, stop)."""
    itemsize, parts = tensor.dtype.itemsize, []
    for extent in tensor.cut(start * itemsize, stop * itemsize):
        with open(extent.path, "rb") as file:
            parts.append(os.pread(file.fileno(), extent.num_bytes, extent.file_offset))
    return b"".join(parts)


def copies_of(copies: Iterable[tuple[PlainTensor, PlainTensor]], path: Path, offset: int, num_bytes: int) -> list[Extent]:
    """Where else bytes [offset, offset + num_bytes) of a file are kept, by `ParameterMap.copies`; target offsets count from
    `offset`."""
    found = []
    for home, copy in copies:
        for extent in home.extents:
            low, high = max(offset, extent.file_offset), min(offset + num_bytes, extent.file_offset + extent.num_bytes)
            if extent.path == path and low < high:
                shift = extent.target_offset - extent.file_offset
                again = copy.cut(low + shift, high + shift)
                found += [e._replace(target_offset=e.target_offset - shift - offset) for e in again]
    return found
