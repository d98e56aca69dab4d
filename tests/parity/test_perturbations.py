"""Zeroth-order steps, streamed, against a plain MeZO loop that has the whole model in memory and NumPy's noise."""

from __future__ import annotations

import hashlib
import json
from itertools import cycle, product
from pathlib import Path
from typing import Any

import noise_reference as reference
import numpy as np
import pytest
import torch
import transformers as tf
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import CONFIGS, load_plain, loss_shares, make_config, plain_batches, reference_device, token_loss

import finetune.offload.noise.noise
import finetune.offload.weights.parts
from finetune.config import Config
from finetune.data import TokenDataset
from finetune.export import export
from finetune.methods.zeroth_order import probe_seed
from finetune.trainer import Trainer

PLACEMENTS = [
    {"resident_blocks": 0, "lookahead": 0},
    {"resident_blocks": 2, "lookahead": 1, "io_backend": "threads"},
    {"resident_blocks": 5},
]


def shared_seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/shared/{step}".encode(), digest_size=8).digest(), "little")


def zo_config(model: Path, data: Any, output: Path, zo: dict | None = None, **changes: Any) -> Config:
    training = {"max_steps": 6, "learning_rate": 1e-3, **changes.pop("training", {})}
    zo = {"epsilon": 1e-2, "fold_steps": 4, **(zo or {})}
    return make_config(model, data, output, method="zo", zo=zo, training=training, **changes)


