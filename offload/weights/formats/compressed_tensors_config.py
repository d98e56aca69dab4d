"""What `quantization_config` of compressed-tensors says of a weight, proved before any number is made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.offload.files.checkpoint import CheckpointError

FORMATS_READ = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
"""Values of `format` that are read."""

_STRATEGIES = ("tensor", "channel", "group", "block")
_PACKED_BITS = (2, 4, 8)  # a number of another size may lie in two words, and older versions put them elsewhere


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of a group of layers are quantised."""

    num_bits: int
    """Of an integer; of a float, 8."""
    is_float: bool
    """Whether a number is an E4M3."""
    is_packed: bool
    """Whether several integers lie in a word of 32 bits."""
    is_symmetric: bool
    """Whether there are no zero points."""
    strategy: str
    """What a scale is of: a tensor, a channel (row), a group of columns or a block."""
    block: tuple[int, int]
    """Rows and columns of a group or a block; else without meaning."""
    quantises_inputs: bool
    """Whether kernels for such layers round their inputs."""


def is_compressed_tensors(quantization: Mapping[str, Any] | None) -> bool:
    """Whether `quantization_config` names it."""
    return quantization is not None and quantization.get("quant_method") == "compressed-tensors"


def check_section(quantization: Mapping[str, Any], directory: Path) -> None:
    """Raises CheckpointError, by its name, for a part of compressed-tensors that is not read. directory: of config.json."""
    sparsity = quantization.get("sparsity_config") or {}
    transforms = quantization.get("transform_config") or {}
    if isinstance(sparsity, Mapping) and (form := sparsity.get("format", "dense")) != "dense":
        raise _unsupported(directory, f"sparse weights ({form!r:.40})")
    if not isinstance(transforms, Mapping) or transforms.get("config_groups"):
        raise _unsupported(directory, "transformed weights (transform_config)")
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _wrong(directory, "config_groups to be an object of objects", groups)
    whole = quantization.get("format")
    for group in groups.values():
        form = group.get("format") or whole
        if group.get("weights") and form not in FORMATS_READ:
            raise _unsupported(directory, f"the format {form!r:.40}")


def schemes_of(module: str, quantization: Mapping[str, Any], directory: Path) -> list[Scheme]:
    """The schemes of the groups that may be meant for a layer, what names it before what names its class. module: its name.

    Raises CheckpointError where there is none, and for values that make no sense.
    """
    found: tuple[list[Scheme], list[Scheme]] = ([], [])
    for name, group in quantization["config_groups"].items():
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise _wrong(directory, f"targets of {name} to be a list of names", targets)
        is_named = any(_is_name(module, target, directory) for target in targets)
        is_class = any(target[:1].isupper() for target in targets)
        if (is_named or is_class) and group.get("weights"):
            found[not is_named].append(_scheme(name, group, group.get("format") or quantization["format"], directory))
    if not any(found):
        raise _wrong(directory, f"a group of config_groups with a target for '{module}'", "none")
    return found[0] + found[1]


def _is_name(module: str, target: str, directory: Path) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise _wrong(directory, f"target {target!r:.60} to be a regular expression", error) from error


def _scheme(name: str, group: Mapping[str, Any], form: str, directory: Path) -> Scheme:
    weights, where = group["weights"], f"weights of {name}"
    if not isinstance(weights, Mapping):
        raise _wrong(directory, f"{where} to be an object", weights)
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    is_packed = form == "pack-quantized"
    allowed = (8,) if kind == "float" else _PACKED_BITS if is_packed else tuple(range(1, 9))
    if kind not in ("int", "float") or kind == "float" and is_packed:
        raise _unsupported(directory, f"type {kind!r:.40} in the format {form}")
    if type(bits) is not int or bits not in allowed:
        raise _unsupported(directory, f"{bits!r:.40} bits of type {kind} in the format {form}")
    if weights.get("actorder") is True:
        raise _wrong(directory, f"actorder of {where} to be a word or null", True)
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in _STRATEGIES:
        raise _unsupported(directory, f"the strategy {strategy!r:.40}")
    block = (1, size) if strategy == "group" else weights.get("block_structure") if strategy == "block" else (1, 1)
    if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block):
        block = tuple(int(part) for part in block.split("x"))
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(part) is int and part > 0 for part in block):
        key = "group_size" if strategy == "group" else "block_structure"
        raise _wrong(directory, f"{key} of {where} to be positive", block)
    is_symmetric = weights.get("symmetric", True)
    if not isinstance(is_symmetric, bool):
        raise _wrong(directory, f"symmetric of {where} to be true or false", is_symmetric)
    inputs = bool(group.get("input_activations"))
    return Scheme(bits, kind == "float", is_packed, is_symmetric, strategy, (block[0], block[1]), inputs)


def _unsupported(directory: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{directory}: the weights are quantised by compressed-tensors with {found}, which isn't read; its formats "
        f"{', '.join(FORMATS_READ)} with scales of {', '.join(_STRATEGIES)} are: use one of these or the original weights"
    )


def _wrong(directory: Path, expected: str, found: Any) -> CheckpointError:
    return CheckpointError(
        f"{directory / 'config.json'}: quantization_config: expected {expected}, found {found!s:.80}: download the model again"
    )
