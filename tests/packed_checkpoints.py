"""Checkpoints as they are published packed, written and read from the published formats, in NumPy and number by number where it
can be: nothing of this is the project's code or that of a library that defines a format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
CODES = {"nf4": np.float32(NF4), "fp4": np.float32(FP4 + [-value for value in FP4])}
# Any 256 numbers do; bitsandbytes' are closer together around 0.
NESTED_MAP = np.sort(np.float32(np.linspace(-1, 1, 256) ** 3))

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""What is stored of a matrix, by what follows its name or its module's, and the numbers that this stands for."""


def pack_4bit(
    weight: torch.Tensor, kind: str, nested: bool, block: int = 64, dtype: str = "bfloat16"
) -> Packed:
    """Of a matrix; names follow its own."""
    flat, codes, size = weight.float().numpy().reshape(-1), CODES[kind], weight.numel()
    blocks = -(-size // block)
    absmax = np.float32([np.abs(flat[i * block : (i + 1) * block]).max() for i in range(blocks)])
    of_number = np.arange(size) // block
    found = np.abs(flat[:, None] / absmax[of_number, None] - codes).argmin(1).astype(np.uint8)
    state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(weight.shape)}
    stored = {".absmax": absmax}
    if nested:
        offset = absmax.mean(dtype=np.float32)
        groups = np.arange(blocks) // 256
        tops = np.float32([np.abs(absmax[groups == group] - offset).max() for group in range(groups[-1] + 1)])
        tops = np.maximum(tops, np.float32(1e-6))
        small = np.abs((absmax - offset)[:, None] / tops[groups, None] - NESTED_MAP).argmin(1).astype(np.uint8)
        absmax = NESTED_MAP[small] * tops[groups] + offset
        stored = {".absmax": small, ".nested_absmax": tops, ".nested_quant_map": NESTED_MAP}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    padded = np.append(found, np.uint8(0)) if size % 2 else found
    stored |= {"": (padded[::2] * 16 + padded[1::2])[:, None], ".quant_map": codes}
    stored[f".quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    numbers = torch.from_numpy(codes[found] * absmax[of_number]).view(weight.shape).to(getattr(torch, dtype))
    return {suffix: torch.from_numpy(value.copy()) for suffix, value in stored.items()}, numbers


def pack_int8(weight: torch.Tensor) -> Packed:
    """The same for LLM.int8(); names follow that of the module."""
    scales = weight.float().abs().amax(1)
    packed = (weight.float() * 127 / scales[:, None]).round().to(torch.int8)
    numbers = packed.float() * scales[:, None] * (1 / 127)
    return {".weight": packed, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}, numbers


def e4m3_values() -> np.ndarray:
    """Of every code of FP8 E4M3, fp32 [256]: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    values[exponent * 8 + mantissa == 127] = np.nan
    return np.float32(values * np.where(codes < 128, 1, -1))


def nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """uint8 codes of the nearest numbers."""
    return np.nanargmin(np.abs(values[..., None] - e4m3_values()), -1).astype(np.uint8)


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """Of every number of a matrix, the index of its block, row after row of blocks."""
    rows, columns = (np.arange(size) // part for size, part in zip(shape, block, strict=True))
    return rows[:, None] * (columns[-1] + 1) + columns


def pack_fp8(weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32) -> Packed:
    """Blocks of E4M3 with a scale each, as DeepSeek publishes them."""
    matrix, grid = weight.float().numpy(), grid_of(tuple(weight.shape), block)
    tops = np.zeros(grid.max() + 1, np.float32)
    np.maximum.at(tops, grid.reshape(-1), np.abs(matrix).reshape(-1))
    stored_scales = torch.from_numpy(tops / 448).to(scale_dtype)
    scales = stored_scales.float().numpy()
    codes = nearest_e4m3(matrix / scales[grid])
    numbers = torch.from_numpy(e4m3_values()[codes] * scales[grid])
    packed = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    return {".weight": packed, ".weight_scale_inv": stored_scales.view(-1, grid[0, -1] + 1)}, numbers


def pack_words(integers: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of unsigned integers, those of a row one after the other, lowest bits first."""
    rows = []
    for row in integers:
        value = sum(int(one) << bits * i for i, one in enumerate(row))
        rows.append([value >> shift & 0xFFFFFFFF for shift in range(0, len(row) * bits, 32)])
    return np.uint32(rows).view(np.int32)


def pack_compressed(
    weight: torch.Tensor,
    bits: int,
    block: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    symmetric: bool = True,
    words: bool = True,
    order: np.ndarray | None = None,
) -> Packed:
    """Integers as compressed-tensors stores them. dtype: of scales. words: whether several lie in one. order: the group of
    every column."""
    matrix, grid = weight.float().numpy(), grid_of(tuple(weight.shape), block)
    columns = grid[0, -1] + 1
    if order is not None:
        grid = np.arange(len(matrix))[:, None] * columns + order
    half, flat = 1 << bits - 1, grid.reshape(-1)
    low, high = np.zeros((2, grid.max() + 1), np.float32)
    np.minimum.at(low, flat, matrix.reshape(-1))
    np.maximum.at(high, flat, matrix.reshape(-1))
    wide = np.maximum(high, -low) / (half - 0.5) if symmetric else (high - low) / (2 * half - 1)
    stored = torch.from_numpy(wide).to(dtype)
    scales = stored.float().numpy()
    zeros = np.zeros_like(scales) if symmetric else np.clip(np.rint(-half - low / scales), -half, half - 1)
    found = np.clip(np.rint(matrix / scales[grid]) + zeros[grid], -half, half - 1)
    numbers = torch.from_numpy((found - zeros[grid]) * scales[grid]).to(dtype)
    parts = {".weight_scale": stored.view(-1, columns)}
    zeros = zeros.reshape(-1, columns)
    if not symmetric:
        packed = pack_words(zeros.T + half, bits).T.copy() if words else zeros.astype(np.int8)
        parts[".weight_zero_point"] = torch.from_numpy(packed)
    if order is not None:
        parts[".weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
    if not words:
        return parts | {".weight": torch.from_numpy(found.astype(np.int8))}, numbers
    packed = torch.from_numpy(pack_words(found + half, bits))
    return parts | {".weight_packed": packed, ".weight_shape": torch.tensor(weight.shape)}, numbers


E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def pack_mxfp4(experts: torch.Tensor) -> Packed:
    """Of stacked experts [experts, columns, rows] as modules have them; names follow the parameter's."""
    matrices = experts.float().numpy().transpose(0, 2, 1)
    blocks = matrices.reshape(*matrices.shape[:2], -1, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1))).astype(int) - 2
    powers = np.float32(2.0) ** exponents[..., None]
    magnitudes = np.abs((np.abs(blocks) / powers)[..., None] - E2M1).argmin(-1)
    codes = (magnitudes + np.where(blocks < 0, 8, 0)).astype(np.uint8)
    numbers = np.copysign(E2M1[magnitudes] * powers, blocks).reshape(matrices.shape).transpose(0, 2, 1)
    stored = {"_blocks": codes[..., ::2] + codes[..., 1::2] * 16, "_scales": (exponents + 127).astype(np.uint8)}
    parts = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in stored.items()}
    return parts, torch.from_numpy(np.ascontiguousarray(numbers))


