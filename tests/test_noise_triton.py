"""The accelerator's noise: the same bits as the CPU's, interpreted where there is none; compiled, no operation is fused."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from finetune.offload.noise import noise
from finetune.offload.noise import triton_kernels as noise_triton  # noqa: E402
from finetune.offload.noise.noise import Group, Noise, Target, Update  # noqa: E402

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
KEY = noise.parameter_key("layers.3.mlp.weight")
UPDATES = tuple(Update((1 << 63) + 11 * i, 1e-3 * (i + 1)) for i in range(6))
PENDING = [
    Group(0.99, UPDATES), Group(1.0, UPDATES[:1], "nearest"), Group(0.5, ()), Group(1.0, UPDATES[:4], "stochastic", 2**64 - 9),
]  # fmt: skip
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from finetune.offload.noise import triton_kernels as noise_triton

pass_, types = noise_triton._pass, {
    "source": "*bf16", "first_element": "i64", "end_element": "i64", "parameter": "i64", "scales": "*fp32",
    "firsts": "*i32", "roundings": "*i32", "rounding_seeds": "*i64", "num_groups": "i32", "seeds": "*i64",
    "coefficients": "*fp32", "target0": "*bf16", "target1": "*bf16", "target_seeds": "*i64", "target_coefficients": "*fp32",
}
for kind in (0, 1):
    constants = {"KIND": kind, "ROUNDED_TO": 1, "TARGETS": 2, "SAME_NOISE": True, "TILE": noise_triton.TILE}
    source = ASTSource(
        fn=pass_, signature={name: types.get(name, "constexpr") for name in pass_.arg_names},
        constexprs={(pass_.arg_names.index(name),): value for name, value in constants.items()},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"enable_fp_fusion": False})
    print(kernel.asm["ptx"])
"""


@pytest.mark.every(5)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count, first", [(1, 0), (4096, 0), (2999, 77), (300, (1 << 39) - 130)])
@pytest.mark.parametrize("pending", [(), PENDING], ids=["clean", "pending"])
def test_the_same_bits_as_on_the_cpu(kind, dtype, count, first, pending):
    torch.manual_seed(count)
    source = torch.randn(count).to(dtype)
    source[0] = float("inf")

    def targets(second_seed: int) -> list[Target]:
        kinds = (torch.bfloat16, torch.float32)
        return [
            Target(torch.empty(count, dtype=d), seed, c)
            for d, seed, c in zip(kinds, (5, second_seed), (1e-2, -1e-2), strict=True)
        ]

    for second_seed in (5, 6):
        expected = targets(second_seed)
        found = [target._replace(tensor=target.tensor.to(DEVICE)) for target in targets(second_seed)]
        noise.move(Noise(kind), noise.Parameter(KEY, stored_dtype=torch.bfloat16), source, pending, expected, first)
        noise_triton.move(
            kind, noise.Parameter(KEY, stored_dtype=torch.bfloat16), source.to(DEVICE), pending, found, first
        )
        for a, b in zip(expected, found, strict=True):
            assert a.tensor.equal(b.tensor.cpu())


def test_in_place_and_without_noise():
    source = torch.randn(1000).half()
    expected, found = source.clone(), source.to(DEVICE, copy=True)
    groups = [Group(0.9, UPDATES[:2], "nearest")]
    noise.move(
        Noise("gaussian"), noise.Parameter(KEY, stored_dtype=torch.float16), expected, groups, [Target(expected)]
    )
    noise_triton.move("gaussian", noise.Parameter(KEY, stored_dtype=torch.float16), found, groups, [Target(found)], 0)
    assert found.cpu().equal(expected) and not expected.equal(source)


@pytest.mark.parametrize("rank", [1, 3])
def test_products_in_pytorch_are_those_of_the_native_pass(rank, monkeypatch):
    """What a device does for noise of low rank, here on CPU tensors."""
    monkeypatch.setattr(noise, "_PRODUCT_ELEMENTS", 100)  # several pieces
    rows, columns = 13, 37
    source = torch.randn(rows, columns).bfloat16()
    groups = [Group(0.9, UPDATES[:3], "nearest", shared_seed=8), Group(1.0, UPDATES[3:], shared_seed=9)]
    expected = [
        Target(torch.empty(rows, columns).to(d), 5, c, 9) for d, c in ((torch.bfloat16, 0.1), (torch.float32, -0.1))
    ]
    noise.move(
        Noise("low_rank", rank), noise.Parameter(KEY, columns, stored_dtype=torch.bfloat16), source, groups, expected
    )
    found = [target._replace(tensor=torch.empty_like(target.tensor)) for target in expected]

    def factors(updates, shared_seed):
        u, v = torch.zeros(rows * rank), torch.zeros(columns * rank)
        noise.move(
            Noise("gaussian"), noise.Parameter(KEY ^ noise._ROW_KEY), u, [Group(1.0, tuple(updates))], [Target(u)]
        )
        noise.move(Noise("gaussian"), noise.Parameter(KEY ^ noise._COLUMN_KEY), v, (), [Target(v, shared_seed, 1.0)])
        return (u * torch.tensor(float(rank)).rsqrt()).view(rows, rank), v.view(columns, rank).t()

    noise._add_products(
        source, groups, found, [factors(g.updates, g.shared_seed) for g in groups],
        [factors([Update(t.seed, 1.0)], t.shared_seed) for t in found], noise.Parameter(KEY, columns, torch.bfloat16),
    )  # fmt: skip
    for a, b in zip(expected, found, strict=True):
        assert a.tensor.equal(b.tensor)


def test_compiled_for_a_gpu_nothing_is_fused_or_approximate(compiled):
    printed = compiled(COMPILE)
    operations = set(re.findall(r"\b((?:add|sub|mul|fma|sqrt|div|ex2|lg2)\.\S*f32)", printed))
    assert operations == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "sqrt.rn.f32"}
