"""The noise and the pass of `finetune.offload.noise.noise`, written again in plain NumPy from their definition; one operation a
line."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

F32 = np.float32


def philox(counters: np.ndarray, parameter: int, seed: int) -> np.ndarray:
    """Philox4x32-10 of Salmon et al. 2011. counters: uint64 [n]. Returns uint32 [n, 4]."""
    low = np.uint64(0xFFFFFFFF)
    c = [
        counters & low,
        counters >> np.uint64(32),
        np.full_like(counters, parameter & 0xFFFFFFFF),
        np.full_like(counters, parameter >> 32),
    ]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            p0 & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=1).astype(np.uint32)


def noise(kind: str, seed: int, parameter: int, first: int, count: int) -> np.ndarray:
    """fp32 [count]: the noise of elements [first, first + count)."""
    group = first // 128  # elements whose words are one or 16 counters
    groups = (first + count - 1) // 128 + 1 - group
    each = 1 if kind == "rademacher" else 16
    words = philox(np.arange(group * each, (group + groups) * each, dtype=np.uint64), parameter, seed)
    if kind == "rademacher":
        bits = (words.reshape(-1, 1) >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
        values = 1 - 2 * bits.reshape(-1).astype(F32)
    else:
        values = np.concatenate([z.reshape(groups, 64) for z in _normals(words.reshape(-1))], axis=1).reshape(-1)
    return values[first - group * 128 :][:count]


def _normals(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bits = ((word & 0xFFFF) * 2 + 1).astype(F32).view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    f = (bits - (exponent << np.int32(23))).view(F32) - F32(1)
    q = f * F32(0.285838) - F32(0.44111767)
    for c in (0.5080658, -0.66516054, 0.9998043, -2.000009):
        q = q * f + F32(c)
    radius = np.sqrt((exponent - 17).astype(F32) * F32(-1.3862944) + q * f)
    x = (word << np.uint32(2)).view(np.int32).astype(F32) * F32(float.fromhex("0x1.921fb6p-32"))
    z = x * x
    sine = ((z * F32(0.008150057) - F32(0.16662382)) * z + F32(0.9999985)) * x
    cosine = (z * F32(0.040362295) - F32(0.4996855)) * z + F32(0.9999882)
    cosine = np.where(word >> np.uint32(31) == 1, -cosine, cosine)
    swapped = (word >> np.uint32(30)) & 1 == 1
    return radius * np.where(swapped, sine, cosine), radius * np.where(swapped, cosine, sine)


def low_rank(seed: int, shared_seed: int, parameter: int, rank: int, rows: int, columns: int) -> np.ndarray:
    """fp32 [rows, columns]: U V^T / sqrt(rank), the root in U, the sum in the order of the ranks."""
    u = noise("gaussian", seed, parameter ^ 0x5555555555555555, 0, rows * rank).reshape(rows, rank)
    return _product(u * _root(rank), shared_seed, parameter, columns)


def _root(rank: int) -> np.float32:
    return torch.tensor(rank, dtype=torch.float32).rsqrt().numpy()


def _product(u: np.ndarray, shared_seed: int, parameter: int, columns: int) -> np.ndarray:
    rank = u.shape[1]
    v = noise("gaussian", shared_seed, parameter ^ 0xAAAAAAAAAAAAAAAA, 0, columns * rank).reshape(columns, rank)
    z = u[:, :1] * v[:, 0]
    for k in range(1, rank):
        z = z + u[:, k : k + 1] * v[:, k]
    return z


def moved_low_rank(parameter: int, theta: torch.Tensor, groups: Sequence, rank: int) -> torch.Tensor:
    """fp32, flat: a matrix with groups (of rounding "exact") of low-rank noise applied."""
    rows, columns = theta.numel() // theta.shape[-1], theta.shape[-1]
    value = theta.float().reshape(rows, columns).numpy()
    for group in groups:
        u = np.zeros(rows * rank, F32)
        for seed, coefficient in group.updates:
            u += F32(coefficient) * noise("gaussian", seed, parameter ^ 0x5555555555555555, 0, rows * rank)
        value = value * F32(group.scale) + _product(
            u.reshape(rows, rank) * _root(rank), group.shared_seed, parameter, columns
        )
    return torch.from_numpy(value).flatten()


def moved(kind: str, parameter: int, theta: torch.Tensor, groups: Sequence, first: int = 0) -> torch.Tensor:
    """fp32: `theta` with the groups (of rounding "exact") applied."""
    theta = theta.float().flatten().clone()
    for group in groups:
        total = torch.zeros_like(theta)
        together = 4 if kind == "rademacher" else 1
        for start in range(0, len(group.updates), together):
            part = torch.zeros_like(theta)
            for seed, coefficient in group.updates[start : start + together]:
                part += torch.tensor(coefficient, dtype=torch.float32) * torch.from_numpy(
                    noise(kind, seed, parameter, first, theta.numel())
                )
            total += part
        theta = theta * torch.tensor(group.scale, dtype=torch.float32) + total
    return theta
