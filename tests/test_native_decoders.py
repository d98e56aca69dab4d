"""Native decoders of packed weights against PyTorch's operations one after the other: every instruction set, dtype and way in
which rows, groups and bytes may not fit each other."""

from __future__ import annotations

import sys

import pytest
import torch
from packed_checkpoints import CODES, pack_4bit, pack_int8
from test_bitsandbytes import read, read_source, write
from torch import Tensor

from finetune.offload.weights.formats import PlainTensor, bitsandbytes, grouped, native_kernels
from finetune.offload.weights.formats.compressed_tensors import CompressedTensor
from finetune.offload.weights.formats.compressed_tensors_config import Scheme
from finetune.offload.weights.formats.fp8 import BlockFP8
from finetune.offload.weights.formats.gptq import PackedGptq
from finetune.offload.weights.formats.native_kernels import INSTRUCTION_SETS, Codes, Nested, Scales, decode
from finetune.offload.weights.formats.scaled import RowSpan

pytestmark = pytest.mark.every(3)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_instruction_set = pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
NF4 = tuple(CODES["nf4"].tolist())


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, the sign of zero included; of NaN only that it is one."""
    assert found.dtype == expected.dtype
    nan = expected.isnan()
    assert found.isnan().equal(nan)
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert found[~nan].view(bits).equal(expected[~nan].view(bits))


def rounded(numbers: Tensor, first: torch.dtype | None, dtype: torch.dtype) -> Tensor:
    return numbers.to(first or torch.float32).to(dtype)


def scales_like(count: int) -> Tensor:
    """fp32 of many magnitudes, with those at which roundings to 16 bits overflow or have subnormal results."""
    special = torch.tensor([0.0, -0.0, 1e-45, 2e-41, 1e-38, 3e-8, 65504.0, 65520.0, 3.4e38, -1.0, float("inf"), float("nan")])
    return torch.cat([special, torch.randn(count) * 10.0 ** torch.randint(-9, 9, (count,))])[torch.randperm(count + 12)][:count]


@each_instruction_set
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("first", [None, *DTYPES])
def test_every_code_of_8_bits_times_scales_of_every_kind(kind, first, instructions):
    torch.manual_seed(1)
    codes = torch.arange(256).to(torch.uint8).view(getattr(torch, kind)).repeat(100, 1)
    scales = scales_like(100)
    factor = 7.874015718698502e-3 if kind == "int8" else 1.0
    expected = codes.float() * scales[:, None] * factor
    for dtype in DTYPES:
        target = torch.empty(100, 256, dtype=dtype)
        assert decode(Codes(kind, codes), Scales(scales, 256), target, first, factor, instructions) is target
        assert_same(target, rounded(expected, first, dtype))


@each_instruction_set
@pytest.mark.parametrize("kind", ["four_bit", "four_bit_low"])
@pytest.mark.parametrize("first", [None, *DTYPES])
def test_every_code_of_4_bits_times_scales_of_every_kind(kind, first, instructions):
    torch.manual_seed(2)
    packed = torch.randint(256, (64, 64), dtype=torch.uint8)
    scales, halves = scales_like(64 * 4), (packed >> 4, packed & 15)
    of_number = torch.stack(halves if kind == "four_bit" else halves[::-1], -1).view(64, 128).long()
    expected = torch.tensor(NF4)[of_number] * scales.repeat_interleave(32).view(64, 128)
    for dtype in DTYPES:
        target = torch.empty(64, 128, dtype=dtype)
        decode(Codes(kind, packed, NF4), Scales(scales, 32), target, first, instructions=instructions)
        assert_same(target, rounded(expected, first, dtype))


GRIDS = [((5, 7), (1, 7)), ((3, 40), (2, 33)), ((130, 300), (128, 128)), ((9, 1000), (9, 1000)), ((4, 65), (1, 1)),
         ((2, 20000), (1, 8)), ((3, 50000), (2, 49999)), ((1, 1), (1, 1))]  # fmt: skip
SCALE_DTYPES = {torch.float32: 4e3, torch.bfloat16: 4e3, torch.float16: 2e3, torch.float8_e8m0fnu: 1e9}


@each_instruction_set
@pytest.mark.parametrize("shape, group", GRIDS)
@pytest.mark.parametrize("stored", SCALE_DTYPES)
def test_grids_of_scales(stored, shape, group, instructions):
    torch.manual_seed(3)
    grid = [-(-size // part) for size, part in zip(shape, group, strict=True)]
    scales = (torch.rand(grid) * SCALE_DTYPES[stored]).to(stored)
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    of_number = scales.float().repeat_interleave(group[0], 0)[: shape[0]].repeat_interleave(group[1], 1)[:, : shape[1]]
    for dtype in DTYPES:
        target = torch.empty(shape, dtype=dtype)
        decode(Codes("float8_e4m3fn", codes), Scales(scales, group[1], group[0]), target, None, 1.0, instructions)
        assert_same(target, (codes.float() * of_number).to(dtype))


@each_instruction_set
def test_every_power_of_two_that_is_a_scale(instructions):
    scales = torch.arange(256).to(torch.uint8).view(torch.float8_e8m0fnu)
    target = torch.empty(256, 32)
    codes = torch.ones(256, 32).to(torch.float8_e5m2)
    decode(Codes("float8_e5m2", codes), Scales(scales, 32), target, instructions=instructions)
    assert_same(target, torch.tensor([2.0**n for n in range(-127, 128)] + [float("nan")])[:, None].repeat(1, 32))


@each_instruction_set
@pytest.mark.parametrize("group", [32, 100, 700])
def test_zero_points_of_groups(group, instructions):
    torch.manual_seed(9)
    packed, shape = torch.randint(256, (9, 350), dtype=torch.uint8), (9, -(-700 // group))
    scales, zeros = torch.randn(shape).half(), torch.randint(17, shape).float()
    wide = [of.float().repeat_interleave(group, 1)[:, :700] for of in (scales, zeros)]
    expected = ((torch.stack([packed & 15, packed >> 4], -1).view(9, 700) - wide[1]) * wide[0]).half()
    for dtype in DTYPES:
        target = torch.empty(9, 700, dtype=dtype)
        codes = Codes("four_bit_low", packed, tuple(range(16)))
        decode(codes, Scales(scales, group, zeros=zeros), target, torch.float16, instructions=instructions)
        assert_same(target, expected.to(dtype))


@each_instruction_set
@pytest.mark.parametrize("start, stop", [(0, 1), (1, 2), (1, 64), (63, 65), (32, 300), (95, 20001), (64, 33000)])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_from_within_a_byte_or_a_block(nested, start, stop, instructions):
    torch.manual_seed(4)
    block, outer_group, count = 32, 16, 33000
    packed = torch.randint(256, (count // 2,), dtype=torch.uint8)
    numbers = torch.tensor(NF4)[torch.stack([packed >> 4, packed & 15], -1).view(-1).long()]
    blocks = -(-count // block)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8) if nested else torch.rand(blocks)
    outer, inner, offset = torch.rand(-(-blocks // outer_group)), torch.randn(256), 0.123456789
    of_block = inner[absmax.long()] * outer.repeat_interleave(outer_group)[:blocks] + offset if nested else absmax
    expected = (numbers * of_block.repeat_interleave(block)[:count])[start:stop]
    first = start // block
    levels = Nested(inner, outer[first // outer_group :], outer_group, offset, first % outer_group) if nested else None
    scales = Scales(absmax[first:], block, into_group=start % block, nested=levels)
    codes = Codes("four_bit", packed[start // 2 : -(-stop // 2)], NF4, start % 2 == 1)
    for dtype in DTYPES:
        target = torch.empty(stop - start, dtype=dtype)
        decode(codes, scales, target, torch.bfloat16, instructions=instructions)
        assert_same(target, expected.bfloat16().to(dtype))


@each_instruction_set
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_16_bits_are_widened(kind, instructions):
    codes = torch.arange(65536).to(torch.int32).to(torch.uint16).view(kind)
    for count in (1, 31, 65536):
        target = torch.empty(count)
        decode(Codes(str(kind).removeprefix("torch."), codes[:count]), None, target, instructions=instructions)
        assert_same(target, codes[:count].float())


@each_instruction_set
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_large_targets_are_written_past_the_caches(threads, shift, instructions, monkeypatch):
    """Any alignment of the target's rows; nothing beside them is touched."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(5)
    rows, columns = 1025, 2050
    codes, scales = torch.randint(-128, 128, (rows, columns), dtype=torch.int8), torch.rand(rows)
    packed, absmax = torch.randint(256, (rows * columns // 2,), dtype=torch.uint8), torch.rand(-(-rows * columns // 64))
    numbers = torch.tensor(NF4)[torch.stack([packed >> 4, packed & 15], -1).view(-1).long()]
    for dtype in DTYPES:
        memory = torch.full((rows * columns + 64,), 7.0, dtype=dtype)
        target = memory[shift : shift + rows * columns]
        decode(Codes("int8", codes), Scales(scales, columns), target.view(rows, columns), instructions=instructions)
        assert_same(target, (codes * scales[:, None]).view(-1).to(dtype))
        decode(Codes("four_bit", packed, NF4), Scales(absmax, 64), target, instructions=instructions)
        assert_same(target, (numbers * absmax.repeat_interleave(64)[: rows * columns]).to(dtype))
        assert (memory[:shift] == 7).all() and (memory[shift + rows * columns :] == 7).all()


def decoded(weight, stored, dtype, monkeypatch) -> tuple[Tensor, Tensor]:
    """By the kernel, and by the portable decoder."""
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes, "kernels_for", lambda tensor: None)
        expected = weight.decode(stored, dtype)
        patch.setattr(bitsandbytes, "kernels_for", lambda tensor: "native")
        return weight.decode(stored, dtype), expected


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind, block, shape", [("nf4", 64, (33, 70)), ("fp4", 32, (7, 5)), ("nf4", 4096, (65, 96))])
@pytest.mark.parametrize("packed_from", ["float32", "bfloat16", "float16"])
def test_four_bit_weights_have_the_portable_decoders_bits(packed_from, kind, block, shape, nested, tmp_path, monkeypatch):
    torch.manual_seed(6)
    stored, _ = pack_4bit(torch.randn(shape), kind, nested, block, packed_from)
    whole, _ = read(write(tmp_path / "x.safetensors", stored), "a", shape)
    for weight in (whole, whole.rows([(1, 2), (3, 7)]), whole.rows([(2, 2)])):
        for dtype in DTYPES:
            assert_same(*decoded(weight, weight.load(read_source), dtype, monkeypatch))


@pytest.mark.parametrize("shape", [(65, 96), (7, 5)])
def test_int8_weights_have_the_portable_decoders_bits(shape, tmp_path, monkeypatch):
    torch.manual_seed(7)
    stored, _ = pack_int8(torch.randn(shape))
    weight, stored = read(write(tmp_path / "x.safetensors", stored), "a.weight", shape)
    for dtype in DTYPES:
        assert_same(*decoded(weight, stored, dtype, monkeypatch))


def test_nothing_is_decoded_to_nothing():
    for shape in ((0, 4), (4, 0), (0,)):
        target = torch.empty(shape)
        assert decode(Codes("int8", target.to(torch.int8)), Scales(torch.ones(4), shape[-1]), target) is target


def outline(dtype: torch.dtype, *shape: int) -> PlainTensor:
    return PlainTensor(dtype, shape, ())


def compressed(
    packed: PlainTensor, scales: PlainTensor, block: tuple[int, int], zeros: PlainTensor | None = None, **scheme
) -> CompressedTensor:
    fields = {"num_bits": 8, "is_float": False, "is_packed": False, "is_symmetric": True, "strategy": "block"}
    of = Scheme(**fields | scheme, block=block, quantises_inputs=False)
    spans = (RowSpan(0, 200),)
    return CompressedTensor(packed, scales, zeros, None, (200, 264), of, block, spans, spans)


E4M3, GRID = outline(torch.float8_e4m3fn, 200, 264), {dtype: outline(dtype, 7, 5) for dtype in DTYPES}
WEIGHTS = {
    "fp8": BlockFP8(E4M3, GRID[torch.float32], (32, 64), (RowSpan(0, 200),)),
    "fp8, bf16 scales": BlockFP8(E4M3, GRID[torch.bfloat16], (32, 64), (RowSpan(0, 200),)),
    "fp8, exponents": BlockFP8(E4M3, outline(torch.uint8, 7, 5), (32, 64), (RowSpan(0, 200),)),
    "compressed-tensors fp8": compressed(E4M3, GRID[torch.bfloat16], (32, 64), is_float=True),
    "compressed-tensors int8": compressed(outline(torch.int8, 200, 264), GRID[torch.float16], (32, 64)),
    "compressed-tensors int4": compressed(
        outline(torch.int32, 200, 33), outline(torch.bfloat16, 200, 9), (1, 32), num_bits=4, is_packed=True
    ),
    "compressed-tensors int4 with zero points": compressed(
        outline(torch.int32, 200, 33), outline(torch.bfloat16, 200, 9), (1, 32), outline(torch.int32, 25, 9), num_bits=4,
        is_packed=True, is_symmetric=False, strategy="group",
    ),
    "gptq": PackedGptq(
        outline(torch.int32, 33, 200), outline(torch.int32, 3, 25), outline(torch.float16, 3, 200), None, (200, 264), 4, 128,
        ((0, 200),), True,
    ),
}  # fmt: skip


def random_like(tensor: PlainTensor) -> Tensor:
    if tensor.dtype in DTYPES:
        return torch.rand(tensor.shape).to(tensor.dtype)
    size = tensor.num_bytes
    low, high = (100, 150) if tensor.dtype == torch.uint8 else (0, 256)
    return torch.randint(low, high, (size,), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("ranges", [None, [(0, 40)], [(3, 70), (33, 34), (199, 200)]])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_with_grids_of_scales_have_the_portable_decoders_bits(name, ranges, monkeypatch):
    torch.manual_seed(8)
    weight = WEIGHTS[name] if ranges is None else WEIGHTS[name].rows(ranges)
    stored = {part: random_like(tensor) for part, tensor in weight.tensors.items()}
    module = grouped if isinstance(weight, PackedGptq) else sys.modules[type(weight).__module__]
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(native_kernels, "decode", lambda *args, **options: calls.append(decode(*args, **options)) or calls[-1])
        for dtype in DTYPES:
            patch.setattr(module, "kernels_for", lambda tensor: None)
            expected = weight.decode(stored, dtype)
            patch.setattr(module, "kernels_for", lambda tensor: "native")
            assert_same(weight.decode(stored, dtype), expected)
        assert len(calls) >= len(DTYPES)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_plain_weights_are_widened(kind):
    stored = torch.randn(1100, 1000).to(kind)
    weight = outline(kind, *stored.shape)
    assert_same(weight.decode(stored, torch.float32), stored.float())
    assert_same(weight.decode(stored.t(), torch.float32), stored.t().float())


BYTES, FOUR = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 16)
REFUSED = {
    "too few codes": (Codes("four_bit", BYTES[:3], NF4), Scales(FOUR, 16), FOUR),
    "codes of another dtype": (Codes("int8", BYTES), Scales(FOUR, 16), torch.zeros(4, 8)),
    "too few scales": (Codes("four_bit", BYTES, NF4), Scales(torch.zeros(3), 16), FOUR),
    "scales of another dtype": (Codes("four_bit", BYTES, NF4), Scales(torch.zeros(4).double(), 16), FOUR),
    "a target that is not contiguous": (Codes("four_bit", BYTES, NF4), Scales(FOUR, 16), torch.zeros(16, 4).T),
    "another target": (Codes("four_bit", BYTES, NF4), Scales(FOUR, 16), FOUR.double()),
    "a target elsewhere": (Codes("four_bit", BYTES, NF4), Scales(FOUR, 16), FOUR.to("meta")),
    "no table": (Codes("four_bit", BYTES), Scales(FOUR, 16), FOUR),
    "no scales": (Codes("four_bit", BYTES, NF4), None, FOUR),
    "scales of plain numbers": (Codes("bfloat16", FOUR.bfloat16()), Scales(FOUR, 16), FOUR),
    "groups of nothing": (Codes("four_bit", BYTES, NF4), Scales(FOUR, 16, 0), FOUR),
    "a start behind the group": (Codes("four_bit", BYTES, NF4), Scales(torch.zeros(40), 16, into_group=16), FOUR),
    "rows of half a byte": (Codes("four_bit", BYTES, NF4), Scales(FOUR, 15), torch.zeros(4, 15)),
    "zero points of int8": (
        Codes("int8", torch.zeros(4, 16, dtype=torch.int8)), Scales(FOUR, 16, zeros=FOUR), FOUR
    ),
    "too few zero points": (Codes("four_bit", BYTES, NF4), Scales(FOUR, 16, zeros=torch.zeros(3)), FOUR),
    "too small a map": (
        Codes("four_bit", BYTES, NF4), Scales(BYTES, 16, nested=Nested(torch.zeros(255), FOUR, 1, 0.0)), FOUR
    ),
    "too few outer scales": (
        Codes("four_bit", BYTES, NF4), Scales(BYTES, 16, nested=Nested(torch.zeros(256), torch.zeros(1), 3, 0.0)), FOUR
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    with pytest.raises(ValueError):
        decode(*REFUSED[case])


def test_unknown_instructions_are_refused():
    with pytest.raises(ValueError, match="has no mmx code"):
        decode(Codes("four_bit", BYTES, NF4), Scales(FOUR, 16), FOUR, instructions="mmx")
