"""The update kernels against torch.optim and plain transcriptions, bit for bit on every instruction set; the checksum."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from finetune.offload.update import kernels
from finetune.offload.update.kernels import (
    INSTRUCTION_SETS,
    ROOT,
    ROOTS,
    Code,
    PieceState,
    Segment,
    StateFormat,
    Step,
    Sums,
    checksum,
    code_table,
    square_root,
)
from finetune.offload.update.rules.adafactor import Adafactor
from finetune.offload.update.rules.adamw import AdamW
from finetune.offload.update.rules.lamb import Lamb
from finetune.offload.update.rules.lion import Lion
from finetune.offload.update.rules.rule import BLOCK, DirectionRule, Rule, TwoBetas
from finetune.offload.update.rules.sgd import Sgd
from finetune.offload.update.rules.signs import SignSgd

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # what the kernels and the transcription copy
pytestmark = pytest.mark.skipif(not FUSES, reason="PyTorch's code for this processor fuses nothing")
SAMPLES = torch.linspace(1e-3, 1.0, 4096)
RATE = 1e-3


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def same(*pairs: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(bits(a).equal(bits(b)) for a, b in pairs)


def normals(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def update(
    rule: Rule, step: int, rate: float, segments: list[Segment], arrays: dict[str, torch.Tensor], units: int, *,
    state_format: StateFormat = StateFormat(), remainder: torch.Tensor | int = 0, gradient_scale: float = 1.0,
    rounding: str = "nearest", seed: int = 0, **code,
) -> Sums:  # fmt: skip
    state = PieceState(units, arrays, state_format, remainder)
    return kernels.update(rule, Step(step, rate, gradient_scale, rounding, seed), segments, state, Code(**code))


# --- against torch.optim


@pytest.mark.skipif(not square_root(SAMPLES, ROOT).equal(SAMPLES.sqrt()), reason="the kernels lack this PyTorch's root")
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("betas, decay", [((0.9, 0.999), 0.01), ((0.4, 0.95), 0.1), ((0.95, 0.98), 0.0)])
@pytest.mark.parametrize("count", [1, 7, 64, 1000, 100_003])
def test_adamw_is_torchs(count, betas, decay, instructions):
    """Parameters and both moments after four steps; the same of bf16 weights with a remainder, whose master it is."""
    parameter = torch.nn.Parameter(normals(count, 1))
    optimizer = torch.optim.AdamW([parameter], lr=RATE, betas=betas, weight_decay=decay, foreach=False)
    rule = AdamW(adam_beta1=betas[0], adam_beta2=betas[1], weight_decay=decay)
    weights, first, second = parameter.detach().clone(), torch.zeros(count), torch.zeros(count)
    halves, remainder = split(weights)
    moments = {"first": torch.zeros(count), "second": torch.zeros(count)}
    for step in range(1, 5):
        gradients = normals(count, 10 + step, 1e-3).bfloat16()
        parameter.grad = gradients.float()
        optimizer.step()
        wide = Segment(0, count, weights, F32, gradients.float(), F32)
        update(rule, step, RATE, [wide], {"first": first, "second": second}, count, instructions=instructions)
        narrow = Segment(0, count, halves, BF16, gradients, BF16)
        update(rule, step, RATE, [narrow], moments, count, remainder=remainder, instructions=instructions)
    state = optimizer.state[parameter]
    assert same((weights, parameter.detach()), (first, state["exp_avg"]), (second, state["exp_avg_sq"]))
    assert same((joined(halves, remainder), weights), (moments["first"], first), (moments["second"], second))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize("count", [1, 7, 64, 1000, 100_003])
def test_sgd_is_torchs(count, momentum, instructions):
    parameter = torch.nn.Parameter(normals(count, 1))
    optimizer = torch.optim.SGD([parameter], lr=RATE, momentum=momentum, foreach=False)
    weights, first = parameter.detach().clone(), torch.zeros(count)
    for step in range(1, 4):
        parameter.grad = normals(count, 10 + step)
        optimizer.step()
        segment = Segment(0, count, weights, F32, parameter.grad, F32)
        update(
            Sgd(momentum=momentum), step, RATE, [segment], {"first": first}, count, instructions=instructions
        )
    assert same((weights, parameter.detach()), (first, optimizer.state[parameter]["momentum_buffer"]))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_gradient_scale_is_clippings(instructions):
    """g is what multiplying `.grad` leaves, in its dtype."""
    for dtype in (F32, BF16):
        gradients, ours, theirs = normals(5003, 3).to(dtype), normals(5003, 4), normals(5003, 4)
        state, expected = {"first": torch.zeros(5003)}, {"first": torch.zeros(5003)}
        for w, g, s, scale in ((ours, gradients, state, 0.3), (theirs, gradients * 0.3, expected, 1.0)):
            update(Sgd(), 1, 0.1, [Segment(0, 5003, w, F32, g, dtype)], s, 5003, gradient_scale=scale,
                   instructions=instructions)  # fmt: skip
        assert same((ours, theirs), (state["first"], expected["first"]))


@pytest.mark.parametrize("root", ROOTS)
def test_roots(root):
    x = torch.rand(1 << 16, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.linspace(-44, 38, 1 << 16)
    x[:5] = torch.tensor([0.0, -0.0, float("inf"), 1e-45, 3.4e38])
    found = [square_root(x, root, instructions) for instructions in INSTRUCTION_SETS]
    right = x.double().sqrt().float()
    assert all(same((found[0], other)) for other in found)
    assert (bits(found[0]) - bits(right)).abs().max() <= (root == "mkl")
    assert found[0][:5].equal(right[:5])
    if root == ROOT and square_root(SAMPLES, root).equal(SAMPLES.sqrt()):
        assert found[0].equal(x.sqrt())


# --- a transcription of everything


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> bf16, rounded half away from zero, and int16: the difference of their bits."""
    wide = master.view(torch.int32).long() & 0xFFFFFFFF
    wide[master.isnan()] = 0x7FC00000
    upper, lower = (wide + 0x8000) >> 16, wide & 0xFFFF
    return upper.to(torch.int32).to(torch.int16).view(BF16), lower.to(torch.int32).to(torch.int16)


