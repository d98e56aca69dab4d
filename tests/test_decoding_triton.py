"""Decoders of packed weights on accelerators: the portable ones' bits, interpreted where there is none. Compiled, nothing is
fused and nothing is kept outside of registers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from grouped_checkpoints import Awq, Gptq
from packed_checkpoints import pack_4bit, pack_compressed, pack_int8
from safetensors.torch import load_file
from test_bitsandbytes import read, read_source, write
from test_compressed_tensors import STRATEGIES, draw, section
from test_compressed_tensors import read as read_compressed
from test_gptq import RECORDED
from test_gptq import read as read_grouped
from test_gptq import write as write_grouped
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

pytest.importorskip("triton")

from finetune.offload.weights.formats import (  # noqa: E402
    PlainTensor,
    StoredWeight,
    bitsandbytes,
    compressed_tensors,
    fp8,
    grouped,
    mxfp4,
)
from finetune.offload.weights.formats import gguf as gguf_format  # noqa: E402
from finetune.offload.weights.formats.compressed_tensors_config import Scheme  # noqa: E402
from finetune.offload.weights.formats.gguf_blocks import DECODERS  # noqa: E402
from finetune.offload.weights.formats.scaled import RowSpan  # noqa: E402

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = (11, 65)
COMPILE = """
import re, subprocess, tempfile
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from finetune.offload.files.gguf_file import BLOCKS
from finetune.offload.weights.formats import triton_gguf, triton_pairs, triton_scaled
from finetune.offload.weights.formats.triton_scaled import Codes, Scales

class Gpu:
    "What Triton asks a driver before it compiles."

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

run = JITFunction.run

