"""Checkpoints as bitsandbytes packs them, written and read from the published formats, in NumPy and number by number where it
can be: nothing of this is the project's or bitsandbytes' code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
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


def pack_4bit(
    weight: torch.Tensor, kind: str, nested: bool, block: int = 64, dtype: str = "bfloat16"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What is stored of a matrix, by what follows its name, and the numbers that this stands for."""
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


def pack_int8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same for LLM.int8(); names follow that of the module."""
    scales = weight.float().abs().amax(1)
    packed = (weight.float() * 127 / scales[:, None]).round().to(torch.int8)
    numbers = packed.float() * scales[:, None] * (1 / 127)
    return {".weight": packed, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}, numbers


def write_packed(
    model: Path, folder: Path, kind: str, nested: bool = False, ends: tuple[str, ...] = ("proj.weight",)
) -> tuple[Path, Path]:
    """Of a tiny checkpoint, that with packed linear layers, and that of the numbers which these stand for. ends: of their
    names."""
    packed, decoded = (shutil.copytree(model, folder / name) for name in ("packed", "decoded"))
    for shard in sorted(packed.glob("*.safetensors")):
        stored, dense = {}, load_file(shard)
        for name, value in dense.items():
            if not name.endswith(ends):
                stored[name] = value
            elif kind == "int8":
                parts, dense[name] = pack_int8(value)
                stored |= {name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
            else:
                parts, dense[name] = pack_4bit(value, kind, nested)
                stored |= {name + suffix: part for suffix, part in parts.items()}
        save_file(stored, shard)
        save_file(dense, decoded / shard.name)
    section = {"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8", "load_in_4bit": kind != "int8"}
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
