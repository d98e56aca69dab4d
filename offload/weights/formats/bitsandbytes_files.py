"""What bitsandbytes keeps beside a packed weight, read and proved before any number is made of it."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from finetune.offload.files.checkpoint import TensorEntry, parse_json
from finetune.offload.weights.formats.stored_parts import check, check_tensor, read_bytes

CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip
"""The 16 numbers of a type, by code."""

STATES = {f"state of {word}": f".quant_state.bitsandbytes__{word}" for word in CODES}
"""Part -> what follows the weight's name: the bytes of a JSON object."""

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = ("bfloat16", "float16", "float32")
_STATE_MAX_BYTES = 4096  # bitsandbytes writes some 200
_MAX_SIZE = 1 << 31


@dataclass(frozen=True, slots=True)
class State4Bit:
    """How a matrix was packed."""

    quant_type: str
    """Which of `CODES`."""
    block_size: int
    """Numbers under one absmax."""
    dtype: torch.dtype
    """What the numbers are rounded to."""
    nested_block_size: int = 1
    """Blocks under one nested absmax."""
    nested_offset: float | None = None
    """What is added to every absmax; None where they are not nested."""


def is_bitsandbytes(quantization: Mapping[str, Any] | None) -> bool:
    """Whether `quantization_config` names it; older ones give no method."""
    if quantization is None:
        return False
    method = quantization.get("quant_method")
    return method == "bitsandbytes" or method is None and any(quantization.get(f"load_in_{n}bit") for n in (4, 8))


def read_state(shape: tuple[int, ...], parts: Mapping[str, TensorEntry]) -> State4Bit:
    """How the matrix of these parts is packed. Raises CheckpointError unless all of them fit that and `shape`."""
    word, entry, values = _read_values(parts)
    _check_value(entry, values, "quant_type", [word])
    _check_value(entry, values, "blocksize", _BLOCK_SIZES)
    _check_value(entry, values, "dtype", _DTYPES)
    _check_value(entry, values, "shape", [list(shape)])
    state = State4Bit(word, values["blocksize"], getattr(torch, values["dtype"]))
    if nested := [part for part in ("nested_absmax", "nested_map") if part in parts]:
        check(parts[nested[0]], len(nested) == 2, "nested_absmax and nested_quant_map beside one another", "it alone")
        _check_value(entry, values, "nested_blocksize", (*_BLOCK_SIZES, 16))
        _check_value(entry, values, "nested_dtype", ["float32"])
        offset = values.get("nested_offset")
        is_right = isinstance(offset, float) and abs(offset) < 1e38
        check(entry, is_right, "nested_offset to be a finite number", repr(offset))
        state = replace(state, nested_block_size=values["nested_blocksize"], nested_offset=offset)
    _check_sizes(shape, parts, state)
    return state


def read_shape(parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
    """Of the matrix of these parts. Raises CheckpointError where they do not say one."""
    _, entry, values = _read_values(parts)
    shape = values.get("shape")
    is_matrix = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < _MAX_SIZE for n in shape)
    check(entry, is_matrix, "shape to be two sizes", repr(shape))
    return shape[0], shape[1]


def _read_values(parts: Mapping[str, TensorEntry]) -> tuple[str, TensorEntry, dict[str, Any]]:
    """The type of the matrix of these parts, the tensor that says how it is packed, and what that says."""
    words = [word for word, part in zip(CODES, STATES, strict=True) if part in parts]
    found = ", ".join(words) or "none"
    check(parts["packed"], len(words) == 1, f"one quant_state out of {', '.join(CODES)} beside it", found)
    entry = next(parts[part] for part in STATES if part in parts)
    return words[0], entry, parse_json(read_bytes(entry, _STATE_MAX_BYTES), f"{entry.path}: tensor '{entry.name}'")


def _check_value(entry: TensorEntry, values: Mapping[str, Any], key: str, allowed: Collection[Any]) -> None:
    value = values.get(key)
    is_right = any(type(value) is type(one) and value == one for one in allowed)
    check(entry, is_right, f"{key} to be {' or '.join(map(str, allowed))}", repr(value))


def _check_sizes(shape: tuple[int, ...], parts: Mapping[str, TensorEntry], state: State4Bit) -> None:
    packed, count = parts["packed"], prod(shape)
    num_bytes, blocks = -(-count // 2), -(-count // state.block_size)
    check(packed, packed.num_bytes == num_bytes, f"{num_bytes} bytes for {list(shape)}", packed.num_bytes)
    if state.nested_offset is None:
        check_tensor(parts["absmax"], "F32", (blocks,))
    else:
        check_tensor(parts["absmax"], "U8", (blocks,))
        check_tensor(parts["nested_absmax"], "F32", (-(-blocks // state.nested_block_size),))
        check_tensor(parts["nested_map"], "F32", (256,))
    codes = parts["quant_map"]
    check_tensor(codes, "F32", (16,))
    values = struct.unpack("<16f", read_bytes(codes, 64))
    is_known = all(abs(value - code) <= 1e-3 for value, code in zip(values, CODES[state.quant_type], strict=True))
    check(codes, is_known, f"the numbers of {state.quant_type}", [round(value, 4) for value in values])
