"""Low-rank noise met in products, against a plain loop whose linear layers add NumPy's factors to what they multiply."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from typing import Any

import noise_reference as reference
import numpy as np
import pytest
import torch
from test_perturbations import PLACEMENTS, PlainMezo, assert_exported, zo_config, zo_run
from tiny_models import CONFIGS
from torch import nn

import finetune.offload.weights.parts
from finetune.offload.noise.noise import parameter_key

ZO = {"noise": "low_rank", "rank": 3, "perturb": "products", "perturbations": 2, "fold_steps": 2}


class PlainProducts(PlainMezo):
    """As `PlainMezo`, but linear layers of blocks and the head multiply by weights as they were at the last fold."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.windows: list[tuple[dict[int, float], float, int]] = []  # closed ones since the last fold
        names = {id(p): n for n, p in self.model.named_parameters()}
        self.matrices = set()
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and (path == "lm_head" or ".layers." in path):
                self.matrices.add(names[id(module.weight)])
                module.forward = partial(self.product, module, names[id(module.weight)])
        self.bases = {name: self.values[name].clone() for name in self.matrices}

    def set(self, seed: int, coefficient: float) -> None:
        super().set(seed, coefficient)
        self.variant = (seed, coefficient)
        self.made: dict[str, tuple] = {}

    def end_group(self, step: int) -> None:
        self.windows.append((*self.sum_of_group(), self.shared_seed))
        super().end_group(step)
        if self.zo.rounding == "nearest":
            self.values = {name: value.bfloat16().float() for name, value in self.values.items()}
        if step % self.zo.steps_between_folds == 0:
            self.bases = {name: self.values[name].clone() for name in self.matrices}
            self.windows = []

    def factors(
        self, name: str, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
        """The scale of W, V^T of every window and of the noise, U of the same."""
        key, rank = parameter_key(name), self.zo.noise_rank
        root = torch.tensor(rank, dtype=torch.float32).rsqrt()

        def u(seed: int) -> np.ndarray:
            return reference.noise("gaussian", seed, key ^ 0x5555555555555555, 0, rows * rank)

        def v(seed: int) -> torch.Tensor:
            z = reference.noise("gaussian", seed, key ^ 0xAAAAAAAAAAAAAAAA, 0, columns * rank)
            return torch.from_numpy(z).view(columns, rank).t()

        windows = self.windows + ([(*self.sum_of_group(), self.shared_seed)] if self.group else [])
        ups, downs, later = [], [], 1.0
        for coefficients, scale, shared in reversed(windows):
            total = np.zeros(rows * rank, np.float32)
            for seed, c in coefficients.items():
                total = total + np.float32(c) * u(seed)
            up = torch.from_numpy(total).view(rows, rank) * root * later
            ups.insert(0, up.to(dtype))
            downs.insert(0, v(shared).to(dtype))
            later *= scale
        seed, coefficient = self.variant
        if coefficient:
            ups.append((torch.from_numpy(u(seed)).view(rows, rank) * root * coefficient).to(dtype))
            downs.append(v(self.shared_seed).to(dtype))
        return later, downs, ups

    def product(self, module: nn.Linear, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.bases[name].view(module.weight.shape).to(x.dtype)
        if name not in self.made:
            self.made[name] = self.factors(name, *weight.shape, x.dtype)
        scale, downs, ups = self.made[name]
        flat = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(flat, weight)
        if ups:
            y = torch.addmm(y, flat @ torch.cat(downs).t(), torch.cat(ups, dim=1).t(), beta=scale)
        if module.bias is not None:
            y = y + module.bias
        return y.view(*x.shape[:-1], -1)


ARCHITECTURES = [name for name in CONFIGS if name not in ("vit", "gpt2")]


@pytest.mark.every(7)
@pytest.mark.parametrize(
    "name, device, dtype",
    [
        *((name, "cpu", dtype) for name, dtype in zip(ARCHITECTURES, cycle(["float32", "bfloat16"]))),
        ("llama", "simulated", "bfloat16"), ("mixtral", "simulated", "float32"),
    ],
)  # fmt: skip
def test_architectures(name, device, dtype, checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    config = zo_config(
        checkpoint(name, getattr(torch, dtype)), tokens, tmp_path / "out", ZO, device=device,
        training={"max_steps": 7, "weight_decay": 0.1}, engine={"dtype": dtype, **PLACEMENTS[1]},
    )  # fmt: skip
    plain = PlainProducts(config).run()
    assert zo_run(config) == plain.losses
    assert_exported(config, plain, tmp_path / "tuned")


@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("rounding", "dtype", "engine"),
    [("exact", dtype, engine) for dtype in ("float32", "bfloat16") for engine in PLACEMENTS]
    + [("nearest", "bfloat16", PLACEMENTS[0])],
    ids=str,
)
def test_folds(rounding, dtype, engine, checkpoint, tokens, tmp_path):
    """Two windows are factors, then they are folded into fp32 weights, which are converted at each use, or into bf16 ones."""
    config = zo_config(
        checkpoint("llama-tied", torch.bfloat16), tokens, tmp_path / "out", ZO | {"rank": 16, "rounding": rounding},
        training={"max_steps": 11}, engine={"dtype": dtype, **engine},
    )  # fmt: skip
    assert config.zo.steps_between_folds == 4
    plain = PlainProducts(config).run()
    assert zo_run(config) == plain.losses
    assert_exported(config, plain, tmp_path / "tuned")
    assert [path.name for path in (config.output / "weights").iterdir()] == ["step-00000008"]