def compile_only(self, *arguments, grid, warmup, **options):
    made = run(self, *arguments, grid=grid, warmup=True, **options)
    capability = driver.active.capability
    print(made.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(made.asm["ptx"])
        file.flush()
        target = re.search(r"\\.target (\\w+)", made.asm["ptx"])[1]
        command = [get_ptxas(capability).path, "-v", "--gpu-name", target, "-o", "/dev/null", file.name]
        print(f"compiled {case} for {capability}:", subprocess.run(command, text=True, capture_output=True).stderr)

JITFunction.run = compile_only
size, out = 1024, torch.empty(1024, 1024, dtype=torch.bfloat16)
numbers, words = torch.empty(size, size, dtype=torch.uint8), torch.empty(size // 8, size, dtype=torch.int32)
of_groups, zeros = torch.empty(8, size, dtype=torch.float16), torch.empty(8, size // 8, dtype=torch.int32)
order, rows = torch.empty(size, dtype=torch.int32), torch.empty(size, 8, dtype=torch.bfloat16)
bits3, zeros3 = (torch.empty(count, size // 32 * 3, dtype=torch.int32) for count in (size, 8))
gptq = Scales(of_groups.t(), 128, zeros=zeros.t(), zeros_form="less one")
CASES = {
    "GPTQ": (Codes(words.t(), "columns", 4), gptq, out, torch.float16),
    "GPTQ, act order": (Codes(words.t(), "columns", 4), gptq._replace(groups=order), out, torch.float16),
    "GPTQ, 3 bits": (Codes(bits3.view(-1, size).t(), "columns", 3), gptq._replace(zeros=zeros3.t()), out, torch.float16),
    "AWQ": (Codes(words.view(size, -1).t(), "rows", 4), gptq._replace(zeros_form="words"), out, torch.float16),
    "compressed-tensors int4": (
        Codes(words.view(size, -1), "columns", 4, 8), Scales(rows, 128, zeros=zeros.view(-1, 8), zeros_form="words"), out,
        torch.bfloat16,
    ),
    "FP8 blocks": (Codes(numbers, "e4m3"), Scales(torch.empty(8, 8), 128, 128), out),
    "int8": (Codes(numbers.view(torch.int8), "int8"), Scales(torch.empty(size, 1), size), out),
    "MXFP4": (Codes(words.view(size, -1), "e2m1", 4), Scales(numbers[:, :32].contiguous(), 32), out.t()),
}
for capability in (80, 89, 90, 120):
    driver.set_active(Gpu(capability))
    for case, arguments in CASES.items():
        triton_scaled.decode(*arguments)
    case, flat = "NF4", numbers.view(-1)
    nested = (torch.empty(64), torch.empty(256), 256, 0.1)
    span = (0, flat.numel(), 0, 0, 0)
    triton_pairs.decode(flat, torch.empty(16), (flat, 64), nested, out.view(-1), span, torch.bfloat16)
    for case in triton_gguf.LAYOUTS:
        triton_gguf.decode(case, flat[: size * size // BLOCKS[case].elements * BLOCKS[case].num_bytes], out)
"""


def decoded(weight, stored, dtype, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """By the portable decoder, and by the kernel."""

    def use(kernels: str | None) -> None:
        for module in (bitsandbytes, compressed_tensors, fp8, gguf_format, grouped, mxfp4):
            monkeypatch.setattr(module, "kernels_for", lambda tensor: kernels)

    use(None)
    expected = weight.decode(stored, dtype)
    use("triton")
    return expected, weight.decode({name: tensor.to(DEVICE) for name, tensor in stored.items()}, dtype).cpu()


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, of NaN only that it is one."""
    is_number, bits = ~expected.isnan(), torch.int32 if expected.dtype == torch.float32 else torch.int16
    return found.isnan().equal(~is_number) and found[is_number].view(bits).equal(expected[is_number].view(bits))


def check(weight: StoredWeight, stored: Mapping, monkeypatch, numbers: torch.Tensor | None = None, ranges=()) -> None:
    """In every dtype, and some of its rows. numbers: what is expected of the whole, by others than the portable decoder too."""
    for dtype in DTYPES:
        expected, found = decoded(weight, stored, dtype, monkeypatch)
        assert same(found, expected)
        assert numbers is None or same(found, numbers.to(dtype))
    if ranges:
        some = weight.rows(ranges)
        expected, found = decoded(some, some.load(read_source), torch.float32, monkeypatch)
        assert same(found, expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind, block, shape", [("nf4", 64, (33, 70)), ("fp4", 32, (7, 5)), ("nf4", 4096, (65, 96))])
@pytest.mark.parametrize("packed_from", ["float32", "bfloat16", "float16"])
def test_four_bits(packed_from, kind, block, shape, nested, tmp_path, monkeypatch):
    torch.manual_seed(5)
    stored, _ = pack_4bit(torch.randn(shape), kind, nested, block, packed_from)
    weight, stored = read(write(tmp_path / "x.safetensors", stored), "a", shape)
    check(weight, stored, monkeypatch, ranges=[(1, 2), (3, 7)])


@pytest.mark.parametrize("shape", [(65, 96), (7, 5)])
def test_int8(shape, tmp_path, monkeypatch):
    torch.manual_seed(6)
    stored, _ = pack_int8(torch.randn(shape))
    weight, stored = read(write(tmp_path / "x.safetensors", stored), "a.weight", shape)
    check(weight, stored, monkeypatch, ranges=[(1, 2), (3, 7)])


SCALES = {
    "fp32": lambda grid: torch.rand(grid) * 1e-3,
    "bf16": lambda grid: torch.rand(grid).bfloat16(),
    "e8m0": lambda grid: torch.randint(0, 256, grid, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "exponents": lambda grid: torch.randint(0, 256, grid, dtype=torch.uint8),
}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("block", [(2, 128), (1, 301), (4, 64), (5, 301)])
def test_fp8(block, scales, monkeypatch):
    """Every code; the last blocks are ragged."""
    torch.manual_seed(7)
    shape = (5, 301)
    grid = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
    codes = (torch.arange(5 * 301) * 37).to(torch.uint8).view(shape)
    stored = {"packed": codes.view(torch.float8_e4m3fn), "scales": SCALES[scales](grid)}
    outlines = [PlainTensor(tensor.dtype, tuple(tensor.shape), ()) for tensor in stored.values()]
    check(fp8.BlockFP8(*outlines, block, (RowSpan(0, 5),)), stored, monkeypatch)
    some = fp8.BlockFP8(*outlines, block, (RowSpan(3, 5), RowSpan(2, 5)))
    check(some, stored, monkeypatch)


def test_exponents_are_powers_of_two():
    expected = torch.exp2(torch.arange(-127.0, 129.0, dtype=torch.float64)).float()
    assert fp8._powers(torch.arange(256, dtype=torch.uint8)).equal(expected)


def test_numbers_of_gptqmodel_and_autoawq(monkeypatch):
    """Of 2, 3, 4 and 8 bits, in both formats of GPTQ, in order and not; zero points that carry."""
    names = [name.removesuffix(".expected") for name in load_file(RECORDED) if name.endswith(".expected")]
    assert len(names) == 20
    for name in names:
        how, *options = name.split(".")
        order = options[-1] == "act_order"
        of = Awq(int(options[0])) if how == "awq" else Gptq(int(options[0]), 24 if order else 16, order, how)
        expected = load_file(RECORDED)[f"{name}.expected"]
        weight, stored = read_grouped(RECORDED, tuple(expected.shape), of.section, name)
        check(weight, stored, monkeypatch, expected, [(1, 3), (7, 20)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "how, options, shape",
    [
        (Gptq, (4, 24), (72, 160)), (Gptq, (4, -1), (8, 8)), (Gptq, (3, 16), (96, 96)), (Gptq, (2, 8, True), (80, 80)),
        (Gptq, (8, 128), (68, 72)), (Awq, (24,), (136, 72)), (Awq, (-1,), (8, 1)),
    ],
)  # fmt: skip
def test_groups_of_odd_sizes(how, options, shape, dtype, tmp_path, monkeypatch):
    of = how(*options, dtype=dtype)
    stored, numbers = of.pack(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    weight, stored = read_grouped(write_grouped(tmp_path / "x.safetensors", stored), shape, of.section)
    check(weight, stored, monkeypatch, numbers, [(1, 2), (4, 7)])


def test_scales_of_all_magnitudes(tmp_path, monkeypatch):
    """Negative ones, products that are too large for fp16, and ones that are subnormal in it."""
    torch.manual_seed(1)
    how, shape = Gptq(4, 16), (48, 64)
    stored, _ = how.pack(torch.randn(shape))
    stored[".scales"].copy_(torch.randn(stored[".scales"].shape) * 10.0 ** torch.randint(-7, 5, stored[".scales"].shape))
    weight, stored = read_grouped(write_grouped(tmp_path / "x.safetensors", stored), shape, how.section)
    check(weight, stored, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compressed_tensors(strategy, dtype, tmp_path, monkeypatch):
    options, block = STRATEGIES[strategy]
    for bits, words, symmetric in [(2, True, True), (4, True, False), (8, True, False), (8, False, True), (8, False, False)]:
        if words and strategy in ("tensor", "block") and not symmetric:
            continue  # the library packs zero points of rows and groups only
        stored, numbers = pack_compressed(draw(ROWS), bits, block, dtype, symmetric, words)
        weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, **options}
        quantization = section("pack-quantized" if words else "int-quantized", weights)
        weight, tensors = read_compressed(tmp_path, stored, quantization, ROWS)
        check(weight, tensors, monkeypatch, numbers, [(1, 3), (9, 11)])


def test_compressed_tensors_out_of_order(tmp_path, monkeypatch):
    order = np.random.default_rng(5).permutation(np.arange(ROWS[1]) // 13)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 13}
    for symmetric in (True, False):
        stored, numbers = pack_compressed(draw(ROWS), 4, (1, 13), symmetric=symmetric, order=order)
        quantization = section("pack-quantized", weights | {"symmetric": symmetric})
        weight, tensors = read_compressed(tmp_path, stored, quantization, ROWS)
        check(weight, tensors, monkeypatch, numbers, [(5, 11)])


@pytest.mark.parametrize("zeros", [torch.int32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("is_packed", [True, False])
def test_zero_points_that_are_rounded(is_packed, zeros, monkeypatch):
    """To the dtype of the scales, and so is the difference: of E4M3, and of packed integers with zero points of their own."""
    torch.manual_seed(2)
    shape, block = (6, 40), (4, 24)
    codes = torch.randint(0, 256, (6, 20 if is_packed else 40), dtype=torch.uint8)
    stored = {
        "packed": codes.view(torch.int32 if is_packed else torch.float8_e4m3fn), "scales": torch.randn(2, 2).bfloat16(),
        "zero_points": (torch.randn(2, 2) * 300).to(zeros),
    }  # fmt: skip
    scheme = Scheme(4 if is_packed else 8, not is_packed, is_packed, False, "block", block, False)
    outlines = [PlainTensor(tensor.dtype, tuple(tensor.shape), ()) for tensor in stored.values()]
    spans = (RowSpan(0, 6),)
    check(compressed_tensors.CompressedTensor(*outlines, None, shape, scheme, block, spans, spans), stored, monkeypatch)


def test_mxfp4(monkeypatch):
    """Every code at every exponent, zeros of both signs too; matrices of odd sizes."""
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = (codes * 16 + codes.flip(0)).expand(1, 256, 1, 16).contiguous()
    exponents = torch.arange(256, dtype=torch.uint8).view(1, 256, 1)
    odd = torch.randint(0, 256, (3, 50, 3, 16), dtype=torch.uint8), torch.randint(100, 140, (3, 50, 3), dtype=torch.uint8)
    for parts in ((blocks, exponents), odd):
        weight = mxfp4.MXFP4Experts(*(PlainTensor(torch.uint8, tuple(tensor.shape), ()) for tensor in parts))
        stored = dict(zip(("blocks", "scales"), parts, strict=True))
        for dtype in DTYPES:
            expected, found = decoded(weight, stored, dtype, monkeypatch)
            assert same(found, expected) and same(found, convert_moe_packed_tensors(*parts, dtype=dtype))


@pytest.mark.parametrize("word", DECODERS)
def test_gguf(word, monkeypatch):
    """Any bytes at all, also as scales; the numbers of the package gguf."""
    elements, num_bytes = gguf.GGML_QUANT_SIZES[Type[word]]
    rows, columns = 9, 3 * elements
    blocks = np.random.default_rng(1).integers(0, 256, (rows * 3, num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        numbers = torch.from_numpy(gguf.dequantize(blocks, Type[word])).view(rows, columns)
    stored = torch.from_numpy(blocks).view(rows, -1)
    weight = gguf_format.GgufTensor(PlainTensor(torch.uint8, tuple(stored.shape), ()), (rows, columns), word)
    check(weight, {"stored": stored}, monkeypatch, numbers)


@pytest.mark.slow
def test_compiled_for_gpus_nothing_is_fused_or_spilled(compiled):
    printed = compiled(COMPILE)
    operations = set(re.findall(r"\b((?:add|sub|mul|fma|div)\.\S*f32)", printed))
    assert {"add.rn.f32", "mul.rn.f32"} <= operations <= {"add.rn.f32", "mul.rn.f32", "sub.rn.f32"}
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", printed)
    assert spills == [("0", "0")] * 4 * (8 + 1 + 12)
    assert max(map(int, re.findall(r"Used (\d+) registers", printed))) <= 80
