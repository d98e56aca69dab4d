"""Decoders of packed weights on accelerators: the portable ones' bits, interpreted where there is none. Compiled, nothing is
fused and nothing is kept outside of registers."""

from __future__ import annotations

import re

import pytest
import torch
from packed_checkpoints import pack_4bit, pack_int8
from test_bitsandbytes import read, read_source, write

pytest.importorskip("triton")

from offload.weights.formats import PlainTensor, bitsandbytes, fp8  # noqa: E402
from offload.weights.formats.scaled import RowSpan  # noqa: E402

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPILE = """
import re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from offload.weights.formats import triton_kernels

def compiled(kernel, types, constants, capability):
    source = ASTSource(
        fn=kernel, signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    print(made.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(made.asm["ptx"])
        file.flush()
        target = re.search(r"\\.target (\\w+)", made.asm["ptx"])[1]
        command = [get_ptxas(capability).path, "-v", "--gpu-name", target, "-o", "/dev/null", file.name]
        print(subprocess.run(command, text=True, capture_output=True).stderr)

codes = {name: "i64" for name in ("start", "stop", "byte_shift", "block_shift", "nested_shift")} | {
    "packed": "*u8", "table": "*fp32", "absmax": "*u8", "nested_absmax": "*fp32", "nested_map": "*fp32",
    "nested_offset": "fp32", "out": "*bf16",
}
rows = {"packed": "*i8", "scales": "*fp32", "factor": "fp32", "out": "*bf16", "columns": "i32"}
e4m3 = {"packed": "*u8", "scales": "*fp32", "out": "*bf16", "columns": "i32"}
for capability in (80, 89, 90, 120):
    tile = triton_kernels.TILE
    compiled(triton_kernels._codes_4bit, codes, {"BLOCK": 64, "NESTED_BLOCK": 256, "ROUNDED_TO": 1, "TILE": tile}, capability)
    compiled(triton_kernels._rows_int8, rows, {"TILE": tile}, capability)
    compiled(triton_kernels._rows_e4m3, e4m3, {"WIDTH": 128, "TILE": tile}, capability)
"""


def decoded(weight, stored, dtype, monkeypatch, module=bitsandbytes) -> tuple[torch.Tensor, torch.Tensor]:
    """By the portable decoder, and by the kernel."""
    monkeypatch.setattr(module, "kernels_for", lambda tensor: None)
    expected = weight.decode(stored, dtype)
    monkeypatch.setattr(module, "kernels_for", lambda tensor: "triton")
    return expected, weight.decode({name: tensor.to(DEVICE) for name, tensor in stored.items()}, dtype).cpu()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind, block, shape", [("nf4", 64, (33, 70)), ("fp4", 32, (7, 5)), ("nf4", 4096, (65, 96))])
@pytest.mark.parametrize("packed_from", ["float32", "bfloat16", "float16"])
def test_four_bits(packed_from, kind, block, shape, nested, tmp_path, monkeypatch):
    torch.manual_seed(5)
    stored, _ = pack_4bit(torch.randn(shape), kind, nested, block, packed_from)
    weight, stored = read(write(tmp_path / "x.safetensors", stored), "a", shape)
    for dtype in DTYPES:
        expected, found = decoded(weight, stored, dtype, monkeypatch)
        assert found.equal(expected)
    some = weight.rows([(1, 2), (3, 7)])
    expected, found = decoded(some, some.load(read_source), torch.float32, monkeypatch)
    assert found.equal(expected)


@pytest.mark.parametrize("shape", [(65, 96), (7, 5)])
def test_int8(shape, tmp_path, monkeypatch):
    torch.manual_seed(6)
    stored, _ = pack_int8(torch.randn(shape))
    weight, stored = read(write(tmp_path / "x.safetensors", stored), "a.weight", shape)
    for dtype in DTYPES:
        expected, found = decoded(weight, stored, dtype, monkeypatch)
        assert found.equal(expected)


@pytest.mark.parametrize("block", [(2, 128), (1, 301), (4, 64), (5, 301)])
def test_fp8(block, monkeypatch):
    """Every code; the last blocks are ragged."""
    shape = (5, 301)
    grid = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
    codes = (torch.arange(5 * 301) * 37).to(torch.uint8).view(shape)
    stored = {"packed": codes.view(torch.float8_e4m3fn), "scales": torch.rand(grid) * 1e-3}
    outlines = [PlainTensor(tensor.dtype, tuple(tensor.shape), ()) for tensor in stored.values()]
    weight = fp8.BlockFP8(*outlines, block, (RowSpan(0, 5),))
    for dtype in DTYPES:
        expected, found = decoded(weight, stored, dtype, monkeypatch, fp8)
        assert found.nan_to_num(7).equal(expected.nan_to_num(7)) and found.isnan().sum() == expected.isnan().sum() > 0


@pytest.mark.slow
def test_compiled_for_gpus_nothing_is_fused_or_spilled(compiled):
    printed = compiled(COMPILE)
    operations = set(re.findall(r"\b((?:add|sub|mul|fma|div)\.\S*f32)", printed))
    assert {"add.rn.f32", "mul.rn.f32"} <= operations <= {"add.rn.f32", "mul.rn.f32", "sub.rn.f32"}
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", printed)
    assert spills == [("0", "0")] * 12
    assert max(map(int, re.findall(r"Used (\d+) registers", printed))) <= 64