def write_packed(
    model: Path, folder: Path, kind: str, nested: bool = False, ends: tuple[str, ...] = ("proj.weight",)
) -> tuple[Path, Path]:
    """Of a tiny checkpoint, that with packed linear layers, and that of the numbers which these stand for. ends: of their
    names."""

    def pack(name: str, value: torch.Tensor) -> Packed:
        if kind == "int8":
            return pack_int8(value)
        parts, numbers = pack_4bit(value, kind, nested)
        return {".weight" + suffix: part for suffix, part in parts.items()}, numbers

    section = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8", "load_in_4bit": kind != "int8"}
    return write_twice(model, folder, pack, section, ends)


def write_twice(
    model: Path,
    folder: Path,
    pack: Callable[[str, torch.Tensor], Packed | None],
    section: Mapping[str, object],
    ends: tuple[str, ...] = ("proj.weight",),
) -> tuple[Path, Path]:
    """`write_packed` for whatever `pack` makes of a weight, from its name and value: what is stored of it, by what follows the
    module's name, and its numbers; None: it stays. section: `quantization_config`."""
    packed, decoded = (shutil.copytree(model, folder / name) for name in ("packed", "decoded"))
    for shard in sorted(packed.glob("*.safetensors")):
        stored, dense = {}, load_file(shard)
        for name, value in dense.items():
            found = pack(name, value) if name.endswith(ends) else None
            if found is None:
                stored[name] = value
                continue
            parts, dense[name] = found
            stored |= {name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
        save_file(stored, shard)
        save_file(dense, decoded / shard.name)
    set_config(packed, quantization_config=section)
    return packed, decoded


def set_config(model: Path, **values: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit(model: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Changes tensors of a checkpoint by their names, None to remove one."""
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors.keys() & changes.keys():
            tensors[name] = changes[name]
        save_file({name: value for name, value in tensors.items() if value is not None}, shard)