class PlainMezo:
    """fp32 values of every parameter, brought up to date as the rule of groups says; perturbed by plain PyTorch."""

    most = float("inf")  # what coefficients are clipped to

    def __init__(self, config: Config) -> None:
        self.config, self.zo = config, config.zo
        torch.set_num_threads(config.engine.num_threads)
        if config.zo.parameters == "lora":
            self.model = load_plain(config)
            named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            self.values = {n: p.detach().cpu().float().flatten() for n, p in named.items()}
        else:
            kind = (
                tf.AutoModelForCausalLM if isinstance(config.data, TokenDataset) else tf.AutoModelForImageClassification
            )
            self.model = kind.from_pretrained(config.model, dtype=getattr(torch, config.engine.dtype))
            self.model.to(reference_device(config))
            named = dict(self.model.named_parameters())
            # The stored values, which a load in bf16 would round: in fp32 every stored dtype is exact.
            exact = kind.from_pretrained(config.model, dtype=torch.float32)
            self.values = {n: p.detach().flatten().clone() for n, p in exact.named_parameters()}
        self.model.eval()
        self.named = named
        self.group: list[tuple[dict[int, float], float]] = []
        self.losses: list[float] = []

    def sum_of_group(self) -> tuple[dict[int, float], float]:
        """Seed -> coefficient, and what the weights are multiplied by first."""
        coefficients: dict[int, float] = {}
        scale = 1.0
        for updates, step_scale in self.group:
            scale *= step_scale
            coefficients = {seed: c * step_scale for seed, c in coefficients.items()}
            for seed, c in updates.items():
                coefficients[seed] = coefficients.get(seed, 0.0) + c
        return coefficients, scale

    def up_to_date(self, name: str) -> torch.Tensor:
        coefficients, scale = self.sum_of_group()
        group = finetune.offload.noise.noise.Group(scale, tuple(coefficients.items()))
        groups = [] if not self.group else [group]
        with_pairs = [g._replace(updates=tuple(finetune.offload.noise.noise.Update(*u) for u in g.updates)) for g in groups]
        key = finetune.offload.noise.noise.parameter_key(name)
        if self.zo.noise != "low_rank":
            return reference.moved(self.zo.noise, key, self.values[name], with_pairs)
        if len(shape := self.named[name].shape) == 1:
            return reference.moved("gaussian", key, self.values[name], with_pairs)
        with_pairs = [group._replace(shared_seed=self.shared_seed) for group in with_pairs]
        return reference.moved_low_rank(key, self.values[name].view(shape), with_pairs, self.zo.noise_rank)

    def noise(self, name: str, seed: int, count: int) -> np.ndarray:
        key, shape = finetune.offload.noise.noise.parameter_key(name), self.named[name].shape
        if self.zo.noise == "low_rank" and len(shape) > 1:
            rank, columns = self.zo.noise_rank, shape[-1]
            return reference.low_rank(seed, self.shared_seed, key, rank, count // columns, columns).reshape(-1)
        return reference.noise("gaussian" if self.zo.noise == "low_rank" else self.zo.noise, seed, key, 0, count)

    def set(self, seed: int, coefficient: float) -> None:
        for name, parameter in self.named.items():
            theta = self.up_to_date(name)
            if coefficient:
                z = self.noise(name, seed, theta.numel())
                theta = theta + torch.tensor(coefficient, dtype=torch.float32) * torch.from_numpy(z)
            parameter.data = theta.view(parameter.shape).to(parameter.device, parameter.dtype)

    @torch.no_grad()
    def loss(self, batches: list[dict[str, torch.Tensor]]) -> float:
        shares, count = loss_shares(self.config, batches)
        total = torch.zeros(())
        for batch, share in zip(batches, shares, strict=True):
            batch = dict(batch)
            labels = batch.pop("labels")
            if isinstance(self.config.data, TokenDataset):
                total = total + token_loss(self.model(**batch).logits, labels) / count
            else:
                total = total + (self.model(**batch, labels=labels).loss * share).float()
        return total.item()

    def end_group(self, step: int) -> None:
        self.values = {name: self.up_to_date(name) for name in self.values}
        self.group = []

    def run(self) -> PlainMezo:
        zo, options = self.zo, self.config.training
        rate_left = [1 - max(0, s - options.warmup_steps) / (options.max_steps - options.warmup_steps)
                     if s >= options.warmup_steps else s / options.warmup_steps
                     for s in range(options.max_steps)]  # fmt: skip
        for step, batches in enumerate(plain_batches(self.config)):
            if len(self.group) == zo.group_steps:
                self.end_group(step)
            if not self.group:
                self.shared_seed = shared_seed(options.seed, step)
            seeds = [probe_seed(options.seed, step, i) for i in range(zo.perturbations)]
            losses, gradients = [], []
            for seed in seeds:
                for sign in (1, -1):
                    self.set(seed, sign * zo.epsilon)
                    losses.append(self.loss(batches))
                gradients.append(np.float32((losses[-2] - losses[-1]) / (2 * zo.epsilon)).clip(-self.most, self.most))
            lr = options.learning_rate * rate_left[step]
            updates = {s: float(np.float32(-lr / len(seeds) * float(g))) for s, g in zip(seeds, gradients, strict=True)}
            self.group.append((updates, 1.0 - lr * options.weight_decay))
            self.losses.append(float(np.mean(np.array(losses, dtype=np.float32), dtype=np.float64)))
        self.set(0, 0.0)
        return self


def zo_run(config: Config) -> list[float]:
    Trainer(config).train()
    return [json.loads(line)["loss"] for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def assert_exported(config: Config, plain: PlainMezo, folder: Path) -> None:
    """What export writes is what the plain loop ends with, in the checkpoint's own dtype."""
    export(config, folder)
    kind = type(plain.model)
    found = dict(kind.from_pretrained(folder, dtype=torch.float32).named_parameters())
    stored = next(iter(load_file(next(iter(sorted(folder.glob("*.safetensors"))))).values())).dtype
    for name in plain.named:
        assert found[name].flatten().equal(plain.up_to_date(name).to(stored).float()), name


@pytest.mark.every(3)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architectures(name, dtype, checkpoint, tokens, images, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    model = checkpoint(name, getattr(torch, dtype))
    config = zo_config(model, images if name == "vit" else tokens, tmp_path / "out", engine={"dtype": dtype})
    plain = PlainMezo(config).run()
    assert zo_run(config) == plain.losses
    assert_exported(config, plain, tmp_path / "tuned")


@pytest.mark.every(2)
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_fifty_steps(noise, checkpoint, tokens, tmp_path):
    """Twelve of them folds."""
    config = zo_config(
        checkpoint("llama", torch.bfloat16), tokens, tmp_path / "out", {"noise": noise},
        training={"max_steps": 50}, engine={"dtype": "bfloat16", **PLACEMENTS[0]},
    )  # fmt: skip
    plain = PlainMezo(config).run()
    assert zo_run(config) == plain.losses
    assert_exported(config, plain, tmp_path / "tuned")


ALTERNATING = ["gaussian", "rademacher", "rademacher", "gaussian"]  # each with every placement or every device


@pytest.mark.every(5)
@pytest.mark.parametrize(
    "engine, device, noise",
    [(*place, noise) for place, noise in zip(product(PLACEMENTS, ["cpu", "simulated"]), cycle(ALTERNATING))],
    ids=str,
)
def test_placements(device, engine, noise, checkpoint, tokens, tmp_path):
    model = checkpoint("llama", torch.bfloat16)
    config = zo_config(
        model, tokens, tmp_path / "out", {"noise": noise, "perturbations": 2}, device=device, engine=engine,
        training={"max_steps": 9, "weight_decay": 0.1},
    )  # fmt: skip
    plain = PlainMezo(config).run()
    assert zo_run(config) == plain.losses
    assert_exported(config, plain, tmp_path / "tuned")


@pytest.mark.every(3)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_low_rank(name, device, checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    zo = {"noise": "low_rank", "rank": 3, "perturbations": 2}
    config = zo_config(
        checkpoint(name, torch.bfloat16), tokens, tmp_path / "out", zo, device=device,
        training={"max_steps": 9, "weight_decay": 0.1}, engine={"dtype": "bfloat16", **PLACEMENTS[0]},
    )  # fmt: skip
    plain = PlainMezo(config).run()
    assert zo_run(config) == plain.losses
    assert_exported(config, plain, tmp_path / "tuned")


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]], ids=["blocks", "head"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters(name, targets, checkpoint, tokens, tmp_path):
    lora = {"dropout": 0.0, "target_modules": targets}
    config = zo_config(checkpoint(name), tokens, tmp_path / "out", {"parameters": "lora"}, lora=lora)
    plain = PlainMezo(config).run()
    assert zo_run(config) == plain.losses
    found = load_file(config.output / "adapter" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(plain.model, save_embedding_layers=False)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].equal(value.cpu()), key
