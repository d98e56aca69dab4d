"""APOLLO's and FRUGAL's directions, a run of elements at a time, against the papers' algorithms on whole matrices in fp64."""

from __future__ import annotations

import hashlib

import noise_reference
import pytest
import torch
from test_adafactor import unit_of

import finetune.offload.update.matrices
from finetune.offload.noise.noise import parameter_key
from finetune.offload.update.rules.apollo import Apollo
from finetune.offload.update.rules.frugal import Columns, Projection
from finetune.offload.update.rules.projected import ProjectedRule

SHAPES = [(37,), (4, 50), (23, 41), (41, 23), (3, 17, 11)]
RANK = 5


def normals(seed: int, name: str, period: int, matrix: int, count: int) -> torch.Tensor:
    seed = int.from_bytes(hashlib.blake2b(f"{seed}/projection/{period}".encode(), digest_size=8).digest(), "little")
    return torch.from_numpy(noise_reference.noise("gaussian", seed, parameter_key(name), matrix * count, count)).double()


class Reference:
    """One matrix [n, m] with n <= m, in fp64."""

    def __init__(self, rule: ProjectedRule, name: str, matrix: int, seed: int = 9) -> None:
        self.rule, self.name, self.matrix, self.seed = rule, name, matrix, seed
        self.updates = self.since = 0
        self.first = self.second = 0.0

    def project(self, g: torch.Tensor) -> None:
        rule, n = self.rule, len(g)
        period, step = divmod(self.updates, rule.refresh_steps)
        if step == 0 and not isinstance(rule, Apollo):
            self.first = self.second = self.since = 0
        z = normals(self.seed, self.name, period, self.matrix, rule.rank * n)
        if isinstance(rule, Apollo):
            self.p = z.view(rule.rank, n) / rule.rank**0.5
        elif isinstance(rule, Projection):
            self.p = torch.linalg.qr(z.view(rule.rank, n).T).Q.T
        else:
            self.p = torch.eye(n, dtype=torch.float64)[z[:n].argsort()[: rule.rank]]
        self.low = self.p @ g
        self.adam(self.low)

    def adam(self, low: torch.Tensor) -> None:
        (beta1, beta2), self.updates, self.since = self.rule.betas, self.updates + 1, self.since + 1
        self.first = beta1 * self.first + (1 - beta1) * low
        self.second = beta2 * self.second + (1 - beta2) * low**2
        root = (self.second / (1 - beta2**self.since)).sqrt() + self.rule.adam_epsilon
        self.u = self.first / (1 - beta1**self.since) / root

    def frugal(self, g: torch.Tensor) -> torch.Tensor:
        self.project(g)
        return self.p.T @ self.u + self.rule.sign_scale * (g - self.p.T @ self.low).sign()

    def apollo(self, g: torch.Tensor) -> torch.Tensor:
        self.project(g)
        if self.rule.rank == 1:
            return self.rule.scale**0.5 * g * self.u.norm() / (self.low.norm() + 1e-8)
        return self.rule.scale**0.5 * g * (self.u.norm(dim=0) / (self.low.norm(dim=0) + 1e-8))


def expected_of(
    rule: ProjectedRule, name: str, references: list[Reference], g: torch.Tensor, last_norm: list[float]
) -> torch.Tensor:
    if g.dim() < 2 or min(g.shape[-2:]) <= rule.rank:
        references[0].adam(g)
        return references[0].u
    matrices = [x if x.shape[0] <= x.shape[1] else x.T for x in g.reshape(-1, *g.shape[-2:])]
    step = Reference.apollo if isinstance(rule, Apollo) else Reference.frugal
    moved = [step(reference, x) for reference, x in zip(references, matrices, strict=False)]
    if isinstance(rule, Apollo):
        norm = torch.stack(moved).norm().item()
        limit = min(norm, 1.01 * last_norm[0]) if last_norm[0] else norm
        moved, last_norm[0] = [x * limit / norm for x in moved], limit
    return torch.stack([x if g.shape[-2] <= g.shape[-1] else x.T for x in moved]).reshape(g.shape)


class PlainDirections:
    """A torch.optim-like optimizer of one fp32 parameter."""

    def __init__(self, rule: ProjectedRule, name: str, master: torch.Tensor, seed: int) -> None:
        self.rule, self.name, self.last_norm = rule, name, [0.0]
        self.references = [Reference(rule, name, i, seed) for i in range(master.shape[:-2].numel())]
        self.param_groups = [{"params": [torch.nn.Parameter(master)]}]

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        (theta,), rate = group["params"], group["lr"]
        moved = expected_of(self.rule, self.name, self.references, theta.grad.double(), self.last_norm)
        theta.mul_(1 - rate * self.rule.weight_decay).sub_(rate * moved.float())


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1.0), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize(
    "rule",
    [
        Apollo(rank=RANK, refresh_steps=2, scale=1.5),
        Apollo(rank=1, refresh_steps=3, scale=128.0),
        Projection(rank=RANK, interval=2, sign_scale=0.1),
        Columns(rank=RANK, interval=3),
    ],
    ids=lambda rule: f"{type(rule).__name__} {rule.rank}",
)
def test_directions_are_those_of_the_papers(rule, scale, dtype, chunk, monkeypatch):
    monkeypatch.setattr(finetune.offload.update.matrices, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(3)
    unit = unit_of(SHAPES)
    state = torch.zeros(rule.factor_bytes(unit) // 4)
    references = {name: [Reference(rule, name, i) for i in range(3)] for name in unit.fqns}
    norms = {name: [0.0] for name in unit.fqns}
    for _ in range(5):
        gradients = {n: torch.randn(s).to(dtype) for n, s in zip(unit.fqns, SHAPES, strict=True)}
        found = rule.directions(unit, state, gradients, scale, 9)
        for name, gradient in gradients.items():
            g = (gradient * scale if scale != 1 else gradient).double()
            expected = expected_of(rule, name, references[name], g, norms[name]).reshape(-1)
            cuts = [0, *sorted(torch.randint(0, g.numel() + 1, (3,)).tolist()), g.numel()]
            moved = torch.cat([found[name].of(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]).double()
            # A sign of next to nothing may be the other one.
            assert (moved - expected).norm() <= 2e-4 * expected.norm() or (
                ((moved - expected).abs() > 1e-3 * expected.abs().max()).sum() <= 1 and not isinstance(rule, Apollo)
            ), name


def test_state_is_of_the_rank():
    rule, unit = Apollo(rank=RANK), unit_of(SHAPES)
    elements = 2 * (37 + 200 + RANK * 41 + RANK * 41 + 3 * RANK * 17)
    assert rule.factor_bytes(unit) == 4 * (elements + 2 * len(SHAPES))


def test_a_parameter_without_a_gradient_keeps_its_state():
    rule, unit = Projection(rank=RANK, interval=9), unit_of([(6, 8), (7, 9)])
    state = torch.zeros(rule.factor_bytes(unit) // 4)
    gradients = {"p0": torch.randn(6, 8), "p1": torch.randn(7, 9)}
    rule.directions(unit, state, gradients, 1.0, 0)
    before = state.clone()
    assert list(rule.directions(unit, state, {"p0": gradients["p0"]}, 1.0, 0)) == ["p0"]
    after, split = state, 2 * RANK * 8 + 2
    assert not after[:split].equal(before[:split]) and after[split:].equal(before[split:])
