"""Checkpoints as GPTQ and AWQ pack them, written from the published formats in NumPy, bit by bit: nothing of this is the
project's or a library's code."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packed_checkpoints import set_config
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Gptq:
    """How GPTQ packs a matrix."""

    bits: int = 4
    group_size: int = 16
    act_order: bool = False
    format: str = "gptq"
    has_groups: bool = True
    dtype: torch.dtype = torch.float16
    """Of scales."""

    @property
    def section(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "desc_act": self.act_order, "sym": False,
            "checkpoint_format": self.format,
        }  # fmt: skip

    def pack(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What is stored of a matrix, by what follows the layer's name, and the numbers that this stands for."""
        inputs = weight.shape[1]
        groups = np.arange(inputs) // (inputs if self.group_size == -1 else self.group_size)
        if self.act_order:
            groups = np.random.default_rng(inputs).permutation(groups)
        codes, zeros, scales, numbers = quantise(weight, groups, self.bits, self.dtype, int(self.format == "gptq"))
        stored = {
            ".qweight": pack_words(codes, self.bits).T, ".qzeros": pack_words(zeros.T - (self.format == "gptq"), self.bits),
        }  # fmt: skip
        if self.has_groups:
            stored[".g_idx"] = groups.astype(np.int32)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in stored.items()}
        return tensors | {".scales": scales.T.contiguous()}, numbers


@dataclass(frozen=True)
class Awq:
    """How AWQ packs a matrix, in its version for matrix-matrix kernels."""

    group_size: int = 8
    dtype: torch.dtype = torch.float16
    """Of scales."""

    @property
    def section(self) -> dict[str, Any]:
        return {
            "quant_method": "awq", "bits": 4, "group_size": self.group_size, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": None,
        }  # fmt: skip

    def pack(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """As that of `Gptq`."""
        outputs, inputs = weight.shape
        groups = np.arange(inputs) // (inputs if self.group_size == -1 else self.group_size)
        codes, zeros, scales, numbers = quantise(weight, groups, 4, self.dtype, 0)
        order = np.arange(outputs).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
        stored = {".qweight": pack_words(codes.T[:, order], 4), ".qzeros": pack_words(zeros.T[:, order], 4)}
        return {name: torch.from_numpy(value) for name, value in stored.items()} | {".scales": scales.T.contiguous()}, numbers


def quantise(
    weight: torch.Tensor, groups: np.ndarray, bits: int, dtype: torch.dtype, least_zero: int
) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    """groups: of each input -> codes [outputs, inputs], zero points and scales [outputs, groups], and the numbers."""
    values, top = weight.double().numpy(), 2**bits - 1
    members = [values[:, groups == group] for group in range(groups.max() + 1)]
    low = np.stack([np.minimum(values.min(1), 0) for values in members], 1)
    high = np.stack([np.maximum(values.max(1), 0) for values in members], 1)
    scales = torch.from_numpy(np.maximum((high - low) / top, 1e-4)).to(dtype)
    steps = scales.double().numpy()
    zeros = np.clip(np.round(-low / steps), least_zero, top).astype(np.int64)
    codes = np.clip(np.round(values / steps[:, groups]) + zeros[:, groups], 0, top).astype(np.int64)
    exact = (codes - zeros[:, groups]) * steps[:, groups]  # in fp64: rounded once, to the dtype of the scales
    return codes, zeros, scales, torch.from_numpy(exact).to(dtype)


def pack_words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """[rows, n] -> int32 [rows, n * bits / 32]: one number after the other, the lowest bit first."""
    fields = (numbers[:, :, None] >> np.arange(bits) & 1).astype(np.uint8)
    return np.packbits(fields.reshape(len(numbers), -1), axis=1, bitorder="little").view(np.int32)


def write_grouped(
    model: Path, folder: Path, how: Any, ends: tuple[str, ...] = ("proj.weight",)
) -> tuple[Path, Path]:
    """Of a tiny checkpoint, that with packed linear layers, and that of the numbers which these stand for. ends: of their
    names."""
    packed, decoded = (shutil.copytree(model, folder / name) for name in ("packed", "decoded"))
    for shard in sorted(packed.glob("*.safetensors")):
        stored, dense = {}, load_file(shard)
        for name, value in dense.items():
            if name.endswith(ends):
                parts, numbers = how.pack(value)
                dense[name] = numbers.to(value.dtype)
                stored |= {name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
            else:
                stored[name] = value
        save_file(stored, shard)
        save_file(dense, decoded / shard.name)
    set_config(packed, quantization_config=how.section)
    return packed, decoded
