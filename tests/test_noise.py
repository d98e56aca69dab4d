"""The noise kernels against a plain NumPy transcription, bit for bit, on every instruction set and odd sizes."""

from __future__ import annotations

import noise_reference as reference
import numpy as np
import pytest
import torch

from finetune.offload.noise.noise import (
    INSTRUCTION_SETS,
    Group,
    Noise,
    Parameter,
    Target,
    Update,
    move,
    parameter_key,
    sample,
)

KINDS = ["rademacher", "gaussian"]
SIZES = [1, 7, 127, 128, 129, 2047, 2048, 2049, 5000, 40_001]
GROUPS = (
    Group(1.0, (Update(3, 0.5), Update(2**64 - 1, -1e-3))),
    Group(0.75, tuple(Update(seed, 0.01 * (seed - 9)) for seed in range(19))),
    Group(0.5, ()),
)


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32-10."""
    known = [
        (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for counter, parameter, seed, words in known:
        found = reference.philox(np.array([counter], dtype=np.uint64), parameter, seed)[0]
        assert " ".join(f"{word:08x}" for word in found) == words


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", SIZES)
def test_samples(kind, count, instructions):
    for first in (0, 5, 2048 * 3 + 77, 2**40 + 1):
        expected = reference.noise(kind, 0xDEADBEEF12345678, 2**63 + 5, first, count)
        found = sample(kind, 0xDEADBEEF12345678, 2**63 + 5, count, first, instructions=instructions)
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 129, 4099])
def test_a_pass(kind, dtype, count, instructions):
    """Pending groups, then a pair and the weights themselves, into every dtype."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(count, generator=generator).to(dtype)
    first = 3 * 2048 - 11
    targets = [
        Target(torch.empty(count, dtype=out), seed, c)
        for out in (torch.float32, torch.bfloat16, torch.float16)
        for seed, c in ((77, 1e-3), (77, -1e-3), (0, 0.0), (78, 0.25))
    ]
    move(Noise(kind), Parameter(9), source, GROUPS, targets, first, instructions=instructions)
    theta = reference.moved(kind, 9, source, GROUPS, first)
    for target in targets:
        expected = theta
        if target.coefficient:
            z = torch.from_numpy(reference.noise(kind, target.seed, 9, first, count))
            expected = theta + torch.tensor(target.coefficient, dtype=torch.float32) * z
        assert target.tensor.equal(expected.to(target.tensor.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_threads_and_alignment_change_nothing(kind):
    count = 30_011
    memory = torch.randn(count * 4 + 8).to(torch.bfloat16)
    source = memory[3 : 3 + count]  # 6 bytes off
    whole = torch.empty(count)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        move(Noise(kind), Parameter(4), source, GROUPS, [Target(whole, 5, 0.1)])
        torch.set_num_threads(3)
        pieces = torch.empty(count)
        for start in range(0, count, 1237):
            end = min(start + 1237, count)
            move(Noise(kind), Parameter(4), source[start:end], GROUPS, [Target(pieces[start:end], 5, 0.1)], start)
    finally:
        torch.set_num_threads(before)
    assert pieces.equal(whole)
    rows = [17, 3, 400]
    some = torch.empty(3 * 40)
    gathered = torch.cat([source[r * 40 : r * 40 + 40] for r in rows])
    move(Noise(kind), Parameter(4), gathered, GROUPS, [Target(some, 5, 0.1)], [(r * 40, 40) for r in rows])
    assert some.equal(torch.cat([whole[r * 40 : r * 40 + 40] for r in rows]))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("shift", [0, 1])
def test_large_passes(instructions, shift):
    """Beyond two million elements stores go past the caches where the target is aligned."""
    count = 2_000_003
    source = torch.randn(count).bfloat16()
    target = torch.empty(count + shift, dtype=torch.bfloat16)[shift:]
    move(Noise("rademacher"), Parameter(6), source, (), [Target(target, 5, 1e-2)], instructions=instructions)
    z = torch.from_numpy(reference.noise("rademacher", 5, 6, 0, count))
    assert target.equal((source.float() + torch.tensor(1e-2) * z).bfloat16())


def test_in_place():
    weights = torch.randn(5000)
    expected = reference.moved("gaussian", 1, weights, GROUPS)
    move(Noise("gaussian"), Parameter(1), weights, GROUPS, [Target(weights)])
    assert weights.equal(expected)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_groups_that_round(instructions):
    """nearest: PyTorch's rounding after every group. stochastic: one of the two neighbours, and right on average."""
    weights = torch.randn(4099).bfloat16()
    groups = [Group(1.0, (Update(i, 1e-3),), "nearest") for i in range(3)]
    found = torch.empty(4099)
    parameter = Parameter(2, stored_dtype=torch.bfloat16)
    move(Noise("gaussian"), parameter, weights, groups, [Target(found)], instructions=instructions)
    expected = weights.float()
    for group in groups:
        expected = reference.moved("gaussian", 2, expected, [group]).bfloat16().float()
    assert found.equal(expected)

    value = 1.0 + 2**-7 * 0.3  # between two values of bf16
    same = torch.full((200_000,), value)
    groups = [Group(1.0, (), "stochastic", 5)]
    move(Noise("rademacher"), parameter, same, groups, [Target(same)], instructions=instructions)
    assert set(same.tolist()) == {1.0, 1.0 + 2**-7}
    # 5 standard deviations of a mean of 200,000 such draws.
    assert abs(same.mean().item() - value) < 5 * 2**-7 * (0.3 * 0.7 / 200_000) ** 0.5


def test_what_rounding_every_step_loses():
    """At MeZO's rates most of an update is lost when it is rounded into bf16 at once; summed first, next to nothing is.

    progress: how far the weights have gone along the sum of the updates, as a share of it.
    """
    weights = (torch.randn(200_000, generator=torch.Generator().manual_seed(2)) * 0.05).bfloat16()
    updates = [Update(seed, 1e-6) for seed in range(64)]
    noise = Noise("rademacher")

    def after(groups: list[Group]) -> torch.Tensor:
        result = torch.empty(weights.numel())
        move(noise, Parameter(7, stored_dtype=torch.bfloat16), weights, groups, [Target(result)])
        return result.double() - weights.double()

    wanted = torch.zeros(weights.numel())
    move(noise, Parameter(7), wanted, [Group(1.0, tuple(updates))], [Target(wanted)])

    def progress(groups: list[Group]) -> float:
        return float(after(groups) @ wanted.double() / wanted.double().square().sum())

    assert progress([Group(1.0, tuple(updates))]) == pytest.approx(1, abs=1e-3)
    assert progress([Group(1.0, (update,), "nearest") for update in updates]) < 0.1
    # Without bias, but each step adds noise of the size of bf16's last bit: 5 standard deviations of it.
    random = [Group(1.0, (update,), "stochastic", seed) for seed, update in enumerate(updates)]
    assert abs(progress(random) - 1) < 0.5
    assert after(random).std() > 10 * wanted.std()


def test_moments():
    """The first four moments of both kinds, within 5 standard deviations of an honest sample's."""
    n = 1 << 20
    signs = sample("rademacher", 1, 2, n).double()
    assert set(signs.tolist()) == {-1.0, 1.0} and abs(signs.mean()) < 5 / n**0.5
    assert abs((signs[1:] * signs[:-1]).mean()) < 5 / n**0.5
    z = sample("gaussian", 1, 2, n).double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < 5 * (variance / n) ** 0.5
    other = sample("gaussian", 1, 3, n).double()
    assert abs((z * other).mean()) < 5 / n**0.5


def test_normals_are_accurate():
    """Against Box-Muller in fp64 from the same words, relative to the radius; and over all 2^16 radii the variance is 1."""
    words = reference.philox(np.arange(16 * 500, dtype=np.uint64), 4, 3).reshape(-1).astype(np.int64)
    radius = np.sqrt(-2 * np.log(((words & 0xFFFF) + 0.5) * 2.0**-16))
    angle = np.pi / 2 * ((words << 2 & 0xFFFFFFFF ^ 0x80000000) - 0x80000000) * 2.0**-32
    big, small = np.where(words >> 31, -1, 1) * np.cos(angle), np.sin(angle)
    swapped = (words >> 30 & 1) == 1
    expected = np.stack([np.where(swapped, small, big), np.where(swapped, big, small)]) * radius
    z = sample("gaussian", 3, 4, 64_000).double().numpy().reshape(-1, 2, 64).transpose(1, 0, 2).reshape(2, -1)
    assert (abs(z - expected) / radius).max() < 2e-5
    assert np.mean(-2 * np.log((np.arange(1 << 16) + 0.5) * 2.0**-16)) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("shape", [(7, 40), (33, 1025), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank(rank, dtype, shape):
    """Matrices, stacks of them, and pieces that begin within a row."""
    source = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    noise, columns, count = Noise("low_rank", rank), shape[-1], source.numel()
    groups = [
        Group(0.75, (Update(3, 0.5), Update(2**64 - 1, -1e-3)), shared_seed=8),
        Group(1.0, (Update(4, 0.25),), shared_seed=9),
    ]
    theta = reference.moved_low_rank(11, source, groups, rank)
    z = torch.from_numpy(reference.low_rank(77, 9, 11, rank, count // columns, columns)).flatten()
    expected = [(theta + torch.tensor(c, dtype=torch.float32) * z).to(dtype) for c in (1e-3, -1e-3)] + [theta]
    found = [torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype), torch.empty(count)]
    for start in range(0, count, 17):
        end = min(start + 17, count)
        targets = [Target(f[start:end], 77, c, 9) for f, c in zip(found, (1e-3, -1e-3, 0.0), strict=True)]
        move(noise, Parameter(11, columns), source.view(-1)[start:end], groups, targets, start)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    whole = torch.empty(count)
    move(noise, Parameter(11, columns), source.view(-1), groups, [Target(whole)])
    assert whole.equal(theta)
    some = torch.empty(2 * columns)
    rows = torch.cat([source.view(-1, columns)[i] for i in (1, 0)])
    move(noise, Parameter(11, columns), rows, groups, [Target(some)], [(columns, columns), (0, columns)])
    assert some.equal(torch.cat([theta[columns : 2 * columns], theta[:columns]]))


def test_low_rank_has_unit_variance_and_its_rank():
    z = torch.zeros(300 * 200)
    move(Noise("low_rank", 4), Parameter(5, 200), z, (), [Target(z, 1, 1.0, 2)])
    sizes = torch.linalg.svdvals(z.view(300, 200).double())
    assert sizes[3] > 0.1 * sizes[0] and sizes[4] < 1e-6 * sizes[0]
    assert abs(z.double().pow(2).mean() - 1) < 0.25


def test_low_rank_vectors_are_normal():
    z = torch.zeros(50)
    move(Noise("low_rank", 4), Parameter(5), z, (), [Target(z, 1, 1.0, 2)])
    assert z.equal(sample("gaussian", 1, 5, 50))


def test_what_does_not_fit_is_refused():
    x = torch.zeros(8)
    with pytest.raises(ValueError, match="expected contiguous"):
        move(Noise("gaussian"), Parameter(1), x, (), [Target(torch.zeros(7))])
    with pytest.raises(ValueError, match="expected contiguous"):
        move(Noise("gaussian"), Parameter(1), x.double(), (), [Target(x)])
    with pytest.raises(ValueError, match="segments cover 5"):
        move(Noise("gaussian"), Parameter(1), x, (), [Target(x)], [(0, 5)])
    with pytest.raises(ValueError, match="no mmx code"):
        move(Noise("gaussian"), Parameter(1), x, (), [Target(x)], instructions="mmx")


def test_keys_differ():
    assert len({parameter_key(f"layers.{i}.weight") for i in range(1000)}) == 1000