def joined(halves: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    return ((halves.view(torch.int16).int() << 16) + remainder.int()).view(F32)


def hashed(seed: int, element: int, count: int, stream: int) -> np.ndarray:
    """uint32 [count]: the random bits of elements from `element` on."""
    numbers = [(element + i) % 2**64 for i in range(count)]

    def mixed(x: np.ndarray) -> np.ndarray:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> np.uint32(shift)) * np.uint32(factor)
        return x ^ x >> np.uint32(16)

    keys = {
        upper: int(mix64(mix64(seed + 0x9E3779B97F4A7C15 * (stream + 1)) ^ upper))
        for upper in {n >> 32 for n in numbers}
    }
    inner = np.array([keys[n >> 32] & 0xFFFFFFFF for n in numbers], dtype=np.uint32)
    outer = np.array([keys[n >> 32] >> 32 for n in numbers], dtype=np.uint32)
    return mixed(mixed(np.array([n & 0xFFFFFFFF for n in numbers], dtype=np.uint32) + inner) ^ outer)


def mix64(x: int | np.ndarray) -> np.ndarray:
    x = np.atleast_1d(np.array(x % 2**64 if isinstance(x, int) else x, dtype=np.uint64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    return (x ^ x >> np.uint64(31)) if x.size > 1 else (x ^ x >> np.uint64(31))[0]


def rounded_at_random(x: torch.Tensor, random: np.ndarray) -> torch.Tensor:
    """fp32, finite -> bf16 by 16 random bits."""
    wide = x.numpy().view(np.uint32) + random.astype(np.uint32)
    return torch.from_numpy((wide & np.uint32(0xFFFF0000)).view(np.float32)).to(BF16)


def decoded(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    return code_table(signed)[codes.int()] * scales.repeat_interleave(BLOCK)[: codes.numel()]


def coded(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    table = code_table(signed)
    bounds = (table[1:] + table[:-1]) / 2
    bounds[0] = 0.0 if table[0] == 0 else bounds[0]
    blocks = [x[i : i + BLOCK] for i in range(0, x.numel(), BLOCK)]
    scales = torch.stack([block.abs().max() for block in blocks])
    codes = [torch.searchsorted(bounds, b / (s if s else 1.0)) for b, s in zip(blocks, scales, strict=True)]
    return torch.cat(codes).to(torch.uint8), scales


def stepped(
    rule: Rule, step: int, theta: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """The new fp32 theta; m and v are changed."""
    beta1, beta2 = rule.betas if isinstance(rule, TwoBetas) else (0.0, 0.0)
    theta = theta * (1 - RATE * rule.weight_decay)
    if isinstance(rule, AdamW):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = v.double().sqrt().float()
        denominator = (root / (1 - beta2**step) ** 0.5).add_(rule.adam_epsilon)
        return theta.addcdiv_(m, denominator, value=-RATE / (1 - beta1**step))
    if isinstance(rule, Lion):
        direction = m.mul(beta1).add_(g, alpha=1 - beta1).sign()
        m.mul_(beta2).add_(g, alpha=1 - beta2)
        return theta.add_(direction, alpha=-RATE)
    if isinstance(rule, Sgd):
        m.mul_(rule.momentum).add_(g)
        return theta.add_(m, alpha=-RATE)
    if isinstance(rule, DirectionRule):
        return theta.add_(g, alpha=-RATE)
    return theta.add_(g.sign(), alpha=-RATE)


class Part(NamedTuple):
    unit: int
    count: int
    weight_dtype: torch.dtype
    gradient_dtype: torch.dtype
    element: int
    shift: int  # elements by which the addresses are off alignment
    copied: bool


# Parts share tiles, groups of 16 and 8-bit blocks; one begins a tile, one crosses several, one crosses 2^32 elements.
PARTS = (
    Part(3, 5, BF16, BF16, 0, 1, True),
    Part(8, 9, F32, BF16, 7, 0, False),
    Part(40, 1, BF16, F32, 2**63, 3, True),
    Part(260, 900, BF16, F32, 2**33 - 450, 0, True),
    Part(1160, 888, BF16, BF16, 5, 2, False),
    Part(2048, 5000, BF16, BF16, 2**64 - 9, 0, True),
    Part(7100, 3, F32, F32, 77, 1, True),
)
UNITS = 7703


class Piece:
    """Arrays of a piece and what its segments point to, from fixed seeds."""

    def __init__(self, rule: Rule, format: str, master: bool, dtype: torch.dtype | None = None) -> None:
        self.rule, self.format = rule, StateFormat(format)
        self.parts = [p._replace(weight_dtype=dtype or p.weight_dtype) for p in PARTS]
        self.weights, self.gradients, self.copies = [], [], []
        for i, p in enumerate(self.parts):
            self.weights.append(normals(p.count + p.shift, i).to(p.weight_dtype)[p.shift :])
            self.gradients.append(normals(p.count + p.shift, 100 + i, 1e-2).to(p.gradient_dtype)[p.shift :])
            self.copies.append(torch.zeros(p.count + p.shift, dtype=p.weight_dtype)[p.shift :])
        generator = torch.Generator().manual_seed(5)
        self.remainder = (
            torch.randint(-(2**15), 2**15, (UNITS,), dtype=torch.int16, generator=generator) if master else None
        )
        first, second = normals(UNITS, 6, 1e-2), normals(UNITS, 7, 1e-4).square()
        self.state: dict[str, torch.Tensor] = {}
        for name, x in (("first", first), ("second", second)):
            if name not in rule.states:
                continue
            if format == "8bit":
                self.state[name], self.state[f"{name}_scales"] = coded(x, name == "first")
            else:
                self.state[name] = x.to(getattr(torch, format))
        assert {k: v.nbytes for k, v in self.state.items()} == self.format.array_bytes(rule, UNITS)

    def segments(self) -> list[Segment]:
        return [
            Segment(p.unit, p.count, w, p.weight_dtype, g, p.gradient_dtype, c if p.copied else 0, p.element)
            for p, w, g, c in zip(self.parts, self.weights, self.gradients, self.copies, strict=True)
        ]

    def update(self, **options) -> Sums:
        remainder = 0 if self.remainder is None else self.remainder
        return update(self.rule, 3, RATE, self.segments(), self.state, UNITS, state_format=self.format,
                      remainder=remainder, root="ieee", **options)  # fmt: skip

    def transcription(self, rounding: str, seed: int) -> Sums:
        """What `update` does, in PyTorch and NumPy; the sums in fp64."""
        change, total = 0.0, 0.0
        eight = self.format.name == "8bit"
        moments = []
        for name in ("first", "second"):
            if name not in self.state:
                moments.append(torch.zeros(UNITS))
            elif eight:
                moments.append(decoded(self.state[name], self.state[f"{name}_scales"], name == "first"))
            else:
                moments.append(self.state[name].float())
        for i, p in enumerate(self.parts):
            here = slice(p.unit, p.unit + p.count)
            master = self.remainder is not None and p.weight_dtype == BF16
            old = joined(self.weights[i], self.remainder[here]) if master else self.weights[i].float().clone()
            m, v = (x[here].clone() for x in moments)
            new = stepped(self.rule, 3, old.clone(), self.gradients[i].float(), m, v)
            random = hashed(seed, p.element, p.count, 0), hashed(seed, p.element, p.count, 1)
            if master:
                halves, self.remainder[here] = split(new)
                self.weights[i].copy_(halves)
            elif p.weight_dtype == BF16 and rounding == "stochastic":
                self.weights[i].copy_(rounded_at_random(new, random[0] >> 16))
            else:
                self.weights[i].copy_(new)
            new = new if master else self.weights[i].float().clone()
            if p.copied:
                self.copies[i].copy_(self.weights[i])
            if self.format.name == "bfloat16":
                m, v = rounded_at_random(m, random[0] & 0xFFFF).float(), rounded_at_random(v, random[1] >> 16).float()
            moments[0][here], moments[1][here] = m, v
            change += (new - old).double().square().sum().item()
            total += new.double().square().sum().item()
        touched = {b for p in self.parts for b in range(p.unit // BLOCK, (p.unit + p.count - 1) // BLOCK + 1)}
        for name, x in zip(("first", "second"), moments, strict=True):
            if name not in self.state:
                continue
            if not eight:
                self.state[name].copy_(x)
                continue
            codes, scales = coded(x, name == "first")
            for b in touched:
                self.state[name][b * BLOCK : (b + 1) * BLOCK] = codes[b * BLOCK : (b + 1) * BLOCK]
                self.state[f"{name}_scales"][b] = scales[b]
        return Sums(change, total)

    def arrays(self) -> list[torch.Tensor]:
        rest = [] if self.remainder is None else [self.remainder]
        return [*self.weights, *self.copies, *self.state.values(), *rest]


def equal(a: Piece, b: Piece) -> bool:
    return same(*zip(a.arrays(), b.arrays(), strict=True))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("weights", ["master", "nearest", "stochastic", "float16"])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("kind", [AdamW, Lion, Sgd, SignSgd, Lamb, Adafactor])
def test_transcription(kind, format, weights, instructions):
    """Segments of all dtypes, off alignment, that share tiles and blocks; the rest of the state stays as it is."""
    betas = {"adam_beta1": 0.9, "adam_beta2": 0.99} if issubclass(kind, TwoBetas) else {}
    rule = kind(**betas, weight_decay=0.1)
    rounding = "stochastic" if weights == "stochastic" else "nearest"
    found, expected = (
        Piece(rule, format, weights == "master", F16 if weights == "float16" else None) for _ in range(2)
    )
    sums = found.update(rounding=rounding, seed=2**63 + 9, instructions=instructions, threads=1)
    expected_sums = expected.transcription(rounding, 2**63 + 9)
    assert equal(found, expected)
    assert tuple(sums) == pytest.approx(tuple(expected_sums), rel=1e-5)
    again = Piece(rule, format, weights == "master", F16 if weights == "float16" else None)
    other = INSTRUCTION_SETS[-1]
    assert again.update(rounding=rounding, seed=2**63 + 9, instructions=other, threads=2) == sums  # to the last bit
    assert equal(again, found)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "8bit"])
def test_threads_and_cuts_do_not_matter(format):
    """Two threads; and each segment cut in two at any place, here within groups."""
    count = 40_003
    generator = torch.Generator().manual_seed(1)
    results = []
    for threads, cut in ((1, None), (2, None), (2, 17_301)):
        weights, gradients = normals(count, 1).bfloat16(), normals(count, 2).bfloat16()
        sizes = StateFormat(format).array_bytes(AdamW(), count)
        state = {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}
        spans = [(0, count)] if cut is None else [(0, cut), (cut, count)]
        segments = [
            Segment(low, high - low, weights[low:high], BF16, gradients[low:high], BF16, element=low)
            for low, high in spans
        ]
        sums = update(AdamW(), 1, RATE, segments, state, count, state_format=StateFormat(format), threads=threads,
                      rounding="stochastic", seed=generator.initial_seed())  # fmt: skip
        results.append((sums, [weights, *state.values()]))
    for sums, arrays in results[1:]:
        assert same(*zip(arrays, results[0][1], strict=True))
        assert tuple(sums) == pytest.approx(tuple(results[0][0]), rel=1e-6)
    assert results[0][0] == results[1][0]


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_remainders_keep_the_master(instructions):
    """Over every kind of number: a step of rate 0 changes nothing, and what is not finite stays so."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16).repeat(5)
    lower = torch.tensor([0, 1, -1, 2**15 - 1, -(2**15)], dtype=torch.int16).repeat_interleave(2**16)
    master = joined(halves, lower)
    count = master.numel()
    weights, remainder = split(master)
    assert joined(weights, remainder).equal(master.nan_to_num(nan=float("nan"))) or master.isnan().any()
    before = weights.clone()
    segment = Segment(0, count, weights, BF16, torch.zeros(count), F32)
    update(SignSgd(), 1, 0.0, [segment], {}, count, remainder=remainder, instructions=instructions)
    after = joined(weights, remainder)
    assert after.isnan().equal(master.isnan())
    assert same((after[~master.isnan()], master[~master.isnan()]))
    assert not weights[~master.isfinite()].isfinite().any()
    assert weights.isnan().equal(master.isnan()) and before.isnan().equal(weights.isnan())


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("weights", ["master", "nearest", "stochastic"])
def test_what_is_not_finite_stays_so(weights, instructions):
    for bad in (float("inf"), float("-inf"), float("nan")):
        w, m, remainder = normals(300, 1).bfloat16(), torch.zeros(300), torch.zeros(300, dtype=torch.int16)
        gradients = torch.ones(300)
        gradients[77] = bad
        sums = update(Sgd(), 1, 0.1, [Segment(0, 300, w, BF16, gradients, F32)], {"first": m}, 300,
                      remainder=remainder if weights == "master" else 0, instructions=instructions,
                      rounding="stochastic" if weights == "stochastic" else "nearest")  # fmt: skip
        assert w.isfinite().logical_not().nonzero().flatten().tolist() == [77]
        assert not torch.tensor(sums).isfinite().any()


def test_random_bits_are_uniform_and_independent():
    """Of the transcription, which the kernels equal: each bit, halves against each other, neighbours, seeds, streams."""
    n = 1 << 16
    base = hashed(1, 0, n, 0)
    for other in (hashed(1, 1, n, 0), hashed(2, 0, n, 0), hashed(1, 0, n, 1), hashed(1, 2**40, n, 0), base >> 16):
        agreeing = np.unpackbits((~(base ^ other)).view(np.uint8).reshape(n, 4)[:, :2], axis=1).mean(axis=0)
        assert (abs(agreeing - 0.5) < 5 * 0.5 / n**0.5).all()
    counts = np.bincount(base >> 24, minlength=256), np.bincount(base & 0xFF, minlength=256)
    for count in counts:  # chi-squared of 255 degrees of freedom: its deviation is 22.6
        assert abs(((count - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * 22.6


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.9])
def test_stochastic_rounding_is_unbiased(fraction):
    """Of weights and of bf16 state: one of the two neighbours, and right on average within 5 standard deviations."""
    count, value = 200_000, 1.0 + 2**-7 * fraction
    weights = torch.ones(count, dtype=BF16)
    segment = Segment(0, count, weights, BF16, torch.full((count,), -1.0), F32)
    state = {"first": torch.zeros(count, dtype=BF16)}
    update(SignSgd(), 1, value - 1.0, [segment], state, count, rounding="stochastic", seed=3)
    moment = Segment(0, count, torch.zeros(count), F32, torch.full((count,), value), F32)
    update(Sgd(), 1, 0.0, [moment], state, count, state_format=StateFormat("bfloat16"), seed=3)
    deviation = 2**-7 * (fraction * (1 - fraction) / count) ** 0.5
    for rounded in (weights, state["first"]):
        assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
        assert abs(rounded.double().mean().item() - value) < 5 * deviation + 2**-24
    up = weights > 1, state["first"] > 1
    together = (up[0] & up[1]).double().mean().item()
    assert abs(together - fraction**2) < 5 * (fraction**2 * (1 - fraction**2) / count) ** 0.5


# --- 8 bit


@pytest.mark.parametrize("signed", [True, False])
def test_code_tables(signed):
    """The values of bitsandbytes' dynamic map, and the search for the nearest one."""
    table = code_table(signed)
    assert table.numel() == 256 and (table.diff() > 0).all() and table[-1] == 1 and (table == 0).sum() == 1
    assert table[0] == pytest.approx(-0.9929688 if signed else 0.0, abs=1e-6)
    bounds = (table[1:] + table[:-1]) / 2
    upper = bounds.view(torch.int32) >> 16
    assert upper.unique().numel() == 255  # what the kernel's search rests on

    count = 1 << 16
    values = [table, bounds, bounds[:1].abs() / 3, torch.nextafter(bounds, torch.tensor(2.0)), normals(count, 1, 0.2)]
    values = torch.cat(values).clamp(-1, 1)
    values = values if signed else values.abs()
    rows = [torch.cat([row, torch.zeros(255 - row.numel()), torch.ones(1)]) for row in values.split(255)]
    x = torch.cat(rows)  # every block has the scale 1
    rule, name = (Sgd(momentum=0.0), "first") if signed else (AdamW(adam_beta2=0.0), "second")
    gradients = x if signed else x.sqrt()
    sizes = StateFormat("8bit").array_bytes(rule, x.numel())
    state = {key: torch.zeros(size, dtype=torch.uint8) for key, size in sizes.items()}
    segment = Segment(0, x.numel(), torch.zeros_like(x), F32, gradients, F32)
    update(rule, 1, 0.0, [segment], state, x.numel(), state_format=StateFormat("8bit"))
    wanted = x if signed else gradients * gradients
    distance = (table[state[name].int()].double() - wanted.double()).abs()
    smallest = (table.double()[None] - wanted.double()[:, None]).abs().min(dim=1).values
    if not signed:
        tiny = (wanted > 0) & (wanted < bounds[0])  # nearer to 0, which they must not become
        assert tiny.any() and (state[name][tiny] == 1).all()
        distance[tiny] = smallest[tiny]
    assert ((distance - smallest) <= 4e-7 * wanted.abs()).all()  # bounds and the numbers beside them are rounded


def test_eight_bit_blocks_without_segments_are_untouched():
    units = 5 * BLOCK + 10
    state = {"first": torch.randint(0, 256, (units,)).to(torch.uint8), "first_scales": torch.rand(6)}
    before = {name: x.clone() for name, x in state.items()}
    segments = [
        Segment(unit, count, normals(count, 1), F32, normals(count, 2, 1e6), F32)
        for unit, count in ((BLOCK + 5, 3), (BLOCK + 9, 2), (5 * BLOCK + 9, 1))
    ]
    update(Lion(), 1, RATE, segments, state, units, state_format=StateFormat("8bit"))
    changed = [i for i in range(6) if not state["first_scales"][i].equal(before["first_scales"][i])]
    assert changed == [1, 5]
    for i in (0, 2, 3, 4):
        assert state["first"][i * BLOCK : (i + 1) * BLOCK].equal(before["first"][i * BLOCK : (i + 1) * BLOCK])


def test_sizes():
    adamw = AdamW()
    assert StateFormat("8bit").array_bytes(adamw, 257) == {
        "first": 257, "first_scales": 8, "second": 257, "second_scales": 8,
    }  # fmt: skip
    assert StateFormat().array_bytes(Lion(), 10) == {"first": 40}
    assert StateFormat("bfloat16").array_bytes(SignSgd(), 10) == {}
    assert [StateFormat(n).bytes_per_unit(adamw) for n in ("float32", "bfloat16", "8bit")] == [8, 4, 2 + 2 * 4 / 256]


# --- refusals


def test_what_does_not_fit_is_refused():
    x = torch.zeros(8)
    segment = Segment(0, 8, x, F32, x.clone(), F32)

    def run(*segments: Segment, rule: Rule = SignSgd(), state=None, **options):  # noqa: B008
        return update(rule, options.pop("step", 1), RATE, segments, state or {}, 8, **options)

    assert run() == (0.0, 0.0)
    for wrong in (segment._replace(weights=0), segment._replace(gradients=0)):
        with pytest.raises(ValueError, match="null address"):
            run(wrong)
    with pytest.raises(ValueError, match="state with a null address"):
        run(segment, rule=Lion())
    with pytest.raises(ValueError, match="state with a null address"):
        run(segment, rule=Lion(), state={"first": x}, state_format=StateFormat("8bit"))
    for wrong in ((segment, segment), (segment._replace(unit=1),), (segment._replace(unit=2**64 - 8),)):
        with pytest.raises(ValueError, match="sorted, apart and within"):
            run(*wrong)
    with pytest.raises(ValueError, match="float16"):
        run(segment._replace(weight_dtype=F16), rounding="stochastic")
    with pytest.raises(ValueError, match="fp32 or bf16 gradients"):
        run(segment._replace(gradient_dtype=F16))
    with pytest.raises(ValueError, match="steps count from 1"):
        run(segment, step=0)
    with pytest.raises(ValueError, match="no mmx code"):
        run(segment, instructions="mmx")
    with pytest.raises(ValueError, match="contiguous"):
        run(segment._replace(weights=torch.zeros(16)[::2]))
    with pytest.raises(ValueError, match="unknown format"):
        StateFormat("4bit")
    with pytest.raises(ValueError, match="null address"):
        checksum(0, 5)
    assert x.equal(torch.zeros(8))


# --- the checksum


def plain_checksum(data: np.ndarray) -> int:
    """uint8 [n] -> the number of `checksum`, from its docstring."""
    total = np.uint64(0)
    for tile, start in enumerate(range(0, data.size, 1 << 16)):
        piece = data[start : start + (1 << 16)]
        words = np.concatenate([piece, np.zeros(-piece.size % 256, np.uint8)]).view(np.uint32).reshape(-1, 64)
        lanes = np.arange(64, dtype=np.uint32)
        for row in words:
            lanes = (lanes ^ row) * np.uint32(0x9E3779B1)
            lanes ^= lanes >> np.uint32(15)
        numbered = lanes.astype(np.uint64) | np.arange(1, 65, dtype=np.uint64) << np.uint64(32)
        with np.errstate(over="ignore"):
            total = total + mix64(int(mix64(numbered).sum(dtype=np.uint64)) ^ int(mix64(tile + 1)))
    return int(mix64(int(total) ^ int(mix64(data.size))))


def noise_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 65_535, 65_536, 65_537, 300_001])
def test_checksum_transcription(count, instructions):
    data = noise_bytes(count + 1)
    expected = plain_checksum(data[:count].numpy())
    for threads in (1, 2):
        assert checksum(data[:count], count, threads, instructions) == expected
    shifted = data[1:].contiguous() if count == 0 else data[1:]
    if count:
        assert checksum(shifted, count, 1, instructions) == plain_checksum(shifted.numpy())


@pytest.mark.parametrize("fill", ["noise", "zeros"])
def test_checksum_finds_any_flipped_bit(fill):
    count = 65_536 + 700
    data = noise_bytes(count) if fill == "noise" else torch.zeros(count, dtype=torch.uint8)
    seen = {checksum(data, count, 1)}
    places = [*range(0, 64), *range(65_536 - 8, 65_536 + 300), *range(count - 200, count), *range(0, count, 1009)]
    places = sorted(set(places))
    for place in places:
        for bit in range(8):
            data[place] ^= 1 << bit
            seen.add(checksum(data, count, 1))
            data[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(places)  # and no two flips look alike


def test_checksum_finds_moved_runs():
    """Swapped and repeated runs of 4096 bytes, runs that differ in upper bits alone, and other lengths of zeros."""
    count = 4096 * 40
    data = noise_bytes(count)
    signs = (noise_bytes(count) & 1) << 7  # of fp32 numbers that are all 0, here and there negative
    signs.view(-1, 4)[:, :3] = 0
    for original in (data, signs):
        seen = {checksum(original, count, 1)}
        for a, b in [(0, 1), (0, 16), (3, 19), (5, 37), (15, 16)]:
            swapped, repeated = original.clone().view(-1, 4096), original.clone().view(-1, 4096)
            swapped[[a, b]] = swapped[[b, a]]
            repeated[b] = repeated[a]
            seen |= {checksum(swapped, count, 1), checksum(repeated, count, 1)}
        assert len(seen) == 11
    zeros = torch.zeros(70_000, dtype=torch.uint8)
    assert len({checksum(zeros, n, 1) for n in range(0, 70_000, 97)}) == len(range(0, 70_000, 97))
